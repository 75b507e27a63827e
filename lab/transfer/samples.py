"""What is scored: windows of one data set and split, once for each place that a prompt's layout gives a BOS.

Windows of all layouts hold the same text tokens, so that their losses are paired whatever stands in front. Knows
documents and a tokenizer; knows no model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lab.data.documents import DataError, Document, digest
from lab.data.named import documents
from lab.data.splits import split
from lab.data.windows import Tokenizer, Windows, cut
from prompts_store.prompt import Bos

Split = Literal["select", "report"]
SPLITS: tuple[Split, ...] = get_args(Split)
UNPROMPTED: Bos = "tokenizer"  # what a text gets that is served without a prompt


@dataclass(frozen=True)
class Sample:
    """W windows of a split of a data set. `layouts` holds them by the place of a BOS; `order` (W,) int64 says in which
    order they are scored, so that any first part of them is a fair sample.
    """

    data: str
    split: Split
    layouts: Mapping[Bos, Windows]
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def rows(self, start: int, end: int, bos: Bos) -> Windows:
        """Windows number `start` to `end` of the order, in a layout."""
        return self.layouts[bos].select(self.order[start:end])

    def first(self, n: int) -> tuple[Windows, Tensor]:
        """The first n of the order as they stand in the data, without a BOS, and the places that they have in the
        order. The digest of these windows is that of the data that was scored, in every layout."""
        places = self.order[:n].argsort()
        return self.layouts["none"].select(self.order[:n][places]), places


def parts(name: str, root: Path | None = None, learned: Collection[str] = ()) -> dict[Split, Sequence[Document]]:
    """The documents to select and to report on: `NAME` dealt out by site, or all of it for one: `NAME:report`, which
    must not be data that was dealt out to learn from (digests).

    Raises DataError.
    """
    given, _, whole = name.rpartition(":")
    for one in SPLITS:
        if given and whole == one:
            found = documents(given, root)
            if digest(found) in learned:
                raise DataError(
                    f"{name} is what a prompt was learned from: give {given}, of which that part is left out"
                )
            return {one: found}
    try:
        dealt = split(documents(name, root), *SPLITS).parts
    except DataError as error:
        raise DataError(f"{error}; or say what all of it is for: {name}:report, {name}:select") from error
    return {one: dealt[one] for one in SPLITS}


def samples(
    names: Sequence[str],
    root: Path | None,
    tokenizer: Tokenizer,
    length: int,
    layouts: Iterable[Bos],
    most: int | None,
    learned: Collection[str] = (),
) -> list[Sample]:
    """Those of all data sets, each once; `learned` as for `parts`. Raises DataError."""
    bos = set(layouts)
    drawn = [
        sample(name.removesuffix(f":{part}"), part, found, tokenizer, length, bos, most=most)
        for name in dict.fromkeys(names)
        for part, found in parts(name, root, learned).items()
    ]
    if len({(each.data, each.split) for each in drawn}) < len(drawn):
        raise DataError("--data names one split of the same data twice; give it once")
    return drawn


def sample(
    data: str,
    part: Split,
    found: Sequence[Document],
    tokenizer: Tokenizer,
    length: int,
    layouts: Iterable[Bos],
    *,
    most: int | None = None,
) -> Sample:
    """Windows of `length` text tokens, at most `most` of them, drawn by lot, the same every time. Raises DataError."""
    plain = cut(found, tokenizer, length, bos="none")
    cuts: dict[Bos, Windows] = {"none": plain}
    for bos in {*layouts, UNPROMPTED} - {"none"}:
        cuts[bos] = cut(found, tokenizer, length, bos=bos)
        if not _same_tokens(plain, cuts[bos]):
            raise DataError(
                f"{data}: in layout {bos} the tokenizer gives other text tokens, so that losses do not compare"
            )
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))
    return Sample(data, part, cuts, order[:most])


def _same_tokens(one: Windows, other: Windows) -> bool:
    return torch.equal(one.document, other.document) and torch.equal(one.ids[one.scored], other.ids[other.scored])
