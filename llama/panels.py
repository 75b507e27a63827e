"""Packed weights in the layout of our own product: 4 or 8 bits, panels of 32 outputs, on the CPU.

Few rows multiply codes as they lie, many rows a stretch that is unpacked into the cache, and both give the same numbers
as the unpacked weights in fp32. Takes the place of `CodebookLinear` and `Int8Linear` where the kernels run. Knows no
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.native import PANEL, Coded, Kernels
from llama.packed import PackedLinear

HALF = PANEL // 2


class PanelLinear(PackedLinear):
    """W (N, K) as integers of up to 8 bits, or as indices of 16 `values`; each `group` inputs of a row share a scale.

    Layout as in `native.Coded`.
    """

    row_step = PANEL
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    values: Tensor | None

    def __init__(
        self,
        kernels: Kernels,
        shape: tuple[int, int],
        values: Sequence[float] | None,  # 16 of them; None: codes are the integers themselves, a byte each
        group: int,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,  # the CPU, or meta
        bias: Tensor | None = None,
        order: Tensor | None = None,
        with_offsets: bool = False,
    ) -> None:
        super().__init__(shape, dtype, bias, order)
        n, k = shape
        if k % group:
            raise ValueError(f"a row of {k} weights cannot be cut into groups of {group}")
        self.kernels = kernels
        panels, width = -(-n // PANEL), PANEL if values is None else HALF
        kind = torch.int8 if values is None else torch.uint8
        codes = torch.zeros(panels, k, width, dtype=kind, device=device)
        scales = torch.zeros(panels, k // group, PANEL, dtype=scale_dtype, device=device)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("offsets", torch.zeros_like(scales) if with_offsets else None, persistent=False)
        self.register_buffer("values", None if values is None else torch.tensor(values), persistent=False)

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        panels = slice(start // PANEL, -(-(start + len(codes)) // PANEL))
        across = _across(codes)
        if self.values is None:
            self.codes[panels] = across
        else:
            low, high = (across & 15).view(torch.uint8).chunk(2, -1)
            self.codes[panels] = high << 4 | low
        self.scales[panels] = _across(scales.view(len(codes), -1).to(self.scales.dtype))
        if self.offsets is not None and offsets is not None:
            self.offsets[panels] = _across(offsets.view(len(codes), -1).to(self.offsets.dtype))

    def product(self, x: Tensor) -> Tensor:
        return self.kernels.coded(
            x, Coded(self.codes, self.scales, self.offsets, self.values), self.bias, self.out_features
        )

    def rows(self, start: int, stop: int) -> Tensor:
        panels = slice(start // PANEL, -(-stop // PANEL))
        codes = self.codes[panels]
        weight = codes.float() if self.values is None else self.values[torch.cat((codes & 15, codes >> 4), -1).int()]
        groups = weight.view(len(weight), self.scales.shape[1], -1, PANEL)  # (panels, groups, group, 32)
        groups.mul_(self.scales[panels, :, None].float())
        if self.offsets is not None:
            groups.add_(self.offsets[panels, :, None].float())
        return weight.transpose(1, 2).reshape(-1, self.in_features)[: stop - start].to(self.dtype)


def _across(rows: Tensor) -> Tensor:
    """(n, C) → (panels, C, 32), filled up with zeros."""
    full = F.pad(rows, (0, 0, 0, -len(rows) % PANEL))
    return full.view(-1, PANEL, rows.shape[1]).transpose(1, 2)
