"""What goes wrong, as HTTP: one table from domain errors to status, type and code, and one envelope around them.

    {"error": {"message", "type", "param", "code", "request_id"}}

`param` is a JSON pointer into the body, or the name of a path, query or header value. Nothing of a traceback, a path or
a setting leaves the process.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from engine import api as engine_api
from engine.request import RequestFailed
from engine.score import ScoringFailed
from prompts_store import errors as store_errors
from server.exchange import exchange_of

logger = logging.getLogger("promptstitch.server")

TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout",
    409: "conflict_error",
    410: "not_found_error",
    412: "precondition_failed",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_artifact",
    428: "precondition_failed",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout",
    507: "server_error",
}
# The OpenAI client tries these again by itself, or a second try may well succeed.
RETRYABLE = frozenset({408, 429, 500, 503, 504, 507})


class ApiError(Exception):
    """An error that the server itself finds. `retry_after` in seconds; `headers` go out with it."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        retry: bool | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.retry = retry
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client hung up; there is nobody to answer. Logged as 499."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Status of a domain error. `code` None: the error's own. `param`: where it has no field of its own."""

    status: int
    code: str | None = None
    param: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


# The most specific class wins. A test keeps this complete against both packages.
RULES: Mapping[type[Exception], Rule] = {
    store_errors.InvalidArtifact: Rule(422),
    store_errors.BadReference: Rule(400),
    store_errors.BadLevel: Rule(400),
    store_errors.BadMeasurement: Rule(400),
    store_errors.BadKey: Rule(400),
    store_errors.NotFound: Rule(404),
    store_errors.Gone: Rule(410),
    store_errors.Conflict: Rule(409),
    store_errors.PreconditionRequired: Rule(428, param="If-Match"),
    store_errors.PreconditionFailed: Rule(412, param="If-Match"),
    store_errors.CorruptBlob: Rule(500, extra={"retry": False}),
    store_errors.GoldenMismatch: Rule(500, extra={"retry": False}),
    store_errors.StorageFull: Rule(507),
    store_errors.StoreError: Rule(500),
    engine_api.InvalidRequest: Rule(400),
    engine_api.Overloaded: Rule(503, "server_is_overloaded"),
    engine_api.EngineClosed: Rule(503, "server_is_draining", extra={"retry_after": 5.0}),
}

FAILURES: Mapping[str, tuple[int, str]] = {
    "deadline": (504, "timeout"),
    "shutdown": (503, "server_is_draining"),
    "engine_error": (500, "engine_error"),
}


def translate(error: Exception) -> ApiError:
    """The ApiError of any error. What is not in the table is a 500 that tells nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ScoringFailed):
        return failed(error.event)
    for kind in type(error).__mro__:
        if rule := RULES.get(kind):
            own: str = getattr(error, "code", "invalid_value")
            return ApiError(
                rule.status,
                rule.code or own,
                str(error),
                param=getattr(error, "field", None) or rule.param,
                retry_after=getattr(error, "retry_after", rule.extra.get("retry_after")),
                retry=rule.extra.get("retry"),
            )
    return ApiError(500, "internal_error", "the server failed; the log has the details under this request_id")


def failed(event: RequestFailed) -> ApiError:
    """The ApiError of a request that the engine gave up."""
    status, code = FAILURES[event.code]
    message = event.message if event.code == "deadline" else f"the engine gave this request up: {event.code}"
    return ApiError(status, code, message, retry_after=5.0 if event.code == "shutdown" else None)


def envelope(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """The body of an error answer, and of an error event in a stream."""
    return {
        "error": {
            "message": error.message,
            "type": TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
            "request_id": request_id,
        }
    }


def error_response(error: ApiError, request_id: str | None) -> Response:
    """Status, envelope and the headers that tell a client whether to try again."""
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    retry = error.retry if error.retry is not None else error.status in RETRYABLE
    if not retry or error.retry:
        headers["x-should-retry"] = "true" if retry else "false"
    return JSONResponse(envelope(error, request_id), error.status, headers)


def install(app: FastAPI) -> None:
    """Make every error of the app leave as the envelope, FastAPI's and Starlette's own included."""

    async def answer(request: Request, error: Exception) -> Response:
        api_error = translate(error)
        exchange = exchange_of(request.scope)
        exchange.code = api_error.code
        if api_error.status == 500:
            logger.error("request %s failed: %s", exchange.request_id, api_error.code, exc_info=error)
        return error_response(api_error, exchange.request_id)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await answer(request, invalid_value(error.errors()))

    async def unrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await answer(request, _of_http(request, error))

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(store_errors.StoreError, answer)
    app.add_exception_handler(engine_api.EngineError, answer)
    app.add_exception_handler(ScoringFailed, answer)
    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(HTTPException, unrouted)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, "route_not_found", f"there is no {request.scope['path']!a} here")
    if error.status_code == 405:
        allowed = ", ".join(sorted(_methods(request)))
        message = f"{request.method!a} is not one of the methods here: {allowed}"
        return ApiError(405, "method_not_allowed", message, headers={"Allow": allowed})
    phrase = HTTPStatus(error.status_code).phrase
    return ApiError(error.status_code, phrase.lower().replace(" ", "_"), str(error.detail))


def _methods(request: Request) -> set[str]:
    """All methods of this path: a router names only those of the first route that has it."""
    methods: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        if route.original_route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return methods


# -- pydantic's findings -------------------------------------------------------------------------------------------


def invalid_value(findings: Sequence[Mapping[str, Any]], neutral: frozenset[str] = frozenset()) -> ApiError:
    """The 400 of the first thing that pydantic found. `neutral`: fields that take only values without effect."""
    first = findings[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    context = first.get("ctx") or {}
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is not JSON: {context.get('error', message)}")
    if first["type"] == "refused":  # `schemas.common.refuse`
        return ApiError(400, context["code"], message, param=context["param"])
    source, place = _place(first["loc"])
    param = _pointer(place) if source == "body" else ".".join(map(str, place))
    if first["type"] == "extra_forbidden":
        code = "unsupported_parameter" if source == "body" else "unknown_parameter"
        return ApiError(400, code, f"{_shown(place)} is no field of this request", param=param)
    if place and not neutral.isdisjoint((place[0], _shown(place))):
        return ApiError(400, "unsupported_parameter", f"{_shown(place)} is not supported here: {message}", param=param)
    return ApiError(400, "invalid_value", f"{_shown(place)}: {message}", param=param)


def _place(location: Sequence[int | str]) -> tuple[str, list[int | str]]:
    """Where a value stood, and in what. Tags of unions, and pydantic's mark of a key, are no places."""
    place = [part for part in location if not (isinstance(part, str) and (part == "[key]" or part.startswith("<")))]
    if place and place[0] in ("query", "path", "header"):
        return str(place[0]), place[1:]
    return "body", place


def _pointer(place: Sequence[int | str]) -> str | None:
    """RFC 6901. A key of the client's own is cut short."""
    return "".join("/" + str(part)[:64].replace("~", "~0").replace("/", "~1") for part in place) or None


def _shown(place: Sequence[int | str]) -> str:
    return ".".join(ascii(str(part)[:64])[1:-1] for part in place) or "the body"
