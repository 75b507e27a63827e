"""The description of the API: what a route says of itself, and the document made of it.

Every status that a route can answer with is written here, with its headers; a test drives each route against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute, iter_route_contexts
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.auth import SCOPE_KEY, Access
from server.bodies import JsonBody
from server.errors import RETRYABLE
from server.schemas.common import ErrorAnswer

SCHEMAS = "#/components/schemas/{model}"
EVERY = {"X-Request-Id": "the id of this request, in the log and in errors"}
ERROR_HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "seconds"},
    503: {"Retry-After": "seconds, where they can be told"},
}
INFERENCE_ERRORS = (400, 404, 408, 409, 410, 413, 415, 429, 503, 504)


@dataclass(frozen=True, slots=True)
class Success:
    """An answer that goes well. `model` None: no JSON body."""

    description: str
    model: type[BaseModel] | None = None
    headers: Mapping[str, str] | None = None
    media: str | None = None  # another media type than JSON, or beside it


def operation(access: Access, answers: Mapping[int, Success], *errors: int) -> dict[str, Any]:
    """Keyword arguments of a route: its scope and every status it can answer with."""
    common = (400, 431, 500) if access == "public" else (400, 401, 403, 431, 500)
    documented: dict[int, dict[str, Any]] = {status: _success(answer) for status, answer in answers.items()}
    for status in sorted({*common, *errors}):
        documented[status] = _error(status)
    return {
        "openapi_extra": {SCOPE_KEY: access},
        "responses": documented,
        "response_model": None,
        "status_code": next(iter(answers)),
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the app."""
    described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = described.setdefault("components", {})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for route in routes_of(app):
        for method in route.methods or ():
            operation = described["paths"].get(route.path_format, {}).get(method.lower())
            if operation is None:
                continue
            if 422 not in route.responses:  # FastAPI's own guess; ours is a 400
                operation["responses"].pop("422", None)
            if operation[SCOPE_KEY] != "public":
                operation["security"] = [{"key": []}]  # asked for where there are keys
            if model := _body_model(route):
                operation["requestBody"] = _json_body(model, schemas)
    return described


def routes_of(app: FastAPI) -> Iterator[APIRoute]:
    """All routes of the app that FastAPI knows."""
    for context in iter_route_contexts(app.routes):
        if isinstance(context.original_route, APIRoute):
            yield context.original_route


def _success(answer: Success) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if answer.media == "text/event-stream":  # as OpenAPI 3.2 has it: the schema of one event
        data = {"type": "string", "contentMediaType": "application/json"}
        content[answer.media] = {"itemSchema": {"type": "object", "required": ["data"], "properties": {"data": data}}}
    elif answer.media is not None:
        binary = answer.media == "application/octet-stream"
        content[answer.media] = {"schema": {"type": "string", **({"format": "binary"} if binary else {})}}
    described: dict[str, Any] = {
        "description": answer.description,
        "headers": _headers({**EVERY, **(answer.headers or {})}),
    }
    if answer.model is not None:
        described["model"] = answer.model
    if content:
        described["content"] = content
    return described


def _error(status: int) -> dict[str, Any]:
    headers = {**EVERY, **ERROR_HEADERS.get(status, {})}
    if status not in RETRYABLE:
        headers["x-should-retry"] = "false: the same request will fail again"
    return {"description": HTTPStatus(status).phrase, "model": ErrorAnswer, "headers": _headers(headers)}


def _headers(texts: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in texts.items()}


def _body_model(route: APIRoute) -> type[BaseModel] | None:
    return next(
        (dependency.call.model for dependency in route.dependant.dependencies if isinstance(dependency.call, JsonBody)),
        None,
    )


def _json_body(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    _, definitions = models_json_schema([(model, "validation")], ref_template=SCHEMAS)
    schemas.update(definitions["$defs"])
    reference = {"$ref": SCHEMAS.format(model=model.__name__)}
    return {"required": True, "content": {"application/json": {"schema": reference}}}
