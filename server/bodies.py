"""Request bodies: read under a cap and a deadline, then validated once.

The cap counts bytes that came, whatever Content-Length says. A client must keep up a least rate, so that nobody holds a
connection by dripping.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from server.errors import ApiError, ClientGone, invalid_value
from server.schemas.sampling import NEUTRAL
from server.state import services_of

LEAST_RATE = 64 * 1024  # bytes per second, once `receipt_timeout` is over
LARGE_BODY = 256 * 1024
MAX_KEYS = 16_384  # of all objects in a large body
M = TypeVar("M", bound=BaseModel)


async def chunks(request: Request, limit: int, patience: float) -> AsyncIterator[bytes]:
    """The body as it comes. Raises ApiError 413 beyond `limit` bytes, 408 when it is too slow, 415; ClientGone."""
    too_large = ApiError(413, "file_too_large", f"the body may have {limit} bytes")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_format", "send the body without Content-Encoding", param="Content-Encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    loop = asyncio.get_running_loop()
    deadline, received = loop.time() + patience, 0
    more = True
    while more:
        try:
            async with asyncio.timeout_at(deadline + received / LEAST_RATE):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(408, "request_timeout", "the body took too long to come") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk, more = message.get("body", b""), message.get("more_body", False)
        received += len(chunk)
        if received > limit:
            raise too_large
        if chunk:
            yield chunk


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in lower case; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


class JsonBody(Generic[M]):
    """A dependency: the body, validated. `openapi.py` finds the model through it."""

    def __init__(self, model: type[M]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> M:
        """Raises ApiError 400, 408, 413, 415."""
        if media_type(request) != "application/json":
            raise ApiError(415, "unsupported_format", "send Content-Type: application/json", param="Content-Type")
        settings = services_of(request).settings
        body = b"".join([chunk async for chunk in chunks(request, settings.max_body, settings.receipt_timeout)])
        if len(body) > LARGE_BODY:
            _check_keys(body)
        try:
            return self.model.model_validate_json(body)
        except ValidationError as error:
            raise invalid_value(error.errors(include_url=False, include_input=False), NEUTRAL) from None


def _check_keys(body: bytes) -> None:
    """Refuse a body of very many keys before validation makes an error report for each."""
    try:
        todo: list[Any] = [{"": from_json(body)}]
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    keys = 0
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            keys += len(value)
            value = value.values()
        if keys > MAX_KEYS:
            raise ApiError(400, "invalid_value", f"the body may have {MAX_KEYS} keys")
        todo.extend(item for item in value if isinstance(item, (dict, list)))
