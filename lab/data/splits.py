"""Which documents calibrate, teach, select and report: four parts that share no site and no run of 13 words.

A site's part is a hash of its name, so it never changes when documents come or go. One manifest holds what was dealt;
whoever takes up old figures checks the data against it. Knows documents; knows no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.data.documents import DataError, Document, digest
from lab.disk import write_json

Part = Literal["report", "select", "learn", "calibration"]

FORMAT = "promptstitch.splits.v1"
# Of all sites. In this order documents that overlap are kept: what is reported on loses nothing to what is learned.
SHARES: Mapping[Part, float] = {"report": 0.14, "select": 0.085, "learn": 0.675, "calibration": 0.1}
GRAM = 13  # words, as GPT-3's authors checked their data for contamination


@dataclass(frozen=True)
class Splits:
    """The parts, each in the order of the data; `dropped`: documents left out of a part for an overlap with another.

    `data` is the digest of all documents that were dealt.
    """

    parts: Mapping[Part, tuple[Document, ...]]
    dropped: Mapping[Part, int]
    data: str

    def manifest(self) -> dict[str, Any]:
        """What is written down: how it was dealt, and digests of what came out."""
        parts = {
            name: {
                "documents": len(documents),
                "domains": len({document.domain for document in documents}),
                "dropped": self.dropped[name],
                "digest": digest(documents),
            }
            for name, documents in self.parts.items()
        }
        return {"format": FORMAT, "data": self.data, "gram": GRAM, "shares": dict(SHARES), "parts": parts}


def split(documents: Sequence[Document]) -> Splits:
    """Deal the documents out. Raises DataError where a part remains empty."""
    dealt: dict[Part, list[Document]] = {part: [] for part in SHARES}
    for document in documents:
        dealt[part_of(document.domain)].append(document)
    taken: set[bytes] = set()
    kept: dict[Part, tuple[Document, ...]] = {}
    for part, candidates in dealt.items():
        found = [(document, set(grams(document.words))) for document in candidates]
        clean = [(document, own) for document, own in found if own.isdisjoint(taken)]
        kept[part] = tuple(document for document, _ in clean)
        taken = taken.union(*(own for _, own in clean))
    if empty := [part for part, each in kept.items() if not each]:
        raise DataError(
            f"{len(documents)} documents of {len({d.domain for d in documents})} sites leave nothing for the part "
            f"{empty[0]}; give more documents, of more sites"
        )
    dropped = {part: len(dealt[part]) - len(kept[part]) for part in SHARES}
    return Splits(kept, dropped, digest(documents))


def part_of(domain: str) -> Part:
    """The part that everything from this site belongs to."""
    at = int.from_bytes(hashlib.sha256(f"{FORMAT} {domain}".encode()).digest()[:8], "big") / 2**64
    for part, share in SHARES.items():
        at -= share
        if at < 0:
            return part
    return "calibration"  # the shares' sum may round to a little less than 1


def grams(text: str) -> Iterator[bytes]:
    """A digest of each run of GRAM words, whatever their case and what stands between them."""
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - GRAM + 1):
        yield hashlib.blake2b(" ".join(words[start : start + GRAM]).encode(), digest_size=8).digest()


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


def _data(manifest: Any) -> str:
    return str(manifest.get("data")) if isinstance(manifest, dict) else "none"
