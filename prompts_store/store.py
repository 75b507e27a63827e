"""The registry: soft prompts by (base, task, level), in a database and a blob store.

What crosses both is here: a push writes the bytes first and then the row, a delete the row first and then the bytes, so
that a crash leaves bytes too many and never one too few; opening the store removes those. Knows no model and no HTTP.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, func, select
from sqlalchemy.orm import Session

from prompts_store import catalogue
from prompts_store.aliases import Aliases, names_of
from prompts_store.audit import AuditLog
from prompts_store.blobs import Blobs, LocalBlobs
from prompts_store.database import Clock, Database, insert, utc_now
from prompts_store.errors import Conflict, CorruptBlob, Gone, InvalidArtifact, NotFound, StoreError
from prompts_store.file import PromptFile, Provenance, encode_prompt, read_prompt
from prompts_store.idempotency import Idempotency
from prompts_store.keys import ApiKeys
from prompts_store.level import parse_level
from prompts_store.measurements import Measurements
from prompts_store.prompt import SoftPrompt
from prompts_store.records import LOCAL, Actor, StoreStats, Version
from prompts_store.reference import check_task
from prompts_store.resolution import Query, Resolution, Served, resolve
from prompts_store.tables import PromptRow, VersionRow
from prompts_store.versions import Versions, as_version, find_live, is_known, live_row, next_number

SEEDER = Actor("seed")
_LIVE = PromptRow.versions.any(VersionRow.live == 1)


@dataclass(frozen=True, slots=True)
class Resolved:
    """`version` is None exactly where `resolution.how` is "none"."""

    version: Version | None
    resolution: Resolution


class PromptStore:
    """One namespace of a registry. Thread-safe; every change is durable when its call returns.

    The parts: `versions`, `aliases`, `measurements`, `keys`, `idempotency`, `audit`.
    """

    def __init__(self, database: Database, blobs: Blobs, namespace: str = "default", clock: Clock = utc_now) -> None:
        """`blobs` is held by this process alone and `database` is migrated. Removes what a crash left behind."""
        self.namespace = namespace
        self.versions = Versions(database, namespace, clock)
        self.aliases = Aliases(database, namespace, clock)
        self.measurements = Measurements(database, namespace, clock)
        self.keys = ApiKeys(database, namespace, clock)
        self.idempotency = Idempotency(database, namespace, clock)
        self.audit = AuditLog(database, namespace, clock)
        self._database = database
        self._blobs = blobs
        self._counting = threading.Lock()
        self._integrity_failures = 0
        self.idempotency.recover()
        with database.read() as session:
            needed = set(session.scalars(select(PromptRow.blob).where(_LIVE)))
        self._orphans_removed = blobs.sweep(needed)

    @classmethod
    def open(
        cls, location: str | Path, *, blobs: Path | None = None, namespace: str = "default", clock: Clock = utc_now
    ) -> PromptStore:
        """`location` is a directory, made where it is missing, or an SQLAlchemy URL with a `blobs` directory beside it.

        Raises StoreLocked, SchemaTooNew, StorageFull; StoreError where no database opens; ValueError for a URL
        without `blobs`.
        """
        url: str | URL
        if "://" in str(location):
            if blobs is None:
                raise ValueError("a store at a database URL needs a directory for its blobs, too")
            url = str(location)
        else:
            url = URL.create("sqlite", database=str(Path(location) / "store.db"))
            blobs = blobs or Path(location) / "blobs"
        held = LocalBlobs(blobs)  # first, because its lock is the whole store's
        try:
            database = Database(url)
            database.migrate()
            return cls(database, held, namespace, clock)
        except BaseException:
            held.close()
            raise

    def push(self, file: PromptFile, task: str, level: str | None = None, *, by: Actor = LOCAL) -> tuple[Version, bool]:
        """True: a new version; False: this prompt is a version of (task, level) already, and that one is returned.

        `level` counts where the file names none. Raises InvalidArtifact, BadReference, BadLevel, StorageFull.
        """
        check_task(task)
        level = _agreed_level(file, level)
        data = encode_prompt(PromptFile(file.prompt))
        with self._database.write() as session:  # held over both, so that no delete takes the bytes away in between
            return self._put(session, file, data, task, level, by)

    def _put(
        self, session: Session, file: PromptFile, data: bytes, task: str, level: str, by: Actor
    ) -> tuple[Version, bool]:
        prompt, origin = file.prompt, file.provenance
        blob = self._blobs.put(data)  # also where the version exists: it heals damaged bytes
        if (existing := find_live(session, self.namespace, task, level, prompt.digest)) is not None:
            return as_version(live_row(session, self.namespace, task, existing)), False
        row = VersionRow(
            namespace=self.namespace,
            task=task,
            version=next_number(session, self.namespace, task),
            level=level,
            digest=prompt.digest,
            live=1,
            weights=origin.weights,
            train=None if origin.train is None else dict(origin.train),
            created=origin.created,
            golden=None if origin.golden is None else origin.golden.text(),
            uploaded_at=self.versions.now(),
            uploaded_by=by.name,
            prompt=PromptRow(
                namespace=self.namespace,
                digest=prompt.digest,
                kind=prompt.kind,
                base=prompt.base,
                shape=list(prompt.shape),
                bos=prompt.bos,
                chat_template=prompt.chat_template,
                blob=blob,
                size=len(data),
            ),
        )
        if not is_known(session, self.namespace, prompt.digest):
            insert(session, row.prompt)
        insert(session, row)
        self.audit.write(session, by, "version.create", f"{task}@{row.version}", None, prompt.digest)
        return as_version(row), True

    def delete(self, task: str, version: int, *, by: Actor = LOCAL) -> None:
        """Leave a tombstone; the bytes go with the last version that has them.

        Raises NotFound, for a tombstone too; Conflict while an alias points to the version; StorageFull.
        """
        with self._database.exclusive():
            with self._database.write() as session:
                try:
                    row = live_row(session, self.namespace, task, version)
                except Gone:
                    raise NotFound("version", f"{task}@{version} was deleted already") from None
                if names := names_of(session, self.namespace, task, version):
                    message = f"{task}@{version} is what alias {', '.join(names)} points to; move or delete that first"
                    raise Conflict("version_aliased", message)
                row.live, row.deleted_at = None, self.versions.now()
                self.audit.write(session, by, "version.delete", f"{task}@{version}", row.digest, None)
                blob = row.prompt.blob
                needed = (
                    session.scalars(select(PromptRow.blob).where(PromptRow.blob == blob, _LIVE)).first() is not None
                )
            if not needed:
                with contextlib.suppress(StoreError, OSError):  # the version is gone; the next start removes the rest
                    self._blobs.remove(blob)

    def load(self, digest: str) -> SoftPrompt:
        """The prompt of a live version; its digest is computed anew. Raises NotFound, Gone, CorruptBlob."""
        blob = self._live_blob(digest)
        try:
            prompt = read_prompt(self._blobs.get(blob)).prompt
            if prompt.digest != digest:
                raise CorruptBlob(digest, f"are those of {prompt.digest}")
        except (CorruptBlob, InvalidArtifact) as error:
            self._live_blob(digest)  # else it was deleted meanwhile, and nothing is damaged
            with self._counting:
                self._integrity_failures += 1
            raise CorruptBlob(digest, getattr(error, "why", f"do not parse: {error.message}")) from error
        return prompt

    def _live_blob(self, digest: str) -> str:
        with self._database.read() as session:
            stored = select(PromptRow.blob, _LIVE).where(PromptRow.namespace == self.namespace)
            row = session.execute(stored.where(PromptRow.digest == digest)).one_or_none()
        if row is None:
            raise NotFound("prompt", f"there is no prompt {digest[:71]!a}")
        blob, live = row
        if not live:
            raise Gone(f"every version of {digest} was deleted")
        return str(blob)

    def content(self, task: str, version: int) -> bytes:
        """A live version as a prompt file, provenance included; canonical. Raises NotFound, Gone, CorruptBlob."""
        found = self.versions.get(task, version)
        origin = Provenance(found.task, found.level, found.weights, found.train, found.created, found.golden)
        return encode_prompt(PromptFile(self.load(found.digest), origin))

    def resolve(self, query: Query, served: Served) -> Resolved:
        """By the rules of `resolution.py`. Raises NotFound, Unresolved, Gone, WrongBase, BadLevel."""
        task = query.reference.task
        with self._database.read() as session:
            resolution = resolve(
                query,
                served,
                catalogue.candidates(session, self.namespace, task),
                catalogue.alias_targets(session, self.namespace, task),
                catalogue.scores(session, self.namespace, task, served.level),
            )
            if resolution.version is None:
                return Resolved(None, resolution)
            return Resolved(as_version(live_row(session, self.namespace, task, resolution.version)), resolution)

    def seed(self, files: Sequence[PromptFile]) -> list[Version]:
        """Push all of these, or none, into a store that never held a version; none where it did. A file's provenance
        names its task and its level. Raises what `push` raises."""
        for file in files:
            check_task(str(file.provenance.task))
        with self._database.write() as session:
            if session.scalars(select(VersionRow.version).limit(1)).first() is not None:
                return []
            found = []
            for file in files:
                data, level = encode_prompt(PromptFile(file.prompt)), _agreed_level(file, None)
                found.append(self._put(session, file, data, str(file.provenance.task), level, SEEDER)[0])
            return found

    def stats(self) -> StoreStats:
        counts = select(func.count(VersionRow.task.distinct()), func.count())
        counts = counts.where(VersionRow.namespace == self.namespace, VersionRow.live == 1)
        size = select(func.coalesce(func.sum(PromptRow.size), 0)).where(PromptRow.namespace == self.namespace, _LIVE)
        with self._database.read() as session:
            tasks, versions = session.execute(counts).one()
            blob_bytes = session.scalars(size).one()
        return StoreStats(tasks, versions, int(blob_bytes), self._integrity_failures, self._orphans_removed)

    def check(self) -> None:
        """Raises an error if the database does not answer."""
        with self._database.read() as session:
            session.execute(select(1))

    def close(self) -> None:
        """Let go of the database and the lock."""
        self._database.close()
        self._blobs.close()

    def __enter__(self) -> PromptStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _agreed_level(file: PromptFile, asked: str | None) -> str:
    written = file.provenance.level
    if written is None and asked is None:
        raise InvalidArtifact(
            "level_unknown", "the file names no level; say `level` (--level), the one that it was learned at", "level"
        )
    if written is not None and asked not in (None, written):
        message = f"the file was learned at level {written}, but {asked} was asked for; leave that out"
        raise InvalidArtifact("level_mismatch", message, "level")
    level = written or asked or ""
    parse_level(level)
    return level
