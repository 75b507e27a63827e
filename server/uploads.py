"""An uploaded prompt on its way to the registry: to disk under a cap, hashed as it comes, then read strictly.

Nothing of it that is more than WRITE_BYTES is in memory whole before its header has been judged. On the disk it has no
name, so that however the process ends nothing of it is left. Knows no database.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, cast

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from engine.api import Engine, EngineInfo, InvalidRequest
from prompts_store.errors import NO_ROOM, InvalidArtifact, StorageFull
from prompts_store.file import Limits, PromptFile, ServedDtype, read_prompt
from prompts_store.peft import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME, read_peft
from prompts_store.prompt import Bos
from server.bodies import chunks, media_type
from server.errors import ApiError
from server.golden import GoldenTests
from server.settings import Settings

WRITE_BYTES = 1 << 20  # written at once, in a thread
RAW_TYPES = ("application/octet-stream", "")
MULTIPART = "multipart/form-data"
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]+):")


@dataclass(frozen=True, slots=True)
class Upload:
    """What came: a prompt's file, with its config if it is an adapter. `sha256` and `size` are the body's."""

    weights: BufferedIOBase
    config: bytes | None
    sha256: str
    size: int

    def read(self, engine: Engine, settings: Settings, golden: GoldenTests, bos: Bos | None) -> PromptFile:
        """The prompt, if this engine can serve it and its self-test passes.

        Blocks. Raises InvalidArtifact, EngineError, ScoringFailed.
        """
        info = engine.info
        limits = limits_of(info, settings)
        if self.config is None:
            file = read_prompt(self.weights, limits, default_base=info.base, bos=bos)
        else:
            file = read_peft(
                self.config, self.weights, limits, default_base=info.base, bos=bos, unrotate=engine.unrotate
            )
        try:
            engine.check_prompt(file.prompt)
        except InvalidRequest as error:
            raise InvalidArtifact(error.code, str(error), error.field) from error
        golden.accept(engine, file)
        return file


def limits_of(info: EngineInfo, settings: Settings) -> Limits:
    """What a prompt must be to be served."""
    return Limits(
        max_bytes=settings.max_upload,
        max_virtual_tokens=info.max_virtual_tokens,
        base=info.base,
        hidden_size=info.hidden_size,
        num_layers=info.num_layers,
        num_kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        dtype=cast(ServedDtype, info.dtype),
    )


@asynccontextmanager
async def received(request: Request, settings: Settings, content_digest: str | None) -> AsyncIterator[Upload]:
    """The body on disk, until the context is left. Raises ApiError 400, 408, 413, 415, 422; StorageFull."""
    kind = media_type(request)
    if kind not in (*RAW_TYPES, MULTIPART):
        message = f"send a prompt as application/octet-stream, or an adapter as {MULTIPART}"
        raise ApiError(415, "unsupported_format", message, param="Content-Type")
    expected = _sha256_of(content_digest)
    body = _Hashed(chunks(request, settings.max_upload, settings.receipt_timeout))
    staged = _parts(request, body) if kind == MULTIPART else _whole(body)
    try:
        async with staged as (weights, config):
            if expected is not None and expected != body.sha256.digest():
                raise ApiError(
                    422, "digest_mismatch", "the body is not what Content-Digest says", param="Content-Digest"
                )
            yield Upload(weights, config, body.sha256.hexdigest(), body.size)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StorageFull("no room for an upload on this server's disk") from error
        raise


class _Hashed:
    """A stream of chunks that is hashed and counted on the way."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self.sha256 = hashlib.sha256()
        self.size = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._source:
            self.sha256.update(chunk)
            self.size += len(chunk)
            yield chunk


@asynccontextmanager
async def _whole(body: _Hashed) -> AsyncIterator[tuple[BufferedIOBase, None]]:
    """A body that is the prompt's file; one that would be written at once stays in memory."""
    with tempfile.SpooledTemporaryFile(WRITE_BYTES) as file:
        pending = bytearray()
        async for chunk in body:
            pending += chunk
            if len(pending) >= WRITE_BYTES:
                await run_in_threadpool(file.write, bytes(pending))
                pending.clear()
        if body.size < WRITE_BYTES:
            file.write(pending)
        else:
            await run_in_threadpool(file.write, bytes(pending))
        yield cast(BufferedIOBase, file), None


@asynccontextmanager
async def _parts(request: Request, body: _Hashed) -> AsyncIterator[tuple[BufferedIOBase, bytes]]:
    """The two parts of an adapter, named by their file names: weights, config."""
    parser = MultiPartParser(request.headers, cast(Any, body.__aiter__()), max_files=2, max_fields=0)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, "message", "no boundary")
        raise ApiError(400, "invalid_multipart", f"the body is no {MULTIPART} of two files: {reason}") from error
    parts = [(name, part) for name, part in form.multi_items() if isinstance(part, UploadFile)]
    try:
        given = {_part_name(field, part): part for field, part in parts}
        if set(given) != {CONFIG_NAME, WEIGHTS_NAME} or len(parts) != 2:
            message = f"an adapter is the two parts {CONFIG_NAME} and {WEIGHTS_NAME}, got {sorted(given)!a:.200}"
            raise InvalidArtifact("wrong_parts", message)
        if (given[CONFIG_NAME].size or 0) > MAX_CONFIG_BYTES:
            raise InvalidArtifact("invalid_adapter_config", f"{CONFIG_NAME} may have {MAX_CONFIG_BYTES} bytes")
        yield cast(BufferedIOBase, given[WEIGHTS_NAME].file), await given[CONFIG_NAME].read()
    finally:
        for _, part in parts:
            await part.close()


def _part_name(field: str, part: UploadFile) -> str:
    """A part is known by its file name, else by its field's."""
    return part.filename if part.filename in (CONFIG_NAME, WEIGHTS_NAME) else field


def _sha256_of(header: str | None) -> bytes | None:
    """RFC 9530. Raises ApiError 400 for a header without a sha-256 that could be checked."""
    if header is None:
        return None
    found = _SHA256.search(header)
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        message = "Content-Digest is checked as `sha-256=:<base64 of 32 bytes>:`"
        raise ApiError(400, "invalid_value", message, param="Content-Digest")
    return digest
