"""Tables on an 8-bit grid: codes (N, K / 32, 32) int8 and one fp16 scale for every 32 neighbouring inputs of a row.

That is what GGUF's Q8_0 holds, so a table that came from there can be put back on its grid with nothing lost. Knows one
table at a time; knows no file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.errors import BrokenCheckpoint, UnsupportedModel

GROUP = 32
LARGEST = 128  # of codes, by absolute value
GRID_WEIGHTS = 1 << 17  # looked at before a table that is on no grid is refused


def q8_grid(table: Tensor) -> tuple[Tensor, Tensor]:
    """The 8-bit grid that a table (N, K) lies on: codes and scales whose product in fp32 equals the table exactly.

    Raises UnsupportedModel if there is none: `q8_nearest` puts any table on one.
    """
    step = max(1, GRID_WEIGHTS // table.shape[1])
    found = [_grid(_groups(table[at : at + step]), at) for at in range(0, len(table), step)]
    return torch.cat([codes for codes, _ in found]), torch.cat([scales for _, scales in found])


def _grid(groups: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """`q8_grid` of some rows, (n, K / 32, 32) fp32."""
    peaks = groups.abs().amax(-1)  # (n, K / 32)
    scales, codes = torch.ones_like(peaks), torch.zeros_like(groups)
    left = peaks > 0  # groups that no scale was found for
    # A scale is told by the code of the largest weight, which is 127 as the common writers scale.
    for largest in (LARGEST - 1, LARGEST, *range(LARGEST - 2, 0, -1)):
        place = left.nonzero(as_tuple=True)
        if not len(place[0]):
            break
        tried = (peaks[place] / largest).to(torch.float16).float()
        found = (groups[place] / tried[:, None]).round_()
        exact = (found * tried[:, None] == groups[place]).all(-1) & (found < LARGEST).all(-1)
        place = tuple(index[exact] for index in place)
        scales[place], codes[place], left[place] = tried[exact], found[exact], False
    if bool(left.any()):
        raise UnsupportedModel(
            f"row {first_row + int(left.nonzero()[0, 0])} of the table is not on an 8-bit grid with fp16 scales for "
            f"{GROUP} inputs each, so it cannot be stored on one without loss"
        )
    return codes.to(torch.int8), scales.to(torch.float16)


def q8_nearest(table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest points of the grid that Q8_0 gives a table (N, K): codes and scales."""
    groups = _groups(table)
    peaks = groups.abs().amax(-1)
    scales = (peaks / (LARGEST - 1)).to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise UnsupportedModel("a weight is too large for a grid with fp16 scales")
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = (groups / scales.float()[..., None]).round_().clamp_(-LARGEST, LARGEST - 1)
    return codes.to(torch.int8), scales


def q8_table(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes (n, K / 32, 32) and scales (n, K / 32) stand for: (n, K) fp32, exactly."""
    return (codes.float() * scales.float()[..., None]).flatten(1)


def _groups(table: Tensor) -> Tensor:
    """(N, K) → (N, K / 32, 32) fp32."""
    if table.shape[1] % GROUP:
        raise UnsupportedModel(f"rows of {table.shape[1]} weights cannot be cut into groups of {GROUP}")
    if not bool(torch.isfinite(table).all()):
        raise BrokenCheckpoint("a weight is NaN or infinite and has no place on an integer grid")
    return table.float().reshape(len(table), -1, GROUP)
