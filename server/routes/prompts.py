"""Prompts and their versions: upload, list, show, download, delete."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from prompts_store.prompt import Bos
from prompts_store.records import Version
from server.auth import caller_of
from server.errors import ApiError, translate
from server.idempotency import Answered, IdempotencyKey, once
from server.openapi import Success, operation
from server.render import Json
from server.schemas.registry import (
    MAX_PAGE,
    After,
    BaseFilter,
    LevelFilter,
    Limit,
    Listing,
    Number,
    Task,
    TaskAnswer,
    TaskListing,
    UploadAnswer,
    VersionAnswer,
    listing,
    show_alias,
    show_task,
    show_version,
)
from server.state import Services, services_of
from server.uploads import Upload, received

router = APIRouter(tags=["prompts"])

CREATED = {"Location": "of the version", "ETag": "its digest", "X-Prompt-Digest": "its digest"}
UPLOAD = operation(
    "prompts:write",
    {
        201: Success("a new version", UploadAnswer, CREATED),
        200: Success("it was one already", UploadAnswer, CREATED),
    },
    *(408, 409, 413, 415, 422, 503, 504, 507),
)
UPLOAD["openapi_extra"] |= {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["adapter_config.json", "adapter_model.safetensors"],
                    "properties": {
                        "adapter_config.json": {"type": "string", "format": "binary"},
                        "adapter_model.safetensors": {"type": "string", "format": "binary"},
                    },
                }
            },
        },
    }
}


@router.post("/v1/prompts/{task}/versions", **UPLOAD)
async def upload(
    request: Request,
    task: Task,
    level: LevelFilter = None,
    bos: Annotated[Bos | None, Query()] = None,
    idempotency_key: IdempotencyKey = None,
    content_digest: Annotated[str | None, Header(max_length=1024, description="RFC 9530, sha-256")] = None,
) -> Response:
    """A safetensors file, or a PEFT adapter in two parts. `level` and `bos` count where the file does not say."""
    services, started = services_of(request), time.monotonic()
    try:
        if task == services.host.model_name:
            raise ApiError(409, "task_reserved", f"{task} is the name of the base model here; choose another task")
        async with received(request, services.settings, content_digest) as body:
            push = partial(_push, request, body, task, level, bos)
            status, answer = await once(request, idempotency_key, body.sha256, push)
    except Exception as error:
        services.metrics.uploads.labels("rejected", translate(error).code).inc()
        raise
    services.metrics.uploads.labels("accepted" if status == 201 else "duplicate", "").inc()
    services.metrics.upload_bytes.inc(body.size)
    services.metrics.upload_duration.observe(time.monotonic() - started)
    location = f"/v1/prompts/{task}/versions/{answer['version']}"
    return Json(answer, status, {"Location": location, **_tags(str(answer["digest"]))})


async def _push(request: Request, body: Upload, task: str, level: str | None, bos: Bos | None) -> Answered:
    """Judge the file and store it."""
    services, actor = services_of(request), caller_of(request).actor

    def judge_and_store() -> tuple[Version, bool, bool]:
        file = body.read(services.host.engine, services.settings, services.golden, bos)
        return *services.store.push(file, task, level, by=actor), file.bound

    version, new, bound = await services.registry.push(task, judge_and_store)
    return (201 if new else 200), {**_shown(services, version), "base_bound": bound}


@router.get("/v1/prompts", **operation("prompts:read", {200: Success("tasks with prompts", Listing[TaskAnswer])}))
async def list_tasks(
    request: Request,
    limit: Limit = 100,
    after: After = None,
    level: LevelFilter = None,
    base: BaseFilter = None,
) -> Response:
    """The tasks that have a live version, by name."""
    services = services_of(request)
    page = await services.registry.read(
        "tasks", services.store.versions.tasks, limit=limit, after=after, level=level, base=base
    )
    return Json(listing(page, [show_task(task) for task in page.items]))


@router.get("/v1/prompts/{task}", **operation("prompts:read", {200: Success("its versions", TaskListing)}, 404))
async def show(
    request: Request,
    task: Task,
    limit: Limit = 100,
    after: After = None,
    level: LevelFilter = None,
    base: BaseFilter = None,
) -> Response:
    """The live versions of a task, oldest first, and its aliases."""
    services = services_of(request)
    page = await services.registry.read(
        "versions", services.store.versions.list, task, limit=limit, after=after, level=level, base=base
    )
    aliases = await services.registry.read(
        "aliases", services.store.aliases.list, task, limit=MAX_PAGE, level=level, base=base
    )
    shown = listing(page, [_shown(services, version) for version in page.items])
    return Json({**shown, "task": task, "aliases": [show_alias(alias) for alias in aliases.items]})


VERSION = "/v1/prompts/{task}/versions/{version}"
TAGS = {"ETag": "the digest", "X-Prompt-Digest": "the digest"}


@router.get(VERSION, **operation("prompts:read", {200: Success("the version", VersionAnswer, TAGS)}, 404, 410))
async def show_one(request: Request, task: Task, version: Number) -> Response:
    """One version."""
    services = services_of(request)
    found = await _get(services, task, version)
    return Json(_shown(services, found), headers=_tags(found.digest))


@router.get(
    VERSION + "/content",
    **operation(
        "prompts:read",
        {
            200: Success("the prompt file", headers=TAGS, media="application/octet-stream"),
            304: Success("it is what If-None-Match says", headers=TAGS),
        },
        *(404, 410),
    ),
)
async def download(
    request: Request,
    task: Task,
    version: Number,
    if_none_match: Annotated[str | None, Header(max_length=1024)] = None,
) -> Response:
    """The prompt as a safetensors file."""
    services = services_of(request)
    found = await _get(services, task, version)
    tags = _tags(found.digest)
    if if_none_match is not None and tags["ETag"] in [tag.strip() for tag in if_none_match.split(",")]:
        return Response(status_code=304, headers=tags)
    content = await services.registry.read("content", services.store.content, task, version)
    name = f"{task}-{version}.safetensors"
    headers = {**tags, "Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


@router.delete(
    VERSION,
    **operation("prompts:write", {204: Success("gone; its number is never used again")}, 404, 409, 507),
)
async def delete(request: Request, task: Task, version: Number) -> Response:
    """Leave a tombstone. Refused while an alias points to it."""
    services = services_of(request)
    actor = caller_of(request).actor
    await services.registry.change("delete", task, services.store.delete, task, version, by=actor)
    return Response(status_code=204)


async def _get(services: Services, task: str, version: int) -> Version:
    return await services.registry.read("version", services.store.versions.get, task, version)


def _shown(services: Services, version: Version) -> dict[str, Any]:
    """A VersionAnswer."""
    engine = services.host.loaded
    return show_version(version, services.golden.told(version, engine.info if engine else None))


def _tags(digest: str) -> dict[str, str]:
    return {"ETag": f'"{digest}"', "X-Prompt-Digest": digest}
