"""Bytes by their digest, durable and verified.

A blob is written to a temporary file beside its place, synced, renamed, and its directory synced, before `put` returns;
every read recomputes the digest. Knows no prompt and no database: who refers to a blob is somebody else's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from prompts_store.errors import NO_ROOM, CorruptBlob, StorageFull, StoreLocked
from prompts_store.reference import is_digest

_TEMPORARY = "tmp-"


class Blobs(Protocol):
    """What the registry needs of a blob store; digests are `sha256:<hex>` of the bytes."""

    def put(self, data: bytes) -> str:
        """Store, durably on return; the digest. Replaces damaged bytes. Raises StorageFull."""

    def get(self, digest: str) -> bytes:
        """The bytes, verified. Damaged ones are set aside. Raises CorruptBlob for these and for missing ones."""

    def remove(self, digest: str) -> None:
        """Forget; a missing one is no error."""

    def sweep(self, keep: Collection[str]) -> int:
        """Remove leftovers of crashes and every blob not in `keep`; how many. Nobody may be writing."""

    def close(self) -> None: ...


class LocalBlobs:
    """Blobs in a directory that one process holds: `sha256/ab/<64 hex>`, damaged ones in `quarantine/`.

    Raises StoreLocked.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        with storage_errors():
            (root / "sha256").mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(root / ".lock", thread_local=False)
        try:
            with storage_errors():
                self._lock.acquire(timeout=0)
        except Timeout:
            raise StoreLocked(
                f"another process holds the store at {root}; talk to that server by its URL, or stop it"
            ) from None

    def put(self, data: bytes) -> str:
        digest = _digest(data)
        path = self._path(digest)
        with storage_errors():
            if not path.parent.exists():
                path.parent.mkdir(exist_ok=True)
                _sync_directory(path.parent.parent)
            descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            _sync_directory(path.parent)
        return digest

    def get(self, digest: str) -> bytes:
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise CorruptBlob(digest, "are missing") from None
        except OSError as error:
            raise CorruptBlob(digest, f"cannot be read ({error.strerror})") from error
        if _digest(data) != digest:
            with contextlib.suppress(OSError):  # on a read-only disk it stays, and is refused again next time
                quarantine = self._root / "quarantine"
                quarantine.mkdir(exist_ok=True)
                os.replace(path, quarantine / path.name)
            raise CorruptBlob(digest, "are damaged")
        return data

    def remove(self, digest: str) -> None:
        with storage_errors():
            self._path(digest).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str]) -> int:
        removed = 0
        with storage_errors():
            for path in (self._root / "sha256").glob("*/*"):
                if f"sha256:{path.name}" not in keep:
                    path.unlink()
                    removed += 1
        return removed

    def close(self) -> None:
        self._lock.release()

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise ValueError(f"no digest: {digest[:80]!a}")
        name = digest.removeprefix("sha256:")
        return self._root / "sha256" / name[:2] / name


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """A disk that is full, read-only or failing becomes StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StorageFull(f"nothing was stored: {error.strerror}") from error
        raise


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
