"""Measurements of a version: what resolution reads where nothing exact is there."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from prompts_store.errors import BadLevel, BadMeasurement
from prompts_store.records import Measurement
from prompts_store.resolution import SPLIT
from server.auth import caller_of
from server.bodies import JsonBody
from server.errors import ApiError
from server.openapi import Success, operation
from server.render import Json
from server.schemas.registry import (
    After,
    Limit,
    Listing,
    MeasurementAnswer,
    MeasurementBody,
    Number,
    Task,
    listing,
    show_measurement,
)
from server.state import services_of

router = APIRouter(tags=["measurements"])

MEASUREMENTS = "/v1/prompts/{task}/versions/{version}/measurements"


@router.get(
    MEASUREMENTS,
    **operation("prompts:read", {200: Success("oldest first", Listing[MeasurementAnswer])}, 404, 410),
)
async def show(request: Request, task: Task, version: Number, limit: Limit = 100, after: After = None) -> Response:
    """What was measured of a version."""
    services = services_of(request)
    page = await services.registry.read(
        "measurements", services.store.measurements.list, task, version, limit=limit, after=after
    )
    return Json(listing(page, [show_measurement(recorded) for recorded in page.items]))


@router.post(
    MEASUREMENTS,
    **operation("prompts:write", {201: Success("written down", MeasurementAnswer)}, 404, 408, 410, 413, 415, 507),
)
async def add(
    request: Request,
    task: Task,
    version: Number,
    body: Annotated[MeasurementBody, Depends(JsonBody(MeasurementBody))],
) -> Response:
    """Write a measurement down. A later one of the same kind counts instead of it."""
    services = services_of(request)
    measurement = Measurement(**{**body.model_dump(), "split": body.split or SPLIT})
    try:
        recorded = await services.registry.change(
            "measure",
            task,
            services.store.measurements.add,
            task,
            version,
            measurement,
            by=caller_of(request).actor,
        )
    except (BadMeasurement, BadLevel) as error:
        param = "/served_level" if isinstance(error, BadLevel) else f"/{error.field}"
        raise ApiError(400, error.code, error.message, param=param) from error
    return Json(show_measurement(recorded), 201)
