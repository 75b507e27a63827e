"""`/v1/models`: what may stand in `model`. The base, its tasks and aliases; a version by its full name."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from engine.api import EngineInfo
from prompts_store.errors import NotFound
from prompts_store.store import PromptStore
from server.inference import query_of_model, unknown_model
from server.openapi import Success, operation
from server.render import Json
from server.schemas.common import MAX_REFERENCE
from server.schemas.models import ModelAnswer, ModelList, VersionInfo
from server.schemas.registry import MAX_PAGE
from server.state import Services, services_of

router = APIRouter(tags=["models"])

ModelId = Annotated[str, Path(min_length=1, max_length=MAX_REFERENCE, pattern=r"^[^\x00]+$")]


@router.get("/v1/models", **operation("infer", {200: Success("what may stand in model", ModelList)}, 503))
async def list_models(request: Request) -> Response:
    """The base, its tasks and their aliases."""
    services = services_of(request)
    info, base = services.host.engine.info, services.host.model_name
    named = await services.registry.read("models", lambda: list(_named(services.store, info)))
    models = [_model(services, info, base, services.created, None)]
    models += [_model(services, info, name, created, base) for name, created in named]
    return Json({"object": "list", "data": models})


@router.get(
    "/v1/models/{model:path}",
    **operation("infer", {200: Success("the model", ModelAnswer)}, 404, 409, 410, 503, 504),
)
async def show(request: Request, model: ModelId) -> Response:
    """One of them, or `task@3`, `task@sha256:…`. Says which prompt it stands for now."""
    services = services_of(request)
    info, base = services.host.engine.info, services.host.model_name
    query = query_of_model(services, model, None)
    if query is None:
        return Json(_model(services, info, base, services.created, None))
    try:
        stitch = await services.finder.find(query, services.host.engine)
    except NotFound as error:
        raise unknown_model(services, model, error) from error
    created = _unix(stitch.version.uploaded_at) if stitch else services.created
    return Json({**_model(services, info, model, created, base), "prompt": stitch and stitch.told(info)})


@router.get("/version", tags=["models"], **operation("infer", {200: Success("what runs", VersionInfo)}, 503))
async def version(request: Request) -> Response:
    """The release and the model."""
    services = services_of(request)
    info = services.host.engine.info
    return Json(
        {
            "version": request.app.version,
            "model": services.host.model_name,
            "base": info.base,
            "level": info.level,
            "weights": info.weights,
            "dtype": info.dtype,
        }
    )


def _named(store: PromptStore, info: EngineInfo) -> Iterator[tuple[str, int]]:
    """Names of the served base, with the Unix time of their last change."""
    after = None
    while True:
        tasks = store.versions.tasks(limit=MAX_PAGE, after=after, base=info.base)
        yield from ((task.task, _unix(task.updated_at)) for task in tasks.items)
        if (after := tasks.next) is None:
            break
    changed: dict[str, int] = {}  # a name may be there at several levels
    while True:
        aliases = store.aliases.list(limit=MAX_PAGE, after=after, base=info.base)
        for alias in aliases.items:
            name = f"{alias.task}:{alias.name}"
            changed[name] = max(changed.get(name, 0), _unix(alias.updated_at))
        if (after := aliases.next) is None:
            break
    yield from changed.items()


def _model(services: Services, info: EngineInfo, name: str, created: int, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "promptstitch",
        "root": services.host.model_name,
        "parent": parent,
        "max_model_len": info.max_model_len,
    }


def _unix(iso: str) -> int:
    return int(datetime.fromisoformat(iso).timestamp())
