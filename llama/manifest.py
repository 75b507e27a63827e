"""The manifest beside a checkpoint's weights: who the model is and what was done to it.

Written once, at pull or when a checkpoint is compressed, and read by everything that serves or derives; never guessed
from a path. Knows no tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from llama.errors import BrokenCheckpoint
from llama.shards import read_json

FILE = "promptstitch.json"
FORMAT = "promptstitch.manifest.v1"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LEVEL = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Manifest:
    """`base` and `weights` are `sha256:<hex>`; `level` is written canonically (`dense`, `w3g64`, `w4g128-s50`).

    `name` is what people call the model, `source` where its bytes came from. Raises BrokenCheckpoint.
    """

    base: str
    level: str
    weights: str
    name: str
    source: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) or not value:
                raise BrokenCheckpoint(f"{FILE}: {field.name} must be a text, got {value!r}")
        for name in ("base", "weights"):
            if not _DIGEST.fullmatch(getattr(self, name)):
                raise BrokenCheckpoint(f"{FILE}: {name} must be sha256:<64 hex digits>, got {getattr(self, name)!r}")
        if not _LEVEL.fullmatch(self.level):
            raise BrokenCheckpoint(f"{FILE}: level {self.level!r} is not written canonically, such as dense or w3g64")

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest in `directory`; None if there is none. Raises BrokenCheckpoint for any other reading."""
        path = directory / FILE
        if not path.exists():
            return None
        raw = read_json(path)
        expected = {"format", *(field.name for field in fields(cls))}
        if raw.get("format") != FORMAT:
            raise BrokenCheckpoint(f"{path}: format is {raw.get('format')!r}; this version reads {FORMAT}")
        if set(raw) != expected:
            odd = ", ".join(sorted(set(raw) ^ expected))
            raise BrokenCheckpoint(f"{path}: missing or unknown fields: {odd}")
        return cls(**{name: value for name, value in raw.items() if name != "format"})

    def write(self, directory: Path) -> None:
        """Put the manifest into `directory`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")
