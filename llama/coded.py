"""Products of few rows with weights in codes of 4 or 8 bits, in Triton, for CUDA.

Decoding is bound by reading weights: codes become numbers in registers, and a group's scale multiplies what its
codes sum up to. A row is the same in any batch. Triton comes with torch's CUDA builds; TRITON_INTERPRET=1 runs the
same program on the CPU. Knows no layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = (16, 64)  # of x at once: tensor cores take no fewer
OUTPUTS = 32  # of a program
STEP = 128  # inputs at once, at most
LEAST = 16  # of them in a product


@triton.jit(do_not_specialize=["m"])  # else a batch of another size would wait for a compiler
def _product(
    x, codes, scales, offsets, table, bias, y, m, n, k,
    BITS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
    LOOKED_UP: tl.constexpr, OFFSETS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y (m, n) = x (m, k) Wᵀ + b, for ROWS of the one and OUTPUTS of the other."""
    row, output = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    asked, there = row[:, None] < m, output < n  # masks of x and y, and of outputs
    each: tl.constexpr = 8 // BITS  # codes of a byte
    inner = tl.arange(0, STEP // each)
    x_at = x + row[:, None].to(tl.int64) * k + inner * each
    code_at = codes + output[None, :].to(tl.int64) * (k // each) + inner[:, None]
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for step in range(k // STEP):
        byte = tl.load(code_at + step * (STEP // each), mask=there[None, :], other=0)
        first = tl.load(x_at + step * STEP, mask=asked, other=0.0)
        if BITS == 8:
            part = tl.dot(first, byte.to(first.dtype), input_precision="ieee")
            whole = tl.sum(first.to(tl.float32), 1)
        else:
            second = tl.load(x_at + step * STEP + 1, mask=asked, other=0.0)
            high, low = byte.to(tl.int32) >> 4, byte.to(tl.int32) & 15
            if LOOKED_UP:
                a, b = tl.load(table + high).to(first.dtype), tl.load(table + low).to(first.dtype)
            else:  # two's complement
                a, b = ((high ^ 8) - 8).to(first.dtype), ((low ^ 8) - 8).to(first.dtype)
            part = tl.dot(first, a, input_precision="ieee")
            part += tl.dot(second, b, input_precision="ieee")
            whole = tl.sum(first.to(tl.float32), 1) + tl.sum(second.to(tl.float32), 1)
        at = output.to(tl.int64) * (k // GROUP) + step * STEP // GROUP
        total += part * tl.load(scales + at, mask=there, other=0.0).to(tl.float32)[None, :]
        if OFFSETS:
            total += whole[:, None] * tl.load(offsets + at, mask=there, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + row[:, None].to(tl.int64) * n + output[None, :], total.to(y.dtype.element_ty), mask=asked & there[None, :]
    )


def takes(group: int, k: int) -> bool:
    """Whether rows of k inputs, `group` of them to a scale, are what the program takes."""
    return k % group == 0 and _step(group) >= 2 * LEAST


def _step(group: int) -> int:
    """Inputs at once: as large a power of two as divides a group."""
    return min(group & -group, STEP)


def multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    values: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
    bits: int,
) -> Tensor:
    """x (T, K) → x Wᵀ + b (T, N), summed in fp32, for W of `shape` (N, K), in groups of neighbouring inputs.

    codes: (N, K) int8, or 4 bits each, two a byte, the first in the high half; scales and offsets (N * K / group,).
    What 4 bits mean stands in values (16,), or is two's complement where that is None.
    """
    (n, k), m, x = shape, len(x), x.contiguous()
    y = x.new_empty(m, n)
    group = n * k // scales.numel()
    rows = ROWS[0] if m <= ROWS[0] else ROWS[1]
    some = codes  # stands for what is not there; never read
    tensors = (x, codes, scales, *(some if t is None else t for t in (offsets, values, bias)), y)
    told = (values is not None, offsets is not None, bias is not None)
    grid = (triton.cdiv(n, OUTPUTS), triton.cdiv(m, rows))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current one
        _product[grid](*tensors, m, n, k, bits, group, _step(group), rows, OUTPUTS, *told)
    return y
