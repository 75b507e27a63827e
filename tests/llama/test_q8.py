"""Tables on an 8-bit grid: whatever lies on one is found on it again, and nothing else is taken for one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.q8 import q8_grid, q8_nearest, q8_table


def as_gguf_writes(table: torch.Tensor) -> torch.Tensor:
    """Q8_0 of llama.cpp and back: the scale is amax / 127 in fp16, but codes are taken before it is rounded."""
    groups = table.view(len(table), -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, groups / scale, 0).round()
    return (codes * scale.half().float()).view_as(table)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1e-4, 1e-2, 1.0, 300.0]))
@settings(deadline=None)
def test_a_table_from_gguf_comes_back_exactly(seed, n, groups, size):
    noise = torch.randn(n, 32 * groups, generator=torch.Generator().manual_seed(seed)) * size
    table = as_gguf_writes(noise)
    codes, scales = q8_grid(table)
    assert (codes.dtype, codes.shape) == (torch.int8, (n, groups, 32))
    assert (scales.dtype, scales.shape) == (torch.float16, (n, groups))
    assert torch.equal(q8_table(codes, scales), table)
    assert torch.equal(q8_table(*q8_nearest(table)), table)


@given(st.integers(0, 2**32), st.integers(1, 128))
@settings(deadline=None)
def test_any_grid_of_eight_bits_is_found(seed, largest):
    """Scales that are no amax / 127: of fewer bits, or of a group in which no code is large."""
    dice = torch.Generator().manual_seed(seed)
    codes = torch.randint(-largest, min(largest, 127) + 1, (4, 2, 32), generator=dice)
    scales = torch.rand(4, 2, generator=dice).half()
    table = (codes.float() * scales.float()[..., None]).flatten(1)
    assert torch.equal(q8_table(*q8_grid(table)), table)


def test_zeros_are_on_a_grid():
    assert torch.equal(q8_table(*q8_grid(torch.zeros(2, 64))), torch.zeros(2, 64))


def test_a_table_on_no_grid_is_refused_by_the_row():
    table = as_gguf_writes(torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)))
    table[4321, 7] *= 1 + 2**-20
    with pytest.raises(UnsupportedModel, match="row 4321 "):
        q8_grid(table)


def test_what_cannot_be_on_a_grid_is_said():
    with pytest.raises(UnsupportedModel, match="rows of 40"):
        q8_grid(torch.zeros(2, 40))
    with pytest.raises(BrokenCheckpoint, match="NaN"):
        q8_grid(torch.full((2, 32), torch.nan))
    with pytest.raises(UnsupportedModel, match="too large"):
        q8_nearest(torch.full((2, 32), 1e8))
