"""Layers from the matrices of a checkpoint: which class holds them, allocated once and filled by rows.

Matrices over one input become one layer (q, k and v; gate and up) wherever they are kept alike. Knows no file layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from llama import native
from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.formats.bitsandbytes import NF4_VALUES
from llama.formats.matrix import DenseMatrix, IntMatrix, Matrix, Nf4Matrix, Q8Matrix
from llama.int4 import GROUPS, Int4Linear, kernel_block
from llama.linear import DenseLinear, FusedLinear, Linear
from llama.packed import TWOS_COMPLEMENT, CodebookLinear, Int8Linear, PackedLinear, scale_dtype
from llama.panels import IntegerPanelLinear, PanelLinear
from llama.q8 import GROUP as Q8_GROUP
from llama.q8 import Q8Linear, q8_grid, q8_nearest

FILL_WEIGHTS = 1 << 20  # read, quantised and packed at once

M = TypeVar("M", bound=Matrix)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a layer is to live and what it computes in. If `hollow`, it is of the right kind and size, but empty.

    `integers`: products are those of integers wherever a layer allows it; dense weights are then put on an 8-bit grid.
    """

    dtype: torch.dtype
    device: torch.device
    hollow: bool = False
    integers: bool = False

    @property
    def place(self) -> torch.device:
        """Where tensors are made."""
        return torch.device("meta") if self.hollow else self.device


def build_linear(module: str, parts: Sequence[Matrix], bias: Tensor | None, target: Target) -> Linear:
    """One layer whose output is that of `parts` side by side; bias (N,) in the compute dtype.

    Raises BrokenCheckpoint naming `module` where scales are not finite, and what the matrices raise.
    """
    dense = [part for part in parts if isinstance(part, DenseMatrix)]
    if len(dense) == len(parts):
        if ours := _integers(target, Q8_GROUP, dense[0].shape[1]):
            return _rounded(dense, bias, ours, target)
        return DenseLinear(dense_weight(dense, target), bias)
    ints = [part for part in parts if isinstance(part, IntMatrix)]
    if len(ints) == len(parts) and _alike(ints):
        return _fill(module, _int_layer(ints, bias, target), ints, target)
    nf4 = [part for part in parts if isinstance(part, Nf4Matrix)]
    if len(nf4) == len(parts) and len({part.block for part in nf4}) == 1:
        return _fill(module, _nf4_layer(nf4, bias, target), nf4, target)
    if len(parts) == 1 and isinstance(parts[0], Q8Matrix):
        return build_q8(module, parts[0], bias, target)
    biases = [None] * len(parts) if bias is None else torch.split(bias, [part.shape[0] for part in parts])
    return FusedLinear([build_linear(module, [p], b, target) for p, b in zip(parts, biases, strict=True)])


def _rounded(parts: Sequence[DenseMatrix], bias: Tensor | None, ours: native.Kernels, target: Target) -> Linear:
    """W on the 8-bit grid of `llama.q8`: as it is where it lies on that grid, else rounded to it."""
    layer = IntegerPanelLinear(ours, _shape(parts), 8, Q8_GROUP, torch.float16, target.dtype, target.place, bias)
    for part, start, stop, at in () if target.hollow else _pieces(parts, layer.row_step):
        rows = part.rows(start, stop).float()
        try:
            codes, scales = q8_grid(rows)
        except UnsupportedModel:
            codes, scales = q8_nearest(rows)
        layer.fill(at, codes.flatten(1), scales)
    return layer


def build_q8(module: str, table: Q8Matrix, bias: Tensor | None, target: Target) -> Q8Linear | IntegerPanelLinear:
    """As `build_linear`, of a table on the 8-bit grid, which the embedding may share."""
    shape, dtype, place = table.shape, target.dtype, target.place
    layer: Q8Linear | IntegerPanelLinear
    if ours := _integers(target, Q8_GROUP, shape[1]):
        layer = IntegerPanelLinear(ours, shape, 8, Q8_GROUP, torch.float16, dtype, place, bias)
    else:
        layer = Q8Linear(shape, dtype, place, bias)
    _fill(module, layer, [table], target)
    return layer


def dense_weight(parts: Sequence[DenseMatrix], target: Target) -> Tensor:
    """The matrices' rows one under another (N, K)."""
    weight = torch.empty(_shape(parts), dtype=target.dtype, device=target.place)
    if target.hollow:
        return weight
    for part, start, stop, at in _pieces(parts):
        weight[at : at + stop - start] = part.rows(start, stop)
    return weight


