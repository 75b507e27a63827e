"""The header of a safetensors file, read strictly before anything of the file is believed.

The format is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes without holes. Only the
length and the header are read here, at most 64 KiB + 8 bytes; every shape and offset is checked against the length of
the file, so that nothing is allocated on a stranger's word. Knows no soft prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

from prompts_store.errors import InvalidArtifact
from prompts_store.strict_json import load_object

MAX_HEADER_BYTES = 64 * 1024
MAX_TENSORS = 16
MAX_AXES = 4
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
_LENGTH_BYTES = 8
_NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_FOREIGN = {  # how a file of another kind begins, and what to call it
    b"PK": "a zip archive (torch.save writes one)",
    b"\x80": "a pickle",
    b"(": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "an npy array",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89HDF": "an HDF5 file",
    b"{": "JSON",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as declared: bytes `start` to `stop` behind the header. Shape and dtype agree with them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors in the order of their bytes, which they fill without a hole up to `data_bytes`."""

    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    data_bytes: int


def read_header(stream: BufferedIOBase, length: int) -> Header:
    """Read the header of a file of `length` bytes and leave the stream at its data. Raises InvalidArtifact."""
    start = stream.read(_LENGTH_BYTES + 1)
    if len(start) <= _LENGTH_BYTES:
        raise InvalidArtifact("truncated", f"a safetensors file has more than {_LENGTH_BYTES} bytes; got {length}")
    size = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if size > MAX_HEADER_BYTES:
        if start[_LENGTH_BYTES:] != b"{":
            raise InvalidArtifact("unsupported_format", f"this is {_foreign(start)}; send a safetensors file")
        raise InvalidArtifact("header_too_large", f"the header has {size} bytes, at most {MAX_HEADER_BYTES} are read")
    if size > length - _LENGTH_BYTES:
        raise InvalidArtifact("truncated", f"the header needs {size} bytes, the file has {length - _LENGTH_BYTES}")
    fields = load_object((start[_LENGTH_BYTES:] + stream.read(size - 1))[:size], field="header", code="invalid_header")
    metadata = _metadata(fields.pop("__metadata__", {}))
    if not 1 <= len(fields) <= MAX_TENSORS:
        raise InvalidArtifact(
            "unexpected_tensor", f"a prompt file has 1 to {MAX_TENSORS} tensors, this one {len(fields)}"
        )
    tensors = sorted((_tensor(name, entry) for name, entry in fields.items()), key=lambda spec: spec.start)
    data_bytes = length - _LENGTH_BYTES - size
    _check_tiling(tensors, data_bytes)
    return Header(tuple(tensors), metadata, data_bytes)


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidArtifact("invalid_metadata", "__metadata__ must be an object of strings", "__metadata__")
    for key, text in value.items():
        if not isinstance(text, str):
            raise InvalidArtifact(
                "invalid_metadata", f"metadata {key[:64]!a} must be a string", f"__metadata__.{key[:64]}"
            )
    return value


def _tensor(name: str, entry: Any) -> TensorSpec:
    if len(name) > 128 or not _NAME.fullmatch(name):
        raise InvalidArtifact("invalid_name", f"tensor name {name[:64]!a}: letters, digits, `_` and single dots only")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidArtifact("invalid_header", f"{name} must have just dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InvalidArtifact("unsupported_dtype", f"{name} must be F32, F16 or BF16, not {str(dtype)[:32]!a}", name)
    if not _naturals(shape) or not 1 <= len(shape) <= MAX_AXES or 0 in shape:
        raise InvalidArtifact("invalid_shape", f"{name}: shape must be 1 to {MAX_AXES} positive integers", name)
    if not _naturals(offsets) or len(offsets) != 2:
        raise InvalidArtifact("invalid_offsets", f"{name}: data_offsets must be two integers, none negative", name)
    start, stop = offsets
    if math.prod(shape) * ITEM_BYTES[dtype] != stop - start:
        raise InvalidArtifact(
            "shape_mismatch", f"{name}: shape {shape} in {dtype} does not fill {stop - start} bytes", name
        )
    return TensorSpec(name, dtype, tuple(shape), start, stop)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # a bool is an int, too


def _check_tiling(tensors: list[TensorSpec], data_bytes: int) -> None:
    end = 0
    for spec in tensors:
        if spec.start != end:
            raise InvalidArtifact("invalid_offsets", f"{spec.name} starts at {spec.start}, not at {end}", spec.name)
        end = spec.stop
    if end > data_bytes:
        raise InvalidArtifact("truncated", f"the tensors need {end} bytes, the file has {data_bytes}")
    if end < data_bytes:
        raise InvalidArtifact("trailing_bytes", f"{data_bytes - end} bytes behind the last tensor belong to nothing")


def _foreign(start: bytes) -> str:
    return next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), "no safetensors file")
