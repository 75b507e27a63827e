"""Aliases: names that move, each against the revision that was read."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.responses import Response

from engine.api import EngineInfo
from prompts_store.records import Alias
from server.auth import caller_of
from server.bodies import JsonBody
from server.errors import ApiError
from server.openapi import Success, operation
from server.render import Json
from server.schemas.registry import AliasAnswer, AliasBody, AliasName, BaseFilter, LevelFilter, Task, show_alias
from server.state import services_of

router = APIRouter(tags=["aliases"])

ALIAS = "/v1/prompts/{task}/aliases/{alias}"
TAG = {"ETag": "the revision, for If-Match"}
Require = Annotated[
    Literal["gain"] | None,
    Query(description="`gain`: a measurement on the served weights whose interval of the gain lies above 0"),
]
IfMatch = Annotated[str | None, Header(max_length=256, description="the ETag that was read, or *")]


@router.get(ALIAS, **operation("prompts:read", {200: Success("the alias", AliasAnswer, TAG)}, 404, 503))
async def show(
    request: Request, task: Task, alias: AliasName, level: LevelFilter = None, base: BaseFilter = None
) -> Response:
    """What the alias points to at this level of this base.

    Without a level, the alias at the served one, else the only one of this name.
    """
    services = services_of(request)
    place = _place(services.host.engine.info, level, base)
    found = await services.registry.read(
        "alias", services.store.aliases.get, task, alias, **place, any_level=level is None
    )
    return _answer(found)


@router.put(
    ALIAS,
    **operation(
        "prompts:write",
        {201: Success("a new alias", AliasAnswer, TAG), 200: Success("moved", AliasAnswer, TAG)},
        *(404, 408, 409, 410, 412, 413, 415, 428, 503, 507),
    ),
)
async def put(
    request: Request,
    task: Task,
    alias: AliasName,
    body: Annotated[AliasBody, Depends(JsonBody(AliasBody))],
    if_match: IfMatch = None,
    require: Require = None,
) -> Response:
    """Point the alias to a version, at that version's level. Moving it takes `If-Match`.

    With `require=gain` only to a version that was measured to gain on the weights that are served (409 otherwise).
    """
    services = services_of(request)
    moved, new = await services.registry.change(
        "set_alias",
        task,
        services.store.aliases.put,
        task,
        alias,
        body.version,
        expected=_revision(if_match),
        gain_on=services.host.engine.info.weights if require else None,
        by=caller_of(request).actor,
    )
    return _answer(moved, 201 if new else 200)


@router.delete(ALIAS, **operation("prompts:write", {204: Success("gone")}, 404, 412, 503, 507))
async def delete(
    request: Request,
    task: Task,
    alias: AliasName,
    level: LevelFilter = None,
    base: BaseFilter = None,
    if_match: IfMatch = None,
) -> Response:
    """Take the alias away at this level of this base, those that are served if none are given."""
    services = services_of(request)
    await services.registry.change(
        "delete_alias",
        task,
        services.store.aliases.delete,
        task,
        alias,
        **_place(services.host.engine.info, level, base),
        expected=_revision(if_match),
        by=caller_of(request).actor,
    )
    return Response(status_code=204)


def _place(info: EngineInfo, level: str | None, base: str | None) -> dict[str, str]:
    return {"base": base or info.base, "level": level or info.level}


def _answer(alias: Alias, status: int = 200) -> Response:
    return Json(show_alias(alias), status, {"ETag": f'"{alias.revision}"'})


def _revision(if_match: str | None) -> str | None:
    """The revision of an ETag. Raises ApiError 400 for what is no single strong ETag."""
    if if_match is None or if_match.strip() == "*":
        return if_match and "*"
    tag = if_match.strip()
    if len(tag) < 3 or tag[0] != '"' or tag[-1] != '"' or '"' in tag[1:-1]:
        raise ApiError(400, "invalid_value", 'If-Match takes one ETag as it was given, `"…"`, or *', param="If-Match")
    return tag[1:-1]
