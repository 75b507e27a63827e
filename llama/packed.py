"""Linear layers whose weights stay packed in memory and are unpacked, some rows at a time, for each product.

`PackedLinear` is the common part: products and gradients from dequantised row blocks. `CodebookLinear` keeps 4-bit
codes that look up one of 16 values, on any device and in any dtype; `Int8Linear` keeps bytes. Knows no checkpoint.
The faster 4-bit kernel of the CPU is in `llama.int4`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.jit import compiles
from llama.linear import OpaqueLinear

KERNEL_ROWS = 256  # above it, unpacking once and a dense product are no slower than torch's weight-only kernels
TWOS_COMPLEMENT = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)
BLOCK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # unpacked at once: stays in the cache; outweighs a launch


def scale_dtype(compute: torch.dtype) -> torch.dtype:
    """How scales are kept: bf16 beside bf16, else fp32."""
    return torch.bfloat16 if compute == torch.bfloat16 else torch.float32


@cache
def _triton() -> ModuleType | None:
    """Products with codes on CUDA; None where Triton does not run."""
    return importlib.import_module("llama.coded") if compiles() else None


def coded(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    values: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
    bits: int,
) -> Tensor | None:
    """As `llama.coded.multiply`, if that takes x: on CUDA, few rows, where Triton is. Else None."""
    if x.device.type != "cuda" or len(x) > KERNEL_ROWS or (ours := _triton()) is None:
        return None
    if not ours.takes(shape[0] * shape[1] // scales.numel(), shape[1]):
        return None
    y: Tensor = ours.multiply(x, codes, scales, offsets, values, bias, shape, bits)
    return y


class PackedLinear(OpaqueLinear):
    """W (N, K) in fewer bits. Subclasses unpack rows; whole blocks of `row_step` rows can be unpacked alone.

    `order` (K,) is the order in which the inputs are stored, where a checkpoint groups them by importance (GPTQ's
    act-order); None if as they come.
    """

    row_step = 1

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None, order: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype  # of inputs and outputs
        self.bias: Tensor | None
        self.order: Tensor | None
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def rows(self, start: int, stop: int) -> Tensor:
        """W[start:stop] (n, K) in the compute dtype, inputs in stored order; bounds are multiples of `row_step`."""
        raise TypeError(f"{type(self).__name__} does not say how to unpack")

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        """Put rows in place from `start` on: codes (n, K) int8, n whole blocks; scales, offsets as they are kept."""
        raise TypeError(f"{type(self).__name__} does not say how to pack")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.order is None else x.index_select(1, self.order))

    def product(self, x: Tensor) -> Tensor:
        spans = list(self._spans(x.device))
        if len(spans) == 1:
            return F.linear(x, self.rows(*spans[0]), self.bias)
        y = x.new_empty(x.shape[0], self.out_features)
        for start, stop in spans:
            torch.matmul(x, self.rows(start, stop).t(), out=y[:, start:stop])
        return self.biased(y)

    def pullback(self, dy: Tensor) -> Tensor:
        spans = list(self._spans(dy.device))
        if len(spans) == 1:
            return dy @ self.rows(*spans[0])
        dx = dy.new_zeros(dy.shape[0], self.in_features, dtype=torch.float32)  # many blocks are summed
        for start, stop in spans:
            dx += dy[:, start:stop] @ self.rows(start, stop)
        return dx.to(dy.dtype)

    def dense(self) -> Tensor:
        weight = torch.cat([self.rows(*span) for span in self._spans(self._device())])
        return weight if self.order is None else weight.index_select(1, self.order.argsort())

    def biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y.add_(self.bias)

    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _spans(self, device: torch.device) -> Iterator[tuple[int, int]]:
        limit = BLOCK_WEIGHTS.get(device.type, BLOCK_WEIGHTS["cuda"])
        step = max(1, limit // (self.in_features * self.row_step)) * self.row_step
        for start in range(0, self.out_features, step):
            yield start, min(start + step, self.out_features)


class CodebookLinear(PackedLinear):
    """4-bit codes, two a byte (the first in the high half), each the index of one of 16 values.

    Every `block` weights in a row-major walk over W share a scale and perhaps an offset: W = value * scale + offset,
    in fp32, rounded once to the compute dtype. The values are the quantiles of NF4 (Dettmers et al. 2023, appendix E),
    or TWOS_COMPLEMENT for integers of up to 4 bits.
    """

    codes: Tensor  # (N * K / 2,) uint8
    scales: Tensor  # (N * K / block,)
    offsets: Tensor | None
    values: Tensor | None  # (16,) fp32, or two's complement
    pairs: Tensor  # (256,) int64: for each byte its two fp32 values, so that one look-up serves two weights

    def __init__(
        self,
        shape: tuple[int, int],
        values: Sequence[float],  # 16 of them
        block: int,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        bias: Tensor | None = None,
        order: Tensor | None = None,
        with_offsets: bool = False,
    ) -> None:
        super().__init__(shape, dtype, bias, order)
        n, k = shape
        if n * k % block or n * k % 2:
            raise ValueError(f"{n} x {k} weights do not fill blocks of {block}")
        self.block = block
        self.row_step = math.lcm(block, 2) // math.gcd(k, math.lcm(block, 2))
        table = torch.tensor(values)
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), -1).view(torch.int64).flatten()
        scales = torch.empty(n * k // block, dtype=scale_dtype, device=device)
        self.register_buffer("codes", torch.empty(n * k // 2, dtype=torch.uint8, device=device), persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("offsets", torch.zeros_like(scales) if with_offsets else None, persistent=False)
        self.register_buffer("pairs", pairs.to(device), persistent=False)
        looked_up = None if tuple(values) == TWOS_COMPLEMENT else table.to(device)
        self.register_buffer("values", looked_up, persistent=False)

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        n, k = codes.shape
        flat = (codes & 15).view(torch.uint8).flatten()
        self.codes[start * k // 2 : (start + n) * k // 2] = flat[0::2] << 4 | flat[1::2]
        blocks = slice(start * k // self.block, (start + n) * k // self.block)
        self.scales[blocks] = scales.flatten()
        if self.offsets is not None and offsets is not None:
            self.offsets[blocks] = offsets.flatten()

    def product(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        y = coded(x, self.codes, self.scales, self.offsets, self.values, self.bias, shape, 4)
        return super().product(x) if y is None else y

    def rows(self, start: int, stop: int) -> Tensor:
        k = self.in_features
        codes = self.codes[start * k // 2 : stop * k // 2]
        blocks = slice(start * k // self.block, stop * k // self.block)
        weight = self.pairs.index_select(0, codes.int()).view(torch.float32).view(-1, self.block)
        weight.mul_(self.scales[blocks, None])
        if self.offsets is not None:
            weight.add_(self.offsets[blocks, None])
        return weight.view(-1, k).to(self.dtype)


class Int8Linear(PackedLinear):
    """Integers of 5 to 8 bits, a byte each; every `group` neighbouring inputs of a row share scale and offset.

    Serves LLM.int8 checkpoints, too, weight-only: activations stay in the compute dtype, so there are no outlier
    columns to split off, and one path serves, scores and learns. On the CPU in bf16, with one scale for each row and no
    offset, torch's own kernel multiplies few rows.
    """

    codes: Tensor  # (N, K) int8
    scales: Tensor  # (N, K / group)
    offsets: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        group: int,
        dtype: torch.dtype,
        device: torch.device,
        bias: Tensor | None = None,
        order: Tensor | None = None,
        with_offsets: bool = False,
    ) -> None:
        super().__init__(shape, dtype, bias, order)
        n, k = shape
        if k % group:
            raise ValueError(f"a row of {k} weights cannot be cut into groups of {group}")
        scales = torch.empty(n, k // group, dtype=scale_dtype(dtype), device=device)
        self.register_buffer("codes", torch.empty(n, k, dtype=torch.int8, device=device), persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("offsets", torch.zeros_like(scales) if with_offsets else None, persistent=False)
        # The kernel reads 16 inputs at a time and past the end of any other row.
        whole = group == k and k % 16 == 0 and not with_offsets
        self.kernel = whole and device.type == "cpu" and dtype == torch.bfloat16

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        rows = slice(start, start + len(codes))
        self.codes[rows] = codes
        self.scales[rows] = scales
        if self.offsets is not None and offsets is not None:
            self.offsets[rows] = offsets

    def product(self, x: Tensor) -> Tensor:
        if self.kernel and x.shape[0] <= KERNEL_ROWS:
            return self.biased(torch._weight_int8pack_mm(x.contiguous(), self.codes, self.scales.flatten()))
        shape = (self.out_features, self.in_features)
        y = coded(x, self.codes, self.scales, self.offsets, None, self.bias, shape, 8)
        return super().product(x) if y is None else y

    def rows(self, start: int, stop: int) -> Tensor:
        weight = self.codes[start:stop].float().view(stop - start, self.scales.shape[1], -1)
        weight.mul_(self.scales[start:stop, :, None])
        if self.offsets is not None:
            weight.add_(self.offsets[start:stop, :, None])
        return weight.view(stop - start, -1).to(self.dtype)
