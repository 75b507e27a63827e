"""What the pages of soft prompts hold, on disk: computed once, and not again after an eviction or a restart.

One file a prefix, of its bytes and a checksum, in a folder that several servers may share. All of it is a cache: what
cannot be read counts as not there, what cannot be written is not kept, and the log says so. Knows bytes and keys; knows
no tensors, no prompts and no pages.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.pages import Key

log = logging.getLogger("promptstitch.engine")

SUFFIX = ".kv"
CHECKSUM_BYTES = 4
WAITING_WRITES = 16  # more, where a disk is slow, are not kept: they would be memory


class KeptPrefixes:
    """Up to `budget` bytes in `folder`, least recently used removed first. `keep` may be called while others `find`.

    `identity` is what the bytes depend on besides the key, and is part of every file's name.
    """

    def __init__(self, folder: Path, budget: int, identity: bytes) -> None:
        self._folder, self._budget, self._identity = folder, budget, identity
        self._room = threading.Semaphore(WAITING_WRITES)
        self._writer = ThreadPoolExecutor(1, "kept")
        self._troubled = False

    def find(self, key: Key, size: int) -> memoryview | None:
        """The `size` bytes kept for `key`, verified."""
        path = self._path(key)
        try:
            read = np.fromfile(path, np.uint8, size + CHECKSUM_BYTES + 1).data  # 1: to see that a file is too long
        except FileNotFoundError:
            return None
        except OSError as error:
            self._trouble(error)
            return None
        content = read[:size]
        if read[size:] != _checksum(path, content):
            log.warning("%s is damaged; the prefix is computed anew", path)
            return None
        with contextlib.suppress(OSError):  # the folder may be one that can only be read
            os.utime(path)
        return content

    def keep(self, key: Key, content: memoryview) -> None:
        """Write it, soon and in another thread; nobody may change `content` any more."""
        if self._room.acquire(blocking=False):
            self._writer.submit(self._write, self._path(key), content)

    def close(self) -> None:
        """Returns once everything is written."""
        self._writer.shutdown()

    def _path(self, key: Key) -> Path:
        return self._folder / (hashlib.blake2b(key + self._identity, digest_size=32).hexdigest() + SUFFIX)

    def _write(self, path: Path, content: memoryview) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(SUFFIX, dir=self._folder)
            try:
                with open(descriptor, "wb") as file:  # not synced: what a crash tears, the checksum finds
                    file.write(content)
                    file.write(_checksum(path, content))
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
            self._shrink()
            self._troubled = False
        except OSError as error:
            self._trouble(error)
        finally:
            self._room.release()

    def _shrink(self) -> None:
        """Remove files, those of a crash among them, until the rest is within the budget."""
        files = []
        for path in self._folder.glob("*" + SUFFIX):
            with contextlib.suppress(FileNotFoundError):  # another server has removed it
                told = path.stat()
                files.append((told.st_mtime_ns, told.st_size, path))
        excess = sum(size for _, size, _ in files) - self._budget
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _trouble(self, error: OSError) -> None:
        """One warning until something is written again."""
        if not self._troubled:
            log.warning("prefixes cannot be kept in %s (%s); they are computed instead", self._folder, error)
        self._troubled = True


def _checksum(path: Path, content: memoryview) -> bytes:
    """Of content and name, so that a file under another's name does not pass."""
    return zlib.crc32(content, zlib.crc32(path.name.encode())).to_bytes(CHECKSUM_BYTES, "little")
