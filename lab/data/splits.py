"""Which documents calibrate, teach, select and report: four parts that share no site and no run of 13 words.

A site's part is a hash of its name, so it stays when documents come or go; a document of no site goes by a hash of its
words, wherever it stands. Only where so few would leave a part empty does it get the one whose hash is nearest. One
manifest holds what was dealt; whoever takes up old figures checks the data against it. Knows documents; knows no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

from lab.data.documents import DataError, Document, digest, normalised
from lab.disk import write_json

Part = Literal["report", "select", "learn", "calibration"]

FORMAT = "promptstitch.splits.v1"
# Of all sites. In this order documents that overlap are kept: what is reported on loses nothing to what is learned.
SHARES: Mapping[Part, float] = {"report": 0.14, "select": 0.085, "learn": 0.675, "calibration": 0.1}
LEARNING: tuple[Part, ...] = ("report", "select", "learn")
GRAM = 13  # words, as GPT-3's authors checked their data for contamination
COMMON = (4, 0.25)  # documents, and their share: what more of them hold is the form they are written in, no overlap
PIECE = 2000  # characters of a text that is alone, and has to be dealt out itself


@dataclass(frozen=True)
class Splits:
    """The parts, each in the order of the data; `dropped`: documents left out of a part for an overlap with another.

    `data` is the digest of all documents that were dealt; of `one_site`, they were dealt each by itself.
    """

    parts: Mapping[Part, tuple[Document, ...]]
    dropped: Mapping[Part, int]
    data: str
    one_site: bool = False

    def manifest(self) -> dict[str, Any]:
        """What is written down: how it was dealt, and digests of what came out."""
        parts = {
            name: {
                "documents": len(documents),
                "domains": 1 if self.one_site else len({document.domain for document in documents}),
                "dropped": self.dropped[name],
                "digest": digest(documents),
            }
            for name, documents in self.parts.items()
        }
        return {"format": FORMAT, "data": self.data, "gram": GRAM, "shares": dict(SHARES), "parts": parts}


def split(documents: Sequence[Document], *needed: Part) -> Splits:
    """Deal the documents out; a single text is dealt out in pieces. Raises DataError where a part that is needed
    remains empty; without any named, those that learning needs."""
    each = _pieces(documents[0]) if len(documents) == 1 else documents
    sites = _dealt({document.domain for document in each})
    one_site = len(sites) == 1
    if one_site:  # then that says nothing, and documents go by themselves
        each = [replace(document, domain=document.content) for document in each]
        sites = _dealt({document.domain for document in each})
    marks = _marks(each)
    taken: set[bytes] = set()
    kept: dict[Part, tuple[Document, ...]] = {}
    dropped: dict[Part, int] = {}
    for part in SHARES:
        candidates = [
            (document, found) for document, found in zip(each, marks, strict=True) if sites[document.domain] == part
        ]
        clean = [(document, found) for document, found in candidates if found.isdisjoint(taken)]
        kept[part], dropped[part] = tuple(document for document, _ in clean), len(candidates) - len(clean)
        taken = taken.union(*(found for _, found in clean))
    if empty := [part for part in SHARES if part in (needed or LEARNING) and not kept[part]]:
        why = f"{dropped[empty[0]]} share {GRAM} words in a row with another part; " if dropped[empty[0]] else ""
        raise DataError(
            f"{len(each)} documents of {len(sites)} sites leave nothing for the part {empty[0]}: {why}"
            "give more documents that differ"
        )
    return Splits(kept, dropped, digest(documents), one_site and len(each) > 1)


def apart(found: Iterable[Document], learned: Iterable[Document]) -> tuple[Document, ...]:
    """Those of other data that share no run of 13 words with what was learned from, but for the form of that."""
    taken = set[bytes]().union(*_marks(tuple(learned)))
    return tuple(
        document for document in found if taken.isdisjoint({*grams(document.words), document.content.encode()})
    )


def part_of(domain: str) -> Part:
    """The part that everything from this site belongs to."""
    at = _place(domain)
    for part, (_, end) in _ranges().items():
        if at < end:
            return part
    return "calibration"  # the shares' sum may round to a little less than 1


def grams(text: str) -> Iterator[bytes]:
    """A digest of each run of GRAM words, whatever their case and what stands between them; of fewer, of all."""
    words = normalised(text)
    for start in range(max(len(words) - GRAM, 0) + 1 if words else 0):
        yield hashlib.blake2b(" ".join(words[start : start + GRAM]).encode(), digest_size=8).digest()


def _marks(documents: Sequence[Document]) -> list[set[bytes]]:
    """What overlaps of each are told by: its runs of words but for the form that most are written in, and all of it."""
    found = [set(grams(document.words)) for document in documents]
    counts = Counter(gram for each in found if len(each) > 1 for gram in each)
    common = {gram for gram, count in counts.items() if count > max(COMMON[0], COMMON[1] * len(documents))}
    return [(each - common) | {doc.content.encode()} for each, doc in zip(found, documents, strict=True)]


def record(splits: Splits, path: Path) -> None:
    """Write the manifest, or check that these are the splits of the one that is there. Raises DataError, RunError."""
    manifest = splits.manifest()
    if not path.exists():
        return write_json(path, manifest)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no manifest of splits ({error}); move it away") from error
    if before != manifest:
        raise DataError(
            f"{path} holds the splits of other data ({_data(before)}, now {splits.data}); figures of both do not "
            "compare: give the same data, or start in another folder"
        )
    return None


def _place(domain: str) -> float:
    """From 0 to 1."""
    return int.from_bytes(hashlib.sha256(f"{FORMAT} {domain}".encode()).digest()[:8], "big") / 2**64


def _ranges() -> dict[Part, tuple[float, float]]:
    """The places of a part."""
    ends = list(accumulate(SHARES.values()))
    return dict(zip(SHARES, pairwise([0.0, *ends]), strict=True))


def _dealt(domains: Collection[str]) -> dict[str, Part]:
    """The part of each, none empty if there are enough: an empty one gets the nearest of a part that can spare one."""
    dealt = {domain: part_of(domain) for domain in sorted(domains)}
    for part, (start, end) in _ranges().items():
        counts = Counter(dealt.values())
        spare = [domain for domain, given in dealt.items() if counts[given] > 1]
        if not counts[part] and spare:
            dealt[min(spare, key=lambda domain: abs(_place(domain) - (start + end) / 2))] = part
    return dealt


def _pieces(document: Document) -> list[Document]:
    """A text in pieces that end with a line, or, where a line is longer than a piece, with a word."""
    if document.text is None or document.completion is not None:
        return [document]
    pieces = [""]
    for line in document.text.splitlines(keepends=True):
        for part in [line] if len(line) <= PIECE else re.findall(r"\S*\s*", line):
            if len(pieces[-1]) >= PIECE:
                pieces.append("")
            pieces[-1] += part
    return [Document(f"{document.id}#{number}", text=text) for number, text in enumerate(pieces)]


def _data(manifest: Any) -> str:
    return str(manifest.get("data")) if isinstance(manifest, dict) else "none"
