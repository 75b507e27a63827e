"""What a level name asks for: an integer grid, a share of weights that go, or both.

`w4g64` is 4 bits with a scale for each 64 inputs of a row, `w4` with one for the whole row; `s50` drops half of the
weights, `s2of4` keeps 2 of every 4; `w4g64-s50` does both. Knows names and widths; knows no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llama.bits import stream_words
from llama.errors import UnsupportedModel
from llama.rtn import BITS

STRIDE = 64  # of every 64 neighbouring inputs of a row the same number is kept: sparse rows take equal bytes
GROUPS = (128, 64, 32)
SPREAD, FINE = 16, 4  # how far a layer's share may be from the level's, and in steps of what
EXAMPLES = "w4g64, w3g64, w4, s50, s2of4, w4g64-s50"

_GRID = re.compile(r"w([0-9]+)(?:g([1-9][0-9]*))?")
_SHARE = re.compile(r"s([1-9][0-9]?)")
_PATTERN = re.compile(r"s([1-9][0-9]*)of([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Bits:
    """Integers of `bits` bits, one scale for `group` neighbouring inputs of a row; None: for the whole row."""

    bits: int
    group: int | None

    def width(self, inputs: int) -> int:
        """The group in a layer of so many inputs."""
        return self.group or inputs


@dataclass(frozen=True, slots=True)
class Sparsity:
    """`keep` of every `of` neighbouring inputs of a row stay."""

    keep: int
    of: int


@dataclass(frozen=True, slots=True)
class Level:
    """A level as it is written, and what it means. At least one of `grid` and `sparsity` is there."""

    name: str
    grid: Bits | None
    sparsity: Sparsity | None

    @classmethod
    def parse(cls, name: str) -> Level:
        """Raises UnsupportedModel for a name that is not written canonically, or of a level that cannot be made."""
        first, dash, second = name.partition("-")
        grid = _grid(first)
        sparsity = _sparsity(second if grid else name)
        if (dash and not sparsity) or not (grid or sparsity):
            raise UnsupportedModel(f"level {name!r} is none that can be made; such as: {EXAMPLES}")
        return cls(name, grid, sparsity)

    def row_bytes(self, inputs: int) -> int:
        """Of a row's codes, or 16-bit weights; scales and bitmaps, the same at all `alternatives`, are left out."""
        kept = inputs * self.sparsity.keep // self.sparsity.of if self.sparsity else inputs
        return 4 * stream_words(kept, self.grid.bits) if self.grid else 2 * kept

    def alternatives(self) -> list[Level]:
        """What single layers may have in its place, of the same layout: other bits, or more and fewer weights kept.

        The level itself is among them. Raises UnsupportedModel for N of M, which is the same in every layer.
        """
        if self.sparsity is None:
            assert self.grid is not None
            return [replace(self, grid=replace(self.grid, bits=bits)) for bits in sorted(BITS)]
        if self.sparsity.of != STRIDE:
            raise UnsupportedModel(
                f"level {self.name} keeps as many weights in every layer; choose --allocation uniform"
            )
        kept = range(self.sparsity.keep - SPREAD, self.sparsity.keep + SPREAD + 1, FINE)
        return [replace(self, sparsity=Sparsity(keep, STRIDE)) for keep in kept if 0 < keep < STRIDE]

    def check(self, widths: Mapping[str, int]) -> None:
        """Raise UnsupportedModel, naming a level that would fit, unless groups divide the inputs of every layer."""
        for layer, inputs in widths.items():
            if self.grid and self.grid.group and inputs % self.grid.group:
                fitting = [g for g in GROUPS if not any(width % g for width in widths.values())]
                other = f"w{self.grid.bits}" + (f"g{fitting[0]}" if fitting else "")
                instead = self.name.replace(self.name.partition("-")[0], other, 1)
                raise UnsupportedModel(
                    f"level {self.name}: the {inputs} inputs of {layer} cannot be cut into groups of "
                    f"{self.grid.group}; {instead} would fit"
                )
            if self.sparsity and inputs % STRIDE:
                raise UnsupportedModel(
                    f"level {self.name}: the {inputs} inputs of {layer} cannot be cut into pieces of {STRIDE}, as "
                    "sparse rows are stored; choose a level without sparsity"
                )


def _grid(text: str) -> Bits | None:
    match = _GRID.fullmatch(text)
    if match is None:
        return None
    bits, group = int(match[1]), int(match[2]) if match[2] else None
    if bits not in BITS or group not in (None, *GROUPS):
        raise UnsupportedModel(
            f"{text} is no grid that is made: bits are one of {', '.join(map(str, BITS))}, groups one of "
            f"{', '.join(map(str, GROUPS))} or, left out, the whole row"
        )
    return Bits(bits, group)


def _sparsity(text: str) -> Sparsity | None:
    if match := _SHARE.fullmatch(text):
        return Sparsity(STRIDE - round(STRIDE * int(match[1]) / 100), STRIDE)
    if match := _PATTERN.fullmatch(text):
        keep, of = int(match[1]), int(match[2])
        if keep >= of or of > STRIDE or STRIDE % of:
            raise UnsupportedModel(f"{text}: N of M needs N below M, and M a divisor of {STRIDE}")
        return Sparsity(keep, of)
    return None
