"""The registry: soft prompts by task and version in a database and a blob store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from prompts_store.file import PromptFile
from prompts_store.prompt import SoftPrompt
from prompts_store.records import (
    LOCAL,
    Actor,
    Alias,
    ApiKey,
    AuditEntry,
    Measurement,
    Page,
    RecordedMeasurement,
    Scope,
    StoreStats,
    TaskSummary,
    Version,
)
from prompts_store.resolution import Query, Resolution, Served


class Versions:
    def get(self, task: str, version: int) -> Version:
        """A live version. Raises NotFound, Gone."""
        raise NotImplementedError

    def list(
        self,
        task: str,
        *,
        limit: int = 100,
        after: str | None = None,
        level: str | None = None,
        base: str | None = None,
    ) -> Page[Version]:
        """Live versions, oldest first; `after` is a version number. Raises NotFound for a task never seen."""
        raise NotImplementedError

    def tasks(
        self, *, limit: int = 100, after: str | None = None, level: str | None = None, base: str | None = None
    ) -> Page[TaskSummary]:
        """Tasks with live versions, by name; `after` is a task name."""
        raise NotImplementedError


class Aliases:
    def get(self, task: str, name: str, *, base: str, level: str) -> Alias:
        """Raises NotFound."""
        raise NotImplementedError

    def list(
        self,
        task: str | None = None,
        *,
        limit: int = 100,
        after: str | None = None,
        base: str | None = None,
        level: str | None = None,
    ) -> Page[Alias]: ...

    def put(
        self, task: str, name: str, version: int, *, expected: str | None = None, by: Actor = LOCAL
    ) -> tuple[Alias, bool]:
        """Point the alias, at the version's base and level, to the version; True: it is new.

        `expected`: the revision that it is moved from, or "*" for any. The version it points to already needs none.
        Raises NotFound, Gone, PreconditionRequired, PreconditionFailed.
        """
        raise NotImplementedError

    def delete(
        self, task: str, name: str, *, base: str, level: str, expected: str | None = None, by: Actor = LOCAL
    ) -> None:
        """Raises NotFound, PreconditionFailed."""


class Measurements:
    def add(self, task: str, version: int, measurement: Measurement, *, by: Actor = LOCAL) -> RecordedMeasurement:
        """Raises BadMeasurement, BadLevel, NotFound, Gone."""
        raise NotImplementedError

    def list(self, task: str, version: int, *, limit: int = 100, after: str | None = None) -> Page[RecordedMeasurement]:
        """Oldest first; `after` is an id. Raises NotFound, Gone."""
        raise NotImplementedError


class ApiKeys:
    def create(self, name: str, scopes: frozenset[Scope], *, by: Actor = LOCAL) -> tuple[ApiKey, str]:
        """The key and its secret (`ps_…`), which is told this once. Raises BadKey."""
        raise NotImplementedError

    def list(self, *, limit: int = 100, after: str | None = None) -> Page[ApiKey]: ...
    def revoke(self, key_id: str, *, by: Actor = LOCAL) -> None:
        """Raises NotFound."""

    def lookup(self, secret: str) -> ApiKey | None:
        """The live key of this secret, of whatever namespace, or None."""
        raise NotImplementedError

    def any(self) -> bool:
        """Whether a live key exists."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Begun:
    """`replay` carries the first answer's status and body."""

    state: Literal["new", "replay", "in_progress", "mismatch"]
    status: int | None = None
    body: str | None = None


class Idempotency:
    def begin(self, key: str, fingerprint: str) -> Begun:
        """Claim `key` (at most 512 characters) for a request whose body has this fingerprint."""
        raise NotImplementedError

    def complete(self, key: str, status: int, body: str) -> None:
        """Remember the answer for 24 h."""

    def forget(self, key: str) -> None:
        """Let the key be tried again: the request failed on our side."""


class AuditLog:
    def list(self, *, limit: int = 100, after: str | None = None) -> Page[AuditEntry]:
        """Oldest first; `after` is an id."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Resolved:
    """`version` is None exactly where resolution.how is "none"."""

    version: Version | None
    resolution: Resolution


class PromptStore:
    versions: Versions
    aliases: Aliases
    measurements: Measurements
    keys: ApiKeys
    idempotency: Idempotency
    audit: AuditLog
    namespace: str

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        blobs: Path | None = None,
        namespace: str = "default",
        clock: Callable[[], datetime] | None = None,
    ) -> PromptStore:
        """`location`: a directory, or an SQLAlchemy URL with a `blobs` directory beside it.

        Raises StoreLocked, SchemaTooNew, StorageFull.
        """
        raise NotImplementedError

    def push(self, file: PromptFile, task: str, level: str | None = None, *, by: Actor = LOCAL) -> tuple[Version, bool]:
        """Durable on return. True: a new version; False: this (task, level, digest) already is one.

        `level` is used where the file names none. Raises InvalidArtifact, BadReference, BadLevel, StorageFull.
        """
        raise NotImplementedError

    def delete(self, task: str, version: int, *, by: Actor = LOCAL) -> None:
        """Tombstone. Raises NotFound (also if deleted already), Conflict while an alias points to it."""
        raise NotImplementedError

    def load(self, digest: str) -> SoftPrompt:
        """The prompt of a live version, verified. Raises NotFound, Gone, CorruptBlob."""
        raise NotImplementedError

    def content(self, task: str, version: int) -> bytes:
        """The version as a file, provenance included; canonical. Raises NotFound, Gone, CorruptBlob."""
        raise NotImplementedError

    def resolve(self, query: Query, served: Served) -> Resolved:
        """Raises NotFound, Unresolved, Gone, WrongBase, BadLevel."""
        raise NotImplementedError

    def seed(self, file: PromptFile, task: str, level: str | None = None) -> Version | None:
        """Push into a store that never held a version; None where it did."""
        raise NotImplementedError

    def stats(self) -> StoreStats:
        raise NotImplementedError

    def check(self) -> None:
        """Raises StoreError if the database does not answer."""

    def close(self) -> None:
        """Release the lock."""

    def __enter__(self) -> PromptStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
