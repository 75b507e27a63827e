"""Level names: what they mean, what is refused, and which one would fit."""

import pytest

from lab.compress.level import Bits, Level, Sparsity
from lab.compress.methods import choose
from llama.errors import UnsupportedModel


@pytest.mark.parametrize(
    ("name", "grid", "sparsity"),
    [
        ("w4g64", Bits(4, 64), None),
        ("w8", Bits(8, None), None),
        ("s50", None, Sparsity(32, 64)),
        ("s60", None, Sparsity(26, 64)),
        ("s2of4", None, Sparsity(2, 4)),
        ("w4g128-s50", Bits(4, 128), Sparsity(32, 64)),
        ("w3-s4of8", Bits(3, None), Sparsity(4, 8)),
    ],
)
def test_names(name, grid, sparsity):
    assert Level.parse(name) == Level(name, grid, sparsity)


@pytest.mark.parametrize(
    "name", ["", "dense", "int8", "w5g64", "w4g48", "w4g0", "s0", "s100", "s50-w4g64", "w4g64-", "w4g64-w4g64", "s4of4"]
)
def test_names_that_mean_nothing(name):
    with pytest.raises(UnsupportedModel):
        Level.parse(name)


@pytest.mark.parametrize(
    ("name", "widths", "instead"),
    [
        ("w4g128", (576, 1536), "w4g64 would fit"),
        ("w4g128-s50", (576, 1536), "w4g64-s50 would fit"),
        ("w3g64", (96, 192), "w3g32 would fit"),
        ("w3g32", (80, 192), "w3 would fit"),
        ("s50", (96, 192), "without sparsity"),
    ],
)
def test_a_group_that_does_not_divide_the_inputs(name, widths, instead):
    with pytest.raises(UnsupportedModel, match=instead):
        Level.parse(name).check(dict(zip(("qkv", "down"), widths, strict=True)))
    Level.parse("w4").check({"qkv": 577})


@pytest.mark.parametrize(("method", "level"), [("rtn", "s50"), ("wanda", "w4g64"), ("gptq", "w4g64-s50"), ("x", "w4")])
def test_a_method_of_another_kind_of_level(method, level):
    with pytest.raises(UnsupportedModel, match="choose one of"):
        choose(method, Level.parse(level))
