"""Weight matrices as they lie in a checkpoint: what every format reads into, and what layers are built from.

A matrix is read some rows at a time, so that loading never holds more than a layer twice. Knows no layer class and no
file layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.errors import BrokenCheckpoint, UnsupportedModel

FLOATS = ("F32", "F16", "BF16")


class DenseMatrix:
    """Weights of `name` (N, K) as stored: fp32, fp16 or bf16. Raises BrokenCheckpoint."""

    def __init__(self, checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> None:
        checkpoint.expect(name, shape, FLOATS)
        self.name, self.shape = name, shape
        self._checkpoint = checkpoint

    def rows(self, start: int, stop: int) -> Tensor:
        """(n, K) in the stored dtype; a view of the file."""
        return self._checkpoint.rows(self.name, start, stop)


class Rows(NamedTuple):
    """n rows of a packed matrix, ready to be put in a layer."""

    codes: Tensor  # (n, K) int8
    scales: Tensor
    offsets: Tensor | None = None  # as scales


class IntMatrix(ABC):
    """W = codes * scales + offsets, with one scale (n, K / group) for `group` neighbouring inputs of a row.

    Codes of up to 4 bits are within -8..7. `order` (K,) lists the inputs in the order in which `rows` gives them, None
    if as they come.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    order: Tensor | None = None
    has_offsets = False

    @abstractmethod
    def rows(self, start: int, stop: int) -> Rows: ...


class Nf4Matrix(ABC):
    """NF4 codes, one absolute maximum for each `block` weights of a row-major walk over W."""

    shape: tuple[int, int]
    block: int

    @abstractmethod
    def rows(self, start: int, stop: int) -> Rows:
        """Codes in 0..15, absolute maxima (n * K / block,) fp32 as scales; whole blocks only."""


class Q8Matrix(ABC):
    """A table on the grid of `llama.q8`: an int8 code for each weight, an fp16 scale for each 32 inputs of a row."""

    shape: tuple[int, int]

    @abstractmethod
    def rows(self, start: int, stop: int) -> Rows:
        """Codes (n, K) int8, scales (n, K / 32) fp16."""


Matrix = DenseMatrix | IntMatrix | Nf4Matrix | Q8Matrix


class Format(Protocol):
    """A way in which linear layers are stored."""

    def matrix(self, module: str, shape: tuple[int, int]) -> Matrix:
        """The weights of a module (`model.layers.0.mlp.up_proj`). Raises ModelError."""


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zero points (N, K / group) uint8 of unsigned codes; None where all are the middle of the range (symmetric)."""

    bits: int
    points: Tensor | None

    @property
    def offset_needed(self) -> bool:
        """Whether code - zero leaves the range that is kept (4 bits in a nibble, 8 in a byte)."""
        return self.points is not None and self.bits in (4, 8)

    def centred(self, start: int, stop: int, codes: Tensor, scales: Tensor) -> Rows:
        """Rows start..stop: unsigned codes (n, K) uint8 and scales (n, K / group) as Rows."""
        if self.points is None or self.offset_needed:
            middle = 2 ** (self.bits - 1)
            signed = (codes ^ 128).view(torch.int8) if self.bits == 8 else codes.view(torch.int8) - middle
            if self.points is None:
                return Rows(signed, scales, None)
            return Rows(signed, scales, (middle - self.points[start:stop].float()) * scales.float())
        points = self.points[start:stop].view(torch.int8)
        group = codes.shape[1] // points.shape[1]
        return Rows(codes.view(torch.int8) - points.repeat_interleave(group, 1), scales, None)


def group_order(module: str, g_idx: Tensor, group: int) -> Tensor | None:
    """The inputs sorted by the group that `g_idx` (K,) gives them, or None if they lie so already.

    Raises BrokenCheckpoint for groups that do not exist, UnsupportedModel for groups of unequal size.
    """
    groups = len(g_idx) // group
    if bool((g_idx < 0).any()) or bool((g_idx >= groups).any()):
        raise BrokenCheckpoint(f"{module}: g_idx names groups outside 0..{groups - 1}")
    plain = torch.arange(len(g_idx), device=g_idx.device) // group
    if torch.equal(g_idx.long(), plain):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), plain):
        raise UnsupportedModel(f"{module}: g_idx makes groups of unequal size; supported: {group} inputs in each")
    return order
