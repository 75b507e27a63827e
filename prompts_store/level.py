"""Compression levels: their canonical names and the bits per weight that a name stands for.

A name is a quantisation, a sparsity, or both joined by `-`:

    dense
    int8 | nf4 | w<bits>[g<group>]     w4g128: 4 bit, one scale for 128 weights; w8: one scale for a row
    s<percent> | s<keep>of<of>         s50: half of the weights are zero; s2of4: two of every four stay

The bits are nominal (scales counted, masks and embeddings not): they order levels, they do not weigh a file.
Knows no model and no method: two methods that give `w4g128` give one level.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prompts_store.errors import BadLevel

DENSE_BITS = 16.0
SCALE_BITS = 16  # one fp16 scale for each group
NAMED_BITS = {"int8": 8.0, "nf4": 4.5}  # nf4: 4 bit and an fp32 absmax for 64 weights
_GROUPED = re.compile(r"w0*([2-8])(?:g0*([1-9][0-9]{0,4}))?")
_SPARSE = re.compile(r"s(?:0*([1-9]?[0-9])|0*([1-9][0-9]?)of0*([1-9][0-9]?))")
WORD = 64  # weights; a pattern's length divides it
_SPELLINGS = dict.fromkeys(("fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "none"), "dense")
_SPELLINGS |= {"llm.int8": "int8", "2:4": "s2of4", "2of4": "s2of4"}
_EXAMPLES = "dense, int8, nf4, w4g128, w3g64, s50, w4g128-s50, w4g128-s2of4"


@dataclass(frozen=True, slots=True)
class Level:
    """A level as read: `quant` is None or canonical (`w4g128`), `sparsity` the share of weights that are zero."""

    quant: str | None
    sparsity: float
    pattern: str | None  # 2of4
    quant_bits: float

    @property
    def bits(self) -> float:
        """Nominal bits per weight."""
        return self.quant_bits * (1.0 - self.sparsity)

    def __str__(self) -> str:
        sparse = f"s{self.pattern or round(self.sparsity * 100)}" if self.sparsity else None
        return "-".join(part for part in (self.quant, sparse) if part) or "dense"


def parse_level(name: str) -> Level:
    """The level of a canonical name. Raises BadLevel, naming the canonical form where one is meant."""
    level = _read(name)
    if str(level) != name:
        raise BadLevel(f"level {name!r} is written {str(level)!r}", canonical=str(level))
    return level


def bits_per_weight(name: str) -> float:
    """Nominal bits per weight of a canonical name. Raises BadLevel."""
    return parse_level(name).bits


def _read(name: str) -> Level:
    """A name read leniently: any case, order, separator, leading zeros."""
    quant, quant_bits, sparsity, pattern = None, DENSE_BITS, 0.0, None
    seen: set[str] = set()
    for spelt in re.split(r"[-_+,]", name.lower()) if len(name) <= 64 else ():
        part = _SPELLINGS.get(spelt, spelt)
        if (sparse := _SPARSE.fullmatch(part)) and sparse[1]:
            slot, sparsity = "sparsity", int(sparse[1]) / 100
        elif sparse and int(sparse[2]) < int(sparse[3]) and WORD % int(sparse[3]) == 0:
            slot, keep, of = "sparsity", int(sparse[2]), int(sparse[3])
            sparsity, pattern = 1.0 - keep / of, f"{keep}of{of}"
        elif grouped := _GROUPED.fullmatch(part):
            slot, bits, group = "quant", int(grouped[1]), grouped[2]
            quant = f"w{bits}g{group}" if group else f"w{bits}"
            quant_bits = bits + (SCALE_BITS / int(group) if group else 0.0)
        elif part in NAMED_BITS:
            slot, quant, quant_bits = "quant", part, NAMED_BITS[part]
        elif part == "dense":
            slot = "dense"
        else:
            raise BadLevel(f"{_shown(name)} is no compression level; choose one such as {_EXAMPLES}")
        if slot in seen:
            raise BadLevel(f"{_shown(name)} names two of one thing; levels look like {_EXAMPLES}")
        seen.add(slot)
    if not seen:
        raise BadLevel(f"{_shown(name)} is no compression level; levels look like {_EXAMPLES}")
    return Level(quant, sparsity, pattern, quant_bits)


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 64 else name[:64] + "…")
