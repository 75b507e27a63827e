"""`Idempotency-Key`: a request sent twice is done once and answered twice. Knows the registry's memory of keys."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Header, Request
from pydantic_core import from_json, to_json

from server.auth import caller_of
from server.errors import ApiError
from server.state import services_of

IdempotencyKey = Annotated[str | None, Header(pattern=r"^[\x21-\x7e]{1,255}$", description="remembered for 24 hours")]
Answered = tuple[int, dict[str, object]]  # status and body


async def once(
    request: Request, key: str | None, body_sha256: str, work: Callable[[], Awaitable[Answered]]
) -> Answered:
    """Do `work`, or give the answer that it had. Only answers that went well are remembered.

    Raises ApiError 409 while the first is under way (try again), 422 where the key was used for another request.
    """
    if key is None:
        return await work()
    services, path = services_of(request), request.scope["path"]
    name = hashlib.sha256(f"{caller_of(request).key_id}\0{request.method}\0{path}\0{key}".encode()).hexdigest()
    fingerprint = hashlib.sha256(request.scope["query_string"] + b"\0" + body_sha256.encode()).hexdigest()
    memory, call = services.store.idempotency, services.registry.read
    begun = await call("idempotency", memory.begin, name, fingerprint)
    if begun.state == "replay":
        assert begun.status is not None
        assert begun.body is not None
        return begun.status, from_json(begun.body)
    if begun.state == "in_progress":
        message = "the first request with this Idempotency-Key is still under way"
        raise ApiError(409, "idempotency_in_progress", message, param="Idempotency-Key", retry=True, retry_after=1)
    if begun.state == "mismatch":
        message = "this Idempotency-Key was used for another request"
        raise ApiError(422, "idempotency_key_reused", message, param="Idempotency-Key")
    try:
        status, answer = await work()
    except BaseException:
        await call("idempotency", memory.forget, name)
        raise
    await call("idempotency", memory.complete, name, status, to_json(answer).decode())
    return status, answer
