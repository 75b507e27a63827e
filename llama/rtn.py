"""Round-to-nearest: the symmetric integer grid that weights are put on at load, the same bits on every machine.

Knows one weight matrix at a time; knows no checkpoint, no packing and no kernel. Only elementwise IEEE operations and
a maximum are used, so no machine's order of summation can show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from llama.errors import BrokenCheckpoint, UnsupportedModel

QUANTISER = "rtn@1"  # part of the `weights` digest: any change of a single code or scale needs a new version
BITS = (2, 3, 4, 8)
LINEARS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # of each decoder block

_LEVEL = re.compile(r"w([0-9]+)g([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Grid:
    """Integers of `bits` bits, one bf16 scale for `group` neighbouring inputs of a row. Raises UnsupportedModel."""

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group < 1:
            raise UnsupportedModel(f"no grid of {self.bits} bits in groups of {self.group}; bits are one of {BITS}")

    @classmethod
    def of_level(cls, level: str) -> Grid | None:
        """The grid that a level names (`w3g64`), or None if the level is of another kind."""
        match = _LEVEL.fullmatch(level)
        return cls(int(match[1]), int(match[2])) if match else None

    def check(self, columns: int) -> None:
        """Raise UnsupportedModel unless rows of so many weights can be cut into groups."""
        if columns % self.group:
            raise UnsupportedModel(
                f"a row of {columns} weights cannot be cut into groups of {self.group}; choose a group that divides it"
            )


def is_quantised(name: str) -> bool:
    """Whether the checkpoint tensor `name` goes on the grid: the weights of the linears of the decoder blocks."""
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and parts[-1] == "weight" and parts[-2] in LINEARS


def quantise(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest points of the grid: weight (N, K) fp32 -> codes (N, K) int8, scales (N, K / group) bf16.

    The scale is 2 amax / (2**bits - 1), rounded to bf16 before the codes are taken against it, so that what is stored
    is what was optimised; ties go to the even code. A group of zeros has scale 1.

    Raises UnsupportedModel if K is no multiple of the group, BrokenCheckpoint if a weight is not finite.
    """
    rows, columns = weight.shape
    Grid(bits, group).check(columns)
    if weight.dtype != torch.float32:
        raise TypeError(f"weights are quantised from fp32, got {weight.dtype}")
    grouped = weight.reshape(rows, columns // group, group)
    amax = grouped.abs().amax(dim=-1, keepdim=True)  # (N, K / group, 1)
    if not bool(torch.isfinite(amax).all()):
        raise BrokenCheckpoint("a weight is NaN or infinite and has no place on an integer grid")
    # Divided by a tensor: by a Python number CUDA multiplies with the reciprocal, which rounds twice.
    scales = (amax / torch.full_like(amax, (2**bits - 1) / 2)).to(torch.bfloat16)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = (grouped / scales.float()).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.to(torch.int8).reshape(rows, columns), scales.squeeze(-1)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights (N, K) that codes (N, K) and scales (N, K / group) stand for.

    A code times a bf16 scale is exact in fp32, so the one rounding is that to `dtype`.
    """
    rows, columns = codes.shape
    grouped = codes.reshape(rows, scales.shape[1], -1).float() * scales.float().unsqueeze(-1)
    return grouped.reshape(rows, columns).to(dtype)
