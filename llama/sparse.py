"""Sparse weights as tensors: a bitmap of the inputs that are kept, and the kept weights one after another.

Of every `of` neighbouring inputs of a row exactly `keep` stay, so that all rows take the same bytes and any of them can
be read alone. What stays are floats, or codes of a symmetric integer grid whose scales belong to groups of neighbouring
inputs, kept or not. Knows level names and bits; knows no file and no module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.bits import pack_stream, stream_words, unpack_stream
from llama.errors import BrokenCheckpoint, UnsupportedModel

WORD = 64  # inputs whose fate is told by one word of the bitmap
BITS = range(2, 9)

_GRID = re.compile(r"w([2-8])(?:g([1-9][0-9]{0,4}))?")
_SHARE = re.compile(r"s([1-9][0-9]?)")
_PATTERN = re.compile(r"s([1-9][0-9]?)of([1-9][0-9]?)")


@dataclass(frozen=True, slots=True)
class SparseLayout:
    """`keep` of every `of` neighbouring inputs of a row stay. `bits` is None for floats, `group` for whole rows."""

    keep: int
    of: int
    bits: int | None = None
    group: int | None = None

    @classmethod
    def of_level(cls, level: str) -> SparseLayout | None:
        """The layout that a level names (`s50`, `s2of4`, `w4g64-s50`); None if the level is of another kind."""
        first, dash, second = level.partition("-")
        grid, sparse = (_GRID.fullmatch(first), second) if dash else (None, first)
        if (grid is None) == bool(dash):
            return None
        bits, group = (int(grid[1]), int(grid[2] or 0) or None) if grid else (None, None)
        if share := _SHARE.fullmatch(sparse):
            return cls(WORD - round(WORD * int(share[1]) / 100), WORD, bits, group)
        if pattern := _PATTERN.fullmatch(sparse):
            keep, of = int(pattern[1]), int(pattern[2])
            return cls(keep, of, bits, group) if keep < of and WORD % of == 0 else None
        return None

    def kept(self, inputs: int) -> int:
        """Weights that stay of a row."""
        return inputs * self.keep // self.of

    def width(self, inputs: int) -> int:
        """Inputs that share a scale."""
        return self.group or inputs

    def shapes(self, n: int, k: int) -> dict[str, tuple[int, int]]:
        """What `pack` makes of a layer (N, K). Raises UnsupportedModel if K cannot be cut that way."""
        if k % WORD or k % self.width(k):
            raise UnsupportedModel(f"{k} inputs cannot be cut into words of {WORD} and groups of {self.width(k)}")
        left = self.kept(k) if self.bits is None else stream_words(self.kept(k), self.bits)
        scales = {} if self.bits is None else {"weight_scale": (n, k // self.width(k))}
        return {"weight": (n, left), "weight_kept": (n, k // WORD), **scales}

    def pack(self, values: Tensor, kept: Tensor, scales: Tensor | None = None) -> dict[str, Tensor]:
        """Weights (N, K) float, or codes (N, K) int8 with scales (N, K / group), as stored; kept (N, K) bool.

        `weight_kept` (N, K / 64) int64 holds input 64 j + i in bit i of word j. `weight` (N, kept) holds floats in the
        dtype given, or (N, words) int32 a stream of code + 2**(bits - 1), least significant bits first.
        Raises ValueError for what does not keep to the layout, UnsupportedModel.
        """
        shapes = self.shapes(*kept.shape)
        if not self._holds(kept) or bool(values[~kept].count_nonzero()):
            raise ValueError(f"{self.keep} of every {self.of} inputs must be kept, and nothing else be there")
        bitmap = {"weight_kept": pack_stream(kept.to(torch.uint8), 1).view(torch.int64)}
        left = values[kept].view(len(kept), -1)
        if self.bits is None:
            return {"weight": left, **bitmap}
        if scales is None or scales.shape != shapes["weight_scale"]:
            raise ValueError(f"codes need scales {shapes['weight_scale']}")
        half = 2 ** (self.bits - 1)
        if int(left.min()) < -half or int(left.max()) >= half:
            raise ValueError(f"a code does not fit {self.bits} bits")
        stored = (left.to(torch.int16) + half).to(torch.uint8)
        return {"weight": pack_stream(stored, self.bits), **bitmap, "weight_scale": scales}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Any rows of what `pack` made → floats as stored, or codes int8, (n, K) with zeros where nothing was kept.

        Raises BrokenCheckpoint if the bitmap keeps another number than the layout.
        """
        kept = self._bitmap(tensors["weight_kept"])
        left = tensors["weight"]
        if self.bits is not None:
            stored = unpack_stream(left, self.bits, self.kept(kept.shape[1]))
            half = 2 ** (self.bits - 1)
            left = (stored ^ half).view(torch.int8) if self.bits == 8 else stored.view(torch.int8) - half
        return left.new_zeros(kept.shape).masked_scatter_(kept, left)

    def _bitmap(self, words: Tensor) -> Tensor:
        """Words (n, K / 64) int64 → (n, K) bool."""
        bits = unpack_stream(words.contiguous().view(torch.int32), 1, words.shape[1] * WORD)
        kept = bits.contiguous().view(torch.bool)
        if not self._holds(kept):
            raise BrokenCheckpoint(f"the bitmap does not keep just {self.keep} of every {self.of} inputs")
        return kept

    def _holds(self, kept: Tensor) -> bool:
        counts = kept.view(-1, self.of).sum(-1)
        return bool((counts == self.keep).all())
