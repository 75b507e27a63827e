"""Sparse weights: what is packed comes back, in bytes that can be counted beforehand and places that are as told."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.bits import pack_stream, unpack_stream
from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.sparse import SparseLayout

SPARSITIES = st.one_of(st.integers(1, 99).map("s{}".format), st.sampled_from(["s2of4", "s1of2", "s4of8", "s31of64"]))
GRIDS = st.one_of(st.integers(2, 8).map("w{}".format), st.builds("w{}g{}".format, st.integers(2, 8), st.just(32)))


def kept_at_random(n: int, k: int, layout: SparseLayout, seed: int) -> torch.Tensor:
    """(N, K) bool."""
    noise = torch.rand(n, k // layout.of, layout.of, generator=torch.Generator().manual_seed(seed))
    return (noise.argsort(-1).argsort(-1) < layout.keep).view(n, k)


@given(SPARSITIES, st.integers(1, 5), st.integers(1, 4), st.sampled_from(["float32", "float16", "bfloat16"]))
@settings(deadline=None)
def test_floats_come_back(level, n, words, dtype):
    layout, k = SparseLayout.of_level(level), 64 * words
    kept = kept_at_random(n, k, layout, n)
    weight = torch.randn(n, k).to(getattr(torch, dtype)) * kept
    stored = layout.pack(weight, kept)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == layout.shapes(n, k)
    assert stored["weight"].dtype == weight.dtype
    assert torch.equal(layout.unpack(stored), weight)


@given(GRIDS, SPARSITIES, st.integers(2, 5), st.integers(1, 4))
@settings(deadline=None)
def test_codes_come_back(grid, sparsity, n, words):
    layout, k = SparseLayout.of_level(f"{grid}-{sparsity}"), 64 * words
    kept = kept_at_random(n, k, layout, n)
    half = 2 ** (layout.bits - 1)
    codes = torch.randint(-half, half, (n, k)).to(torch.int8) * kept
    scales = torch.rand(n, k // layout.width(k)).bfloat16()
    stored = layout.pack(codes, kept, scales)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == layout.shapes(n, k)
    assert torch.equal(layout.unpack(stored), codes)
    assert torch.equal(stored["weight_scale"], scales)
    some = {name: tensor[1:] for name, tensor in stored.items()}
    assert torch.equal(layout.unpack(some), codes[1:])  # rows can be read alone


def test_the_bytes_are_where_the_description_has_them():
    """Against numpy: bit i of word j is input 64 j + i; codes are a stream from the lowest bit."""
    layout = SparseLayout.of_level("w3g64-s50")
    kept = kept_at_random(2, 128, layout, 0)
    codes = torch.randint(-4, 4, (2, 128), generator=torch.Generator().manual_seed(0)).to(torch.int8) * kept
    stored = layout.pack(codes, kept, torch.ones(2, 2))
    bitmap = np.unpackbits(stored["weight_kept"].numpy().view(np.uint8), axis=1, bitorder="little")
    np.testing.assert_array_equal(bitmap.astype(bool), kept.numpy())
    bits = np.unpackbits(stored["weight"].numpy().view(np.uint8), axis=1, bitorder="little")
    for row in range(2):
        values = bits[row].reshape(-1, 3) @ np.array([1, 2, 4]) - 4
        np.testing.assert_array_equal(values, codes[row][kept[row]].numpy())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 33, 100])
def test_streams_come_back(bits, count):
    values = torch.randint(0, 2**bits, (3, count)).to(torch.uint8)
    assert torch.equal(unpack_stream(pack_stream(values, bits), bits, count), values)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("s50", SparseLayout(32, 64)),
        ("s60", SparseLayout(26, 64)),
        ("s99", SparseLayout(1, 64)),
        ("s2of4", SparseLayout(2, 4)),
        ("w4g64-s50", SparseLayout(32, 64, 4, 64)),
        ("w3-s2of4", SparseLayout(2, 4, 3, None)),
        *(
            (name, None)
            for name in ("dense", "w4g64", "s0", "s100", "s4of2", "s2of3", "nf4-s50", "s50-w4g64", "w4-", "-s50")
        ),
    ],
)
def test_levels(level, expected):
    assert SparseLayout.of_level(level) == expected


def test_what_does_not_keep_to_the_layout_is_not_packed():
    layout = SparseLayout.of_level("w4g64-s50")
    kept = kept_at_random(2, 64, layout, 0)
    codes, scales = kept.to(torch.int8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="32 of every 64"):
        layout.pack(codes, torch.ones(2, 64, dtype=torch.bool), scales)
    with pytest.raises(ValueError, match="nothing else"):
        layout.pack(codes + 1, kept, scales)
    with pytest.raises(ValueError, match="scales"):
        layout.pack(codes, kept)
    with pytest.raises(ValueError, match="4 bits"):
        layout.pack(codes * 8, kept, scales)
    with pytest.raises(UnsupportedModel, match="96 inputs"):
        layout.pack(torch.zeros(2, 96), torch.zeros(2, 96, dtype=torch.bool))


@pytest.mark.parametrize("level", ["s50", "s2of4"])
def test_a_bitmap_that_keeps_another_number_is_refused(level):
    layout = SparseLayout.of_level(level)
    kept = kept_at_random(2, 64, layout, 0)
    stored = layout.pack(kept.float(), kept)
    stored["weight_kept"][1, 0] ^= 1 << 5
    with pytest.raises(BrokenCheckpoint, match="bitmap"):
        layout.unpack(stored)
