"""Files and folders that are whole at any moment, then and after a crash. Knows paths and bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lab.errors import RunError


def write_json(path: Path, value: Any) -> None:
    """Replace `path`. Raises RunError."""
    write_bytes(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path`. Raises RunError."""
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda part: part.write_bytes(data))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write` puts under the name that it is given. Raises what `write` raises, and OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        give_name(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def give_name(written: Path, path: Path) -> None:
    """Move a file or a folder to where it outlives a crash of the machine. Raises OSError."""
    _sync(written)
    written.replace(path)
    _sync(path.parent)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into a RunError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(
            f"{path} cannot be written: {why}. What was saved before is intact: make room or give access, "
            "and start the same command again"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