def _int_layer(parts: Sequence[IntMatrix], bias: Tensor | None, target: Target) -> PackedLinear:
    """The fastest layer class that holds them."""
    shape, group, order = _shape(parts), parts[0].group, parts[0].order
    order = None if order is None else order.to(target.place)
    offsets = any(part.has_offsets for part in parts)
    if ours := _kernels(parts, group, target):
        values = None if parts[0].bits > 4 else TWOS_COMPLEMENT
        scales, place = scale_dtype(target.dtype), target.place
        if _integers(target, group, shape[1]):
            bits, dtype = parts[0].bits, target.dtype
            return IntegerPanelLinear(ours, shape, bits, group, scales, dtype, place, bias, order, offsets)
        return PanelLinear(ours, shape, values, group, scales, target.dtype, place, bias, order, offsets)
    if parts[0].bits > 4:
        return Int8Linear(shape, group, target.dtype, target.place, bias, order, offsets)
    if (target.dtype, target.device.type) == (torch.bfloat16, "cpu") and group in GROUPS:
        block = kernel_block()
        if block is not None and all(part.shape[0] % block == 0 for part in parts):
            return Int4Linear(shape, group, block, bias, order, target.place)
    scales = scale_dtype(target.dtype)
    return CodebookLinear(shape, TWOS_COMPLEMENT, group, scales, target.dtype, target.place, bias, order, offsets)


def _nf4_layer(parts: Sequence[Nf4Matrix], bias: Tensor | None, target: Target) -> PackedLinear:
    shape, block, kept, dtype, place = _shape(parts), parts[0].block, torch.float32, target.dtype, target.place
    ours = _kernels(parts, block, target)
    if ours is None:
        return CodebookLinear(shape, NF4_VALUES, block, kept, dtype, place, bias)
    if _integers(target, block, shape[1]):
        return IntegerPanelLinear(ours, shape, 4, block, kept, dtype, place, bias, values=NF4_VALUES)
    return PanelLinear(ours, shape, NF4_VALUES, block, kept, dtype, place, bias)


def _kernels(parts: Sequence[IntMatrix | Nf4Matrix], group: int, target: Target) -> native.Kernels | None:
    """Ours if they multiply these matrices: in whole panels one under another, and rows in whole groups."""
    (_, k), alone = parts[0].shape, len(parts) == 1
    fits = k % group == 0 and (alone or all(part.shape[0] % native.PANEL == 0 for part in parts))
    # In fp32, where exactness is asked for, torch's product sums in shorter stretches and is closer to the true one.
    computed = (target.device.type, target.dtype) == ("cpu", torch.bfloat16)
    return native.kernels() if fits and computed else None


def _integers(target: Target, group: int, k: int) -> native.Kernels | None:
    """Ours if the target is to multiply integers and they take groups of this size."""
    return native.kernels() if target.integers and k % group == 0 and group % native.SHARE == 0 else None


def _fill(
    module: str, layer: PackedLinear, parts: Sequence[IntMatrix | Nf4Matrix | Q8Matrix], target: Target
) -> PackedLinear:
    if target.hollow:
        return layer
    for part, start, stop, at in _pieces(parts, layer.row_step):
        rows = part.rows(start, stop)
        if not bool(torch.isfinite(rows.scales).all()):
            raise BrokenCheckpoint(f"{module}: a scale is NaN or infinite")
        layer.fill(at, *rows)
    return layer


def _alike(parts: Sequence[IntMatrix]) -> bool:
    """Whether one layer can hold them all."""
    first = parts[0]
    same_kind = all((part.bits > 4, part.group) == (first.bits > 4, first.group) for part in parts)
    return same_kind and all(_same_order(part.order, first.order) for part in parts)


def _same_order(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _shape(parts: Sequence[Matrix]) -> tuple[int, int]:
    return sum(part.shape[0] for part in parts), parts[0].shape[1]


def _pieces(parts: Sequence[M], row_step: int = 1) -> Iterator[tuple[M, int, int, int]]:
    """Each matrix in pieces of rows: (matrix, start, stop, where its first row goes)."""
    offset = 0
    for part in parts:
        n, k = part.shape
        step = max(1, FILL_WEIGHTS // (k * row_step)) * row_step
        for start in range(0, n, step):
            yield part, start, min(start + step, n), offset + start
        offset += n
