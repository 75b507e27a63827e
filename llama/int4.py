"""Integers of up to 4 bits in the layout of torch's weight-only kernel on the CPU, in bf16.

Decoding one token is bound by reading weights: this kernel reads 4.5 bits of each. It is used for few rows; many rows,
and the gradient, unpack the same bytes for a dense product. Whether the kernel of this machine keeps weights in the
layout below is tried, not guessed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.packed import KERNEL_ROWS, PackedLinear

GROUPS = (32, 64, 128, 256)
BLOCKS = (64, 32)  # rows that are interleaved: AVX-512, AVX2


def kernel_block() -> int | None:
    """How many rows the kernel of this CPU interleaves, or None if it has a layout that is not ours."""
    codes = (torch.arange(2 * BLOCKS[0] * 64) * 7 // 3 % 16).to(torch.uint8).view(-1, 64)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    for block in BLOCKS:
        if torch.equal(interleave(codes, block), theirs.view(-1, 32)):
            return block
    return None


def interleave(codes: Tensor, block: int) -> Tensor:
    """Codes (n, K) in 0..15 → bytes (n, K / 2).

    Of each `block` rows, column by column: byte i holds row i in its low half and row i + block / 2 in the high one.
    """
    n, k = codes.shape
    columns = codes.view(n // block, block, k).transpose(1, 2)  # (blocks, K, block)
    low, high = columns.chunk(2, -1)
    return (high << 4 | low).reshape(n, k // 2)


class Int4Linear(PackedLinear):
    """W = code * scale + offset, codes in -8..7; `group` neighbouring inputs of a row share scale and offset, in bf16.

    `block` comes from `kernel_block`; N must be a multiple of it, the group one of GROUPS that divides K.
    """

    packed: Tensor  # (N, K / 2) uint8
    scales_offsets: Tensor  # (K / group, N, 2) bf16

    def __init__(
        self,
        shape: tuple[int, int],
        group: int,
        block: int,
        bias: Tensor | None = None,
        order: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(shape, torch.bfloat16, bias, order)
        n, k = shape
        if group not in GROUPS or k % group or n % block:
            raise ValueError(f"the 4-bit kernel does not take {n} x {k} weights in groups of {group}")
        self.group, self.row_step = group, block
        self.register_buffer("packed", torch.empty(n, k // 2, dtype=torch.uint8, device=device), persistent=False)
        scales_offsets = torch.zeros(k // group, n, 2, dtype=torch.bfloat16, device=device)
        self.register_buffer("scales_offsets", scales_offsets, persistent=False)

    def fill(self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        rows = slice(start, start + len(codes))
        self.packed[rows] = interleave((codes + 8).view(torch.uint8), self.row_step)
        self.scales_offsets[:, rows, 0] = scales.t()
        if offsets is not None:
            self.scales_offsets[:, rows, 1] = offsets.t()

    def product(self, x: Tensor) -> Tensor:
        if x.shape[0] > KERNEL_ROWS:
            return super().product(x)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, self.group, self.scales_offsets)
        return self.biased(y)

    def rows(self, start: int, stop: int) -> Tensor:
        block, groups = self.row_step, self.in_features // self.group
        blocks = (stop - start) // block
        packed = self.packed[start:stop].view(blocks, groups, self.group, block // 2)
        # (2, groups, blocks, 1, halves of a block, block / 2)
        factors = (
            self.scales_offsets[:, start:stop]
            .view(groups, blocks, 1, 2, block // 2, 2)
            .float()
            .permute(5, 0, 1, 2, 3, 4)
        )
        transposed = torch.empty(groups, self.group, blocks, 2, block // 2, dtype=self.dtype)
        for half, codes in enumerate((packed & 15, packed >> 4)):
            scale, offset = factors[:, :, :, :, half].transpose(1, 2).unbind(0)  # (blocks, groups, 1, block / 2)
            weight = codes.float().sub_(8).mul_(scale).add_(offset)
            transposed[:, :, :, half] = weight.permute(1, 2, 0, 3)
        return transposed.view(self.in_features, -1).t()
