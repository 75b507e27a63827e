"""The soft prompt file: safetensors whose metadata says which model and task the prompt belongs to.

Reads promptstitch files and the plain safetensors of other tools by one strict path (`header.py`), writes one canonical
form: the same prompt and provenance give the same bytes. Knows no database, no PEFT config and no model.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from prompts_store.errors import InvalidArtifact
from prompts_store.header import Header, TensorSpec, read_header
from prompts_store.prompt import TENSOR_NAMES, Bos, Kind, SoftPrompt
from prompts_store.provenance import FIELDS, bad_metadata
from prompts_store.provenance import Provenance as Provenance
from prompts_store.reference import is_digest
from prompts_store.strict_json import dump

ServedDtype = Literal["float32", "bfloat16", "float16"]
FORMAT = "promptstitch.v1"
_IDENTITY = ("format", "kind", "base", "hidden_size", "bos", "chat_template")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a served model and its operator allow; None: not checked. Counts are tokens, layers, heads, elements.

    `base` is the digest that a file must name, if it names one. `dtype` is the dtype that the prompt will be served
    in: its values must be finite after that cast, too.
    """

    max_bytes: int = 1 << 30
    max_virtual_tokens: int | None = None
    base: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    dtype: ServedDtype | None = None


ANY = Limits()


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A prompt with its provenance. `bound`: the file named no base and took the one that it was offered.

    Raises InvalidArtifact for a base or chat template that is no digest.
    """

    prompt: SoftPrompt
    provenance: Provenance = field(default_factory=Provenance)
    bound: bool = False

    def __post_init__(self) -> None:
        if not is_digest(self.prompt.base):
            raise bad_metadata("invalid_metadata", "base", "must be sha256: and 64 hex digits")
        if self.prompt.chat_template != "none" and not is_digest(self.prompt.chat_template):
            raise bad_metadata("invalid_metadata", "chat_template", "must be none, or sha256: and 64 hex digits")


def read_prompt(
    source: Path | bytes | io.BufferedIOBase,
    limits: Limits = ANY,
    *,
    default_base: str | None = None,
    bos: Bos | None = None,
) -> PromptFile:
    """Read a file of any dtype into an fp32 prompt. `default_base` and `bos` count where the file does not say.

    Nothing but the header is read before sizes, shapes and names are found to be right; a stream is left open. Raises
    InvalidArtifact, and OSError for a path that cannot be read.
    """
    with _opened(source) as stream:
        length = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if length > limits.max_bytes:
            raise InvalidArtifact(
                "file_too_large", f"the file has {length} bytes, at most {limits.max_bytes} are taken"
            )
        header = read_header(stream, length)
        layout = _Layout.read(header, default_base, bos)
        layout.check(limits)
        provenance = Provenance.read(header.metadata)
        data = bytearray(header.data_bytes)
        if stream.readinto(data) != header.data_bytes:
            raise InvalidArtifact("truncated", "the file became shorter while it was read")
    tensors = {spec.name: _tensor(spec, data, limits.dtype) for spec in header.tensors}
    prompt = SoftPrompt(layout.kind, layout.base, tensors, layout.bos, layout.chat_template)
    return PromptFile(prompt, provenance, bound="base" not in header.metadata)


def encode_prompt(file: PromptFile) -> bytes:
    """The canonical bytes: fp32, sorted keys, header padded to 8 bytes."""
    prompt, entries, chunks, end = file.prompt, {}, [], 0
    for name in TENSOR_NAMES[prompt.kind]:
        chunk = prompt.tensors[name].numpy().astype("<f4", copy=False).tobytes()
        entries[name] = {"dtype": "F32", "shape": list(prompt.shape), "data_offsets": [end, end + len(chunk)]}
        chunks.append(chunk)
        end += len(chunk)
    header = dump({"__metadata__": _metadata(file), **entries}).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, *chunks))


def write_prompt(path: Path, file: PromptFile) -> None:
    """Write the canonical bytes, all of them or none. Raises OSError."""
    write_whole(path, encode_prompt(file))


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path`, or leave it as it is; what is no file, such as a pipe, is written to. Raises OSError."""
    path = path.resolve()  # a link goes on to point where it does
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # `write` knows no names
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@dataclass(frozen=True, slots=True)
class _Layout:
    """The identity that a header declares, before a value is read."""

    kind: Kind
    base: str
    bos: Bos
    chat_template: str
    shape: tuple[int, ...]
    hidden_size: int | None

    @classmethod
    def read(cls, header: Header, default_base: str | None, bos: Bos | None) -> _Layout:
        metadata = header.metadata
        if unknown := sorted(metadata.keys() - {*_IDENTITY, *FIELDS}):
            known = ", ".join(_IDENTITY + FIELDS)
            raise bad_metadata("unknown_field", unknown[0], f"is not known; known are {known}; notes go into train")
        if metadata.get("format", FORMAT) not in (FORMAT, "pt"):
            raise bad_metadata("unsupported_format", "format", f"must be {FORMAT} or pt, or left out")
        kind = _kind(header)
        shapes = {spec.shape for spec in header.tensors}
        shape = header.tensors[0].shape
        if len(shapes) != 1 or len(shape) != (2 if kind == "rows" else 4):
            want = "(N, H)" if kind == "rows" else "(layers, KV heads, N, D), the same for keys and values"
            raise InvalidArtifact("shape_mismatch", f"{', '.join(TENSOR_NAMES[kind])}: shape must be {want}", "shape")
        if len({spec.dtype for spec in header.tensors}) != 1:
            raise InvalidArtifact("unsupported_dtype", "keys and values must have one dtype", "dtype")
        base = metadata.get("base", default_base)
        if base is None:
            raise bad_metadata("base_unknown", "base", "is missing, and there is no model to bind the prompt to")
        place, hidden_size = _bos(metadata.get("bos"), bos), _hidden_size(metadata, kind, shape)
        return cls(kind, base, place, metadata.get("chat_template", "none"), shape, hidden_size)

    def check(self, limits: Limits) -> None:
        """Raises InvalidArtifact where the model that is served could not take it."""
        if limits.base is not None and self.base != limits.base:
            raise bad_metadata("base_model_mismatch", "base", f"is {self.base}, the served model's is {limits.base}")
        tokens = self.shape[0] if self.kind == "rows" else self.shape[2]
        if limits.max_virtual_tokens is not None and tokens > limits.max_virtual_tokens:
            message = f"the prompt has {tokens} positions, at most {limits.max_virtual_tokens} are taken"
            raise InvalidArtifact("too_many_virtual_tokens", message, "shape")
        if limits.hidden_size is not None and self.hidden_size not in (None, limits.hidden_size):
            message = f"the prompt is {self.hidden_size} wide, the served model {limits.hidden_size}"
            raise InvalidArtifact("hidden_size_mismatch", message, "shape")
        if self.kind == "kv":
            wanted = (limits.num_layers, limits.num_kv_heads, None, limits.head_dim)
            if any(want not in (None, has) for want, has in zip(wanted, self.shape, strict=True)):
                message = f"keys and values are {self.shape}; layers, KV heads, N, D of the served model are {wanted}"
                raise InvalidArtifact("shape_mismatch", message, "shape")


