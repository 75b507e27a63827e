"""Packed weights in the layouts of our own products: 4 or 8 bits, panels of 32 outputs, on the CPU.

`PanelLinear`: few rows multiply codes as they lie, many rows a stretch that is unpacked into the cache, and both give
the same numbers as the unpacked weights in fp32. `IntegerPanelLinear`: the same weights, times inputs in 8 bits. They
take the place of `CodebookLinear` and `Int8Linear` where the kernels run. Know no checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.native import PANEL, SHARE, Coded, Integers, Kernels, Product
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
        return self.kernels.coded(x, self._packed, self.bias, self.out_features)

    def native(self) -> Product | None:
        if self.order is not None or self.dtype != torch.bfloat16:
            return None
        return self.kernels.product_of(self._packed, self.bias, self.out_features, self.in_features)

    @property
    def _packed(self) -> Coded:
        return Coded(self.codes, self.scales, self.offsets, self.values)

    def rows(self, start: int, stop: int) -> Tensor:
        panels = slice(start // PANEL, -(-stop // PANEL))
        codes = self.codes[panels]
        weight = codes.float() if self.values is None else self.values[torch.cat((codes & 15, codes >> 4), -1).int()]
        offsets = None if self.offsets is None else self.offsets[panels]
        return _scaled(weight, self.scales[panels], offsets)[: stop - start].to(self.dtype)


class IntegerPanelLinear(PackedLinear):
    """W (N, K) as integers of up to 8 bits, multiplied as integers; `group`, a multiple of SHARE, shares a scale.

    Layout as in `native.Integers`. Weights are those of any other layer over these codes; inputs are rounded, which
    leaves a product about 1 % of its size off.
    """

    row_step = PANEL
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(
        self,
        kernels: Kernels,
        shape: tuple[int, int],
        bits: int,
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
        if k % group or group % SHARE:
            raise ValueError(f"a row of {k} weights cannot be cut into groups of {group}, or these into {SHARE}s")
        self.kernels = kernels
        panels = -(-n // PANEL)
        codes = torch.zeros(panels, k // 4, HALF if bits <= 4 else PANEL, 4, dtype=torch.uint8, device=device)
        scales = torch.zeros(panels, k // group, PANEL, dtype=scale_dtype, device=device)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("offsets", torch.zeros_like(scales) if with_offsets else None, persistent=False)

    @property
    def _halves(self) -> bool:
        return self.codes.shape[2] == HALF

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        panels = slice(start // PANEL, -(-(start + len(codes)) // PANEL))
        above = (_across(codes).short() + (8 if self._halves else 128)).to(torch.uint8)
        fours = above.view(len(above), -1, 4, PANEL).transpose(2, 3)  # (panels, K / 4, 32, 4)
        self.codes[panels] = fours[:, :, HALF:] << 4 | fours[:, :, :HALF] if self._halves else fours
        self.scales[panels] = _across(scales.view(len(codes), -1).to(self.scales.dtype))
        if self.offsets is not None and offsets is not None:
            self.offsets[panels] = _across(offsets.view(len(codes), -1).to(self.offsets.dtype))

    def product(self, x: Tensor) -> Tensor:
        return self.kernels.integers(x, self._packed, self.bias, self.out_features)

    def native(self) -> Product | None:
        if self.order is not None or self.dtype != torch.bfloat16:
            return None
        return self.kernels.product_of(self._packed, self.bias, self.out_features, self.in_features)

    @property
    def _packed(self) -> Integers:
        return Integers(self.codes, self.scales, self.offsets)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._weights(slice(start // PANEL, -(-stop // PANEL)))[: stop - start]

    def gather(self, ids: Tensor) -> Tensor:
        """W[ids] (T, K) in the compute dtype."""
        picked = self._weights(ids // PANEL).view(len(ids), PANEL, self.in_features)
        return picked[torch.arange(len(ids)), ids % PANEL]

    def _weights(self, panels: slice | Tensor) -> Tensor:
        """Rows of whole panels, one under another."""
        codes = self.codes[panels]
        codes = torch.cat((codes & 15, codes >> 4), 2) if self._halves else codes
        weight = codes.transpose(2, 3).flatten(1, 2).float().sub_(8 if self._halves else 128)
        offsets = None if self.offsets is None else self.offsets[panels]
        return _scaled(weight, self.scales[panels], offsets).to(self.dtype)


def _scaled(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Values (panels, K, 32), which are overwritten, in groups times scales plus offsets → W (panels * 32, K) fp32."""
    groups = codes.view(len(codes), scales.shape[1], -1, PANEL)  # (panels, groups, group, 32)
    groups.mul_(scales[:, :, None].float())
    if offsets is not None:
        groups.add_(offsets[:, :, None].float())
    return codes.transpose(1, 2).flatten(0, 1)


def _across(rows: Tensor) -> Tensor:
    """(n, C) → (panels, C, 32), filled up with zeros."""
    full = F.pad(rows, (0, 0, 0, -len(rows) % PANEL))
    return full.view(-1, PANEL, rows.shape[1]).transpose(1, 2)
