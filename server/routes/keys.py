"""API keys, for those who hold the scope `admin`: make, list, revoke."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response

from server.auth import caller_of
from server.bodies import JsonBody
from server.errors import ApiError
from server.openapi import Success, operation
from server.render import Json
from server.schemas.registry import After, KeyAnswer, KeyBody, Limit, Listing, NewKeyAnswer, listing, show_key
from server.state import services_of

router = APIRouter(tags=["keys"])

KeyId = Annotated[str, Path(pattern=r"^key_[0-9a-f]{16}$")]


@router.post("/v1/keys", **operation("admin", {201: Success("told this once", NewKeyAnswer)}, 408, 409, 413, 415, 507))
async def create(request: Request, body: Annotated[KeyBody, Depends(JsonBody(KeyBody))]) -> Response:
    """Make a key. The first one closes the server to everybody without, so it must be able to make others."""
    services = services_of(request)
    if "admin" not in body.scopes and not await services.keys.configured():
        raise ApiError(409, "admin_first", "the first key must hold the scope admin, or nobody could make another")
    key, secret = await services.registry.change(
        "create_key", None, services.store.keys.create, body.name, body.scopes, by=caller_of(request).actor
    )
    services.keys.created()
    return Json({**show_key(key), "secret": secret}, 201)


@router.get("/v1/keys", **operation("admin", {200: Success("oldest first", Listing[KeyAnswer])}))
async def show(request: Request, limit: Limit = 100, after: After = None) -> Response:
    """All keys, without their secrets."""
    services = services_of(request)
    page = await services.registry.read("keys", services.store.keys.list, limit=limit, after=after)
    return Json(listing(page, [show_key(key) for key in page.items]))


@router.delete("/v1/keys/{key_id}", **operation("admin", {204: Success("revoked")}, 404, 507))
async def revoke(request: Request, key_id: KeyId) -> Response:
    """Make a key worthless."""
    services = services_of(request)
    actor = caller_of(request).actor
    await services.registry.change("revoke_key", None, services.store.keys.revoke, key_id, by=actor)
    return Response(status_code=204)