def _opened(source: Path | bytes | io.BufferedIOBase) -> AbstractContextManager[io.BufferedIOBase]:
    if isinstance(source, Path):
        return source.open("rb")
    return io.BytesIO(source) if isinstance(source, bytes) else nullcontext(source)


def _kind(header: Header) -> Kind:
    names = tuple(sorted(spec.name for spec in header.tensors))
    found = next((kind for kind, expected in TENSOR_NAMES.items() if names == tuple(sorted(expected))), None)
    if found is None:
        raise InvalidArtifact(
            "unexpected_tensor", f"a prompt holds {dict(TENSOR_NAMES)}, this file {list(names)}", "tensors"
        )
    if header.metadata.get("kind", found) != found:
        raise bad_metadata("kind_mismatch", "kind", f"does not fit the tensors, which are those of kind {found}")
    return found


def _bos(written: str | None, asked: Bos | None) -> Bos:
    known: dict[str, Bos] = {name: name for name in get_args(Bos)}
    if written is None:
        return asked or "tokenizer"
    if written not in known:
        raise bad_metadata("invalid_metadata", "bos", f"must be one of {', '.join(known)}")
    if asked not in (None, written):
        raise bad_metadata("bos_mismatch", "bos", f"is {written}, but {asked} was asked for; leave that out")
    return known[written]


def _hidden_size(metadata: Mapping[str, str], kind: Kind, shape: tuple[int, ...]) -> int | None:
    written = metadata.get("hidden_size")
    if written is None:
        return shape[1] if kind == "rows" else None
    if not (written.isascii() and written.isdigit() and len(written) <= 9):
        raise bad_metadata("invalid_metadata", "hidden_size", "must be a number")
    if kind == "rows" and int(written) != shape[1]:
        raise bad_metadata("hidden_size_mismatch", "hidden_size", f"is {written}, but the rows are {shape[1]} wide")
    return int(written)


def _tensor(spec: TensorSpec, data: bytearray, served: ServedDtype | None) -> torch.Tensor:
    """fp32; shares `data` where the file is fp32 already."""
    dtype = _DTYPES[spec.dtype]
    count = (spec.stop - spec.start) // dtype.itemsize
    tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=spec.start).to(torch.float32).view(spec.shape)
    extremes = torch.stack(tensor.aminmax())  # NaN, if there is one; and rounding keeps the order
    for cast in (torch.float32, getattr(torch, served or "float32")):
        if not extremes.to(cast).isfinite().all():
            where = (~torch.isfinite(tensor.to(cast))).nonzero()[0].tolist()
            message = f"{spec.name}{where} is not finite as {str(cast).removeprefix('torch.')}"
            raise InvalidArtifact("non_finite", message, spec.name)
    return tensor


def _metadata(file: PromptFile) -> dict[str, str]:
    prompt = file.prompt
    identity = {
        "format": FORMAT,
        "kind": prompt.kind,
        "base": prompt.base,
        "bos": prompt.bos,
        "chat_template": prompt.chat_template,
    }
    width = {} if prompt.hidden_size is None else {"hidden_size": str(prompt.hidden_size)}
    return {**identity, **width, **file.provenance.metadata()}
