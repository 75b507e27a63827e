"""Where a prompt comes from, and how that is written in the metadata of a file. Knows no tensors.

Every value is of a grammar of its own, so that what was read can always be written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prompts_store.errors import BadLevel, BadReference, InvalidArtifact
from prompts_store.golden import Golden
from prompts_store.level import parse_level
from prompts_store.reference import check_task, is_digest
from prompts_store.strict_json import dump, load_object

MAX_TRAIN_BYTES = 16 * 1024
FIELDS = ("task", "level", "weights", "train", "created", "golden")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a prompt comes from; no part of its identity.

    `level` it was learned at, `weights` (digest) it was learned through, `train` the recipe (JSON of at most 16 KiB),
    `created` an ISO 8601 time, `golden` its self-test on `weights`. Raises InvalidArtifact, naming the field.
    """

    task: str | None = None
    level: str | None = None
    weights: str | None = None
    train: Mapping[str, Any] | None = None
    created: str | None = None
    golden: Golden | None = None

    def __post_init__(self) -> None:
        try:
            if self.task is not None:
                check_task(self.task)
            if self.level is not None:
                parse_level(self.level)
        except (BadReference, BadLevel) as error:
            raise bad_metadata("invalid_metadata", error.field or "task", f"is wrong: {error.message}") from None
        if self.weights is not None and not is_digest(self.weights):
            raise bad_metadata("invalid_metadata", "weights", "must be sha256: and 64 hex digits")
        if self.created is not None and not _is_time(self.created):
            raise bad_metadata("invalid_metadata", "created", "must be an ISO 8601 time")
        if self.train is not None:
            _read_train(_train_text(self.train))

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Provenance:
        """From the metadata of a file. Raises InvalidArtifact."""
        values: dict[str, Any] = {name: metadata[name] for name in FIELDS if name in metadata}
        if "train" in values:
            values["train"] = _read_train(values["train"])
        if "golden" in values:
            values["golden"] = Golden.parse(values["golden"])
        return cls(**values)

    def metadata(self) -> dict[str, str]:
        """For a file; fields that are not known are left out."""
        train = None if self.train is None else _train_text(self.train)
        golden = None if self.golden is None else self.golden.text()
        values = (self.task, self.level, self.weights, train, self.created, golden)
        return {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}


def bad_metadata(code: str, key: str, what: str) -> InvalidArtifact:
    """The refusal of a file for one key of its metadata."""
    return InvalidArtifact(code, f"metadata {key[:64]!a} {what}", key[:64])


def _read_train(text: str) -> Mapping[str, Any]:
    if len(text.encode()) > MAX_TRAIN_BYTES:
        raise bad_metadata("invalid_metadata", "train", f"has more than {MAX_TRAIN_BYTES} bytes")
    return load_object(text.encode(), field="train", code="invalid_metadata")


def _train_text(train: Mapping[str, Any]) -> str:
    try:
        return dump(dict(train))
    except (TypeError, ValueError) as error:
        raise bad_metadata("invalid_metadata", "train", f"is no JSON: {error}") from None


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return text.isascii() and len(text) <= 40
