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
TABLE = 127.0  # steps of a looked-up value on either side of 0


class Panels(PackedLinear):
    """What both have in common. Subclasses lay codes out, read them back, and name them to the kernels."""

    row_step = PANEL
    codes: Tensor
    scales: Tensor  # (panels, groups, 32)
    offsets: Tensor | None

    def __init__(
        self,
        kernels: Kernels,
        shape: tuple[int, int],
        codes: Tensor,  # of all panels, empty
        group: int,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
        bias: Tensor | None,
        order: Tensor | None,
        with_offsets: bool,
    ) -> None:
        super().__init__(shape, dtype, bias, order)
        if shape[1] % group:
            raise ValueError(f"a row of {shape[1]} weights cannot be cut into groups of {group}")
        self.kernels = kernels
        scales = torch.zeros(len(codes), shape[1] // group, PANEL, dtype=scale_dtype, device=codes.device)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("offsets", torch.zeros_like(scales) if with_offsets else None, persistent=False)

    def packed(self) -> Coded | Integers:
        """As the kernels read them."""
        raise TypeError(f"{type(self).__name__} does not say how it is laid out")

    def laid_out(self, across: Tensor) -> Tensor:
        """Codes (panels, K, 32) int8 → as they are kept."""
        raise TypeError(f"{type(self).__name__} does not say how to pack")

    def read(self, codes: Tensor) -> Tensor:
        """Kept codes → what they stand for before they are scaled, (panels, K, 32) fp32, to be overwritten."""
        raise TypeError(f"{type(self).__name__} does not say how to unpack")

    def native(self) -> Product | None:
        if self.order is not None or self.dtype != torch.bfloat16:
            return None
        return self.kernels.product_of(self.packed(), self.bias, self.out_features, self.in_features)

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        panels = slice(start // PANEL, -(-(start + len(codes)) // PANEL))
        self.codes[panels] = self.laid_out(_across(codes))
        self.scales[panels] = _across(scales.view(len(codes), -1).to(self.scales.dtype))
        if self.offsets is not None and offsets is not None:
            self.offsets[panels] = _across(offsets.view(len(codes), -1).to(self.offsets.dtype))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weights(slice(start // PANEL, -(-stop // PANEL)))[: stop - start]

    def weights(self, panels: slice | Tensor) -> Tensor:
        """The rows of whole panels, one under another, in the compute dtype."""
        codes, scales = self.read(self.codes[panels]), self.scales[panels]
        groups = codes.view(len(codes), scales.shape[1], -1, PANEL)  # (panels, groups, group, 32)
        groups.mul_(scales[:, :, None].float())
        if self.offsets is not None:
            groups.add_(self.offsets[panels][:, :, None].float())
        return codes.transpose(1, 2).flatten(0, 1).to(self.dtype)


class PanelLinear(Panels):
    """W (N, K) as integers of up to 8 bits, or as indices of 16 `values`; each `group` inputs of a row share a scale.

    Layout as in `native.Coded`.
    """

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
        width, kind = (PANEL, torch.int8) if values is None else (HALF, torch.uint8)
        codes = torch.zeros(-(-shape[0] // PANEL), shape[1], width, dtype=kind, device=device)
        super().__init__(kernels, shape, codes, group, scale_dtype, dtype, bias, order, with_offsets)
        self.register_buffer("values", None if values is None else torch.tensor(values), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        return self.kernels.coded(x, self.packed(), self.bias, self.out_features)

    def packed(self) -> Coded:
        return Coded(self.codes, self.scales, self.offsets, self.values)

    def laid_out(self, across: Tensor) -> Tensor:
        if self.values is None:
            return across
        low, high = (across & 15).view(torch.uint8).chunk(2, -1)
        return high << 4 | low

    def read(self, codes: Tensor) -> Tensor:
        return codes.float() if self.values is None else self.values[torch.cat((codes & 15, codes >> 4), -1).int()]


class IntegerPanelLinear(Panels):
    """W (N, K) as integers of up to 8 bits, multiplied as integers; `group`, a multiple of SHARE, shares a scale.

    Layout as in `native.Integers`. Weights are those of any other layer over these codes; inputs are rounded, which
    leaves a product about 1 % of its size off. `values`, of -1 to 1, that 4-bit codes are indices of are rounded, too,
    to 127ths, which moves weights by about 0.6 %.
    """

    values: Tensor | None

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
        values: Sequence[float] | None = None,  # 16 of them; None: codes are the integers themselves
    ) -> None:
        if group % SHARE:
            raise ValueError(f"products of integers take groups of {SHARE}, and multiples; not of {group}")
        width = HALF if bits <= 4 else PANEL
        codes = torch.zeros(-(-shape[0] // PANEL), shape[1] // 4, width, 4, dtype=torch.uint8, device=device)
        super().__init__(kernels, shape, codes, group, scale_dtype, dtype, bias, order, with_offsets)
        self.width, self.above = width, 8 if bits <= 4 and values is None else 128  # what is kept above its value
        table = None if values is None else torch.tensor(values).mul(TABLE).round_().add_(self.above).to(torch.uint8)
        self.register_buffer("values", table, persistent=False)

    def product(self, x: Tensor) -> Tensor:
        return self.kernels.integers(x, self.packed(), self.bias, self.out_features)

    def packed(self) -> Integers:
        return Integers(self.codes, self.scales, self.offsets, self.values)

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        super().fill(start, codes, scales if self.values is None else scales / TABLE, offsets)

    def laid_out(self, across: Tensor) -> Tensor:
        kept = (across.short() + self.above).to(torch.uint8) if self.values is None else (across & 15).view(torch.uint8)
        fours = kept.view(len(across), -1, 4, PANEL).transpose(2, 3)
        return fours if self.width == PANEL else fours[:, :, HALF:] << 4 | fours[:, :, :HALF]

    def read(self, codes: Tensor) -> Tensor:
        codes = codes if self.width == PANEL else torch.cat((codes & 15, codes >> 4), 2)
        if self.values is not None:
            codes = self.values[codes.int()]
        return codes.transpose(2, 3).flatten(1, 2).float().sub_(self.above)

    def gather(self, ids: Tensor) -> Tensor:
        """W[ids] (T, K) in the compute dtype."""
        picked = self.weights(ids // PANEL).view(len(ids), PANEL, self.in_features)
        return picked[torch.arange(len(ids)), ids % PANEL]


def _across(rows: Tensor) -> Tensor:
    """(n, C) → (panels, C, 32), filled up with zeros."""
    full = F.pad(rows, (0, 0, 0, -len(rows) % PANEL))
    return full.view(-1, PANEL, rows.shape[1]).transpose(1, 2)
