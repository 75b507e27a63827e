"""Probes and metrics. The probes are public and say one word; what is measured takes a key where there are any."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from prompts_store.errors import StoreError
from server.host import Phase
from server.openapi import Success, operation
from server.render import Json
from server.schemas.models import Health
from server.state import services_of

router = APIRouter(tags=["health"])
UNWELL = {503: Success("not well", Health)}


@router.get("/livez", **operation("public", {200: Success("tokens can move", Health), **UNWELL}))
async def live(request: Request) -> Response:
    """Whether the engine's loop turns. True while the model is being loaded."""
    well = await services_of(request).host.live()
    return Json({"status": "live" if well else "stalled"}, 200 if well else 503)


@router.get("/startupz", **operation("public", {200: Success("the model is loaded", Health), **UNWELL}))
async def started(request: Request) -> Response:
    """Whether the model has been loaded and has spoken: what a probe waits for before it minds the others."""
    host = services_of(request).host
    done = host.phase not in (Phase.LOADING, Phase.FAILED)
    return Json({"status": "started" if done else host.phase.value}, 200 if done else 503)


@router.get("/readyz", **operation("public", {200: Success("takes requests", Health), **UNWELL}))
@router.get("/health", **operation("public", {200: Success("the same as /readyz", Health), **UNWELL}))
async def ready(request: Request) -> Response:
    """Whether requests should be sent here: loaded, warm, registry at hand, not about to stop."""
    services = services_of(request)
    status = services.host.phase.value
    if services.host.phase is Phase.READY:
        try:
            await services.registry.read("check", services.store.check)
        except StoreError:
            status = "registry_unavailable"
    return Json({"status": status}, 200 if status == Phase.READY.value else 503)


@router.get("/metrics", **operation("prompts:read", {200: Success("for Prometheus", media="text/plain")}))
async def metrics(request: Request) -> Response:
    """Everything that is counted."""
    text = await run_in_threadpool(generate_latest, services_of(request).metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
