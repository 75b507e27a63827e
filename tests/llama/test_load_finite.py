"""A weight that is no number is found while it is copied, and named: it used to load, and to fail the first request."""

import pytest
import torch

from llama.errors import BrokenCheckpoint
from llama.load import load


@pytest.mark.parametrize("level", [None, "w4g32", "nf4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", (299, 31)),
        ("model.layers.1.mlp.down_proj.weight", (3, 5)),
        ("model.layers.0.self_attn.k_proj.weight", (15, 0)),
        ("model.layers.0.input_layernorm.weight", (7,)),
        ("model.norm.weight", (31,)),
    ],
)
def test_it_is_named(make_checkpoint, state, level, value, name, place):
    state[name][place] = value
    with pytest.raises(BrokenCheckpoint) as refused:
        load(make_checkpoint(state=state), level=level, device="cpu", dtype="float32")
    assert str(refused.value) == f"{name}{list(place)} is NaN or infinite"


def test_both_infinities_do_not_hide_each_other(make_checkpoint, state):
    state["model.norm.weight"][0] = float("inf")
    state["model.norm.weight"][1] = float("-inf")
    with pytest.raises(BrokenCheckpoint, match=r"model\.norm\.weight\[0\] is NaN or infinite"):
        load(make_checkpoint(state=state), device="cpu")


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 65504.0), (torch.float32, 3e38)])
def test_large_is_not_infinite(make_checkpoint, state, dtype, value):
    """Their sum may be."""
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    state["model.layers.0.mlp.up_proj.weight"][:] = value
    load(make_checkpoint(state=state), device="cpu", dtype="float32")
