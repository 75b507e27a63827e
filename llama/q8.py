"""Tables on an 8-bit grid: codes (N, K / 32, 32) int8 and one fp16 scale for every 32 neighbouring inputs of a row.

That is what GGUF's Q8_0 holds, so a table that came from there can be put back on its grid with nothing lost.
`Q8Linear` multiplies by such a table, and looks its rows up. Knows one table at a time; knows no file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.packed import PackedLinear

GROUP = 32
LARGEST = 128  # of codes, by absolute value
FEW_ROWS = 4  # of inputs: up to here a pass of torch's int8 kernel for each group beats unpacking the table
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


class Q8Linear(PackedLinear):
    """W on the 8-bit grid: an int8 code for each weight, an fp16 scale for 32 neighbouring inputs of a row.

    Rows are code * scale in fp32, rounded once to the compute dtype: those of the dense table that was put on the grid.
    """

    codes: Tensor  # (K / 32, N, 32) int8: for every group of inputs a matrix of its own, as torch's kernel takes it
    scales: Tensor  # (K / 32, N) fp16

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, bias: Tensor | None = None
    ) -> None:
        super().__init__(shape, dtype, bias, None)
        n, k = shape
        codes = torch.empty(k // GROUP, n, GROUP, dtype=torch.int8, device=device)
        scales = torch.empty(k // GROUP, n, dtype=torch.float16, device=device)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        rows = slice(start, start + len(codes))
        self.codes[:, rows] = codes.view(len(codes), -1, GROUP).transpose(0, 1)
        self.scales[:, rows] = scales.t()

    def product(self, x: Tensor) -> Tensor:
        if x.shape[0] > FEW_ROWS or x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().product(x)
        groups = x.view(len(x), -1, GROUP).transpose(0, 1).contiguous()  # (K / 32, T, 32)
        ones = torch.ones(self.out_features, dtype=x.dtype)
        y = torch.zeros(x.shape[0], self.out_features)
        for inputs, codes, scales in zip(groups, self.codes, self.scales, strict=True):
            y.addcmul_(torch._weight_int8pack_mm(inputs, codes, ones).float(), scales.float())
        return self.biased(y.to(x.dtype))

    def rows(self, start: int, stop: int) -> Tensor:
        return self._weights(self.codes[:, start:stop], self.scales[:, start:stop])

    def gather(self, ids: Tensor) -> Tensor:
        """W[ids] (T, K) in the compute dtype."""
        return self._weights(self.codes[:, ids], self.scales[:, ids])

    def _weights(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Codes (K / 32, n, 32) and scales (K / 32, n) → (n, K)."""
        weights = codes.float().mul_(scales.float()[..., None])
        rows = torch.empty(codes.shape[1], codes.shape[0], GROUP, dtype=self.dtype, device=codes.device)
        return rows.copy_(weights.transpose(0, 1)).flatten(1)


def _groups(table: Tensor) -> Tensor:
    """(N, K) → (N, K / 32, 32) fp32."""
    if table.shape[1] % GROUP:
        raise UnsupportedModel(f"rows of {table.shape[1]} weights cannot be cut into groups of {GROUP}")
    if not bool(torch.isfinite(table).all()):
        raise BrokenCheckpoint("a weight is NaN or infinite and has no place on an integer grid")
    return table.float().reshape(len(table), -1, GROUP)
