"""Where a checkpoint's tensors lie, and their bytes piece by piece.

Knows the Hub's two layouts (one `model.safetensors`, or shards with an index); knows no tensor by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llama.errors import BrokenCheckpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK_BYTES = 16 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BrokenCheckpoint naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BrokenCheckpoint(f"{path} must hold a JSON object")
    return raw


def json_object(value: Any, field: str) -> dict[str, Any]:
    """`value` of a JSON file's `field` where an object is expected; null is an empty one. Raises BrokenCheckpoint."""
    if value is not None and not isinstance(value, dict):
        raise BrokenCheckpoint(f"{field} must be a JSON object, got {value!r}")
    return value or {}


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises BrokenCheckpoint."""
    if not (directory / INDEX).exists():
        single = directory / SINGLE
        if not single.is_file():
            raise BrokenCheckpoint(f"{directory} holds neither {SINGLE} nor {INDEX}; only safetensors are read")
        return dict.fromkeys(_names(single), single)
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrokenCheckpoint(f"{directory / INDEX} lacks the field 'weight_map'")
    files: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise BrokenCheckpoint(f"{INDEX} places {name} in {file!r}; a shard is a file beside the index")
        files[name] = directory / file
    held = {path: set(_names(path)) for path in set(files.values())}
    missing = sorted(name for name, path in files.items() if name not in held[path])
    if missing:
        raise BrokenCheckpoint(f"{INDEX} names tensors that the shards lack: {', '.join(missing[:3])}")
    twice = sorted(name for name, count in Counter(chain.from_iterable(held.values())).items() if count > 1)
    if twice:  # readers that go through the shards and readers that go by the index would see two models
        raise BrokenCheckpoint(f"{directory} holds tensors in more than one shard: {', '.join(twice[:3])}")
    return files


def open_shard(path: Path) -> Any:
    """A memory-mapped shard. Raises BrokenCheckpoint if it is missing or torn."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise BrokenCheckpoint(f"{path} is missing, torn or not a safetensors file: {error}") from error


def chunks(shard: Any, name: str, limit: int = CHUNK_BYTES) -> Iterator[torch.Tensor]:
    """A tensor's rows as stored, at most about `limit` bytes at once, in order."""
    piece = shard.get_slice(name)
    shape = piece.get_shape()
    if not shape or 0 in shape:
        yield shard.get_tensor(name)
        return
    row_bytes = max(1, piece[:1].nbytes)
    step = max(1, limit // row_bytes)
    for start in range(0, shape[0], step):
        yield piece[start : start + step]


def _names(path: Path) -> list[str]:
    with open_shard(path) as shard:
        return list(shard.keys())
