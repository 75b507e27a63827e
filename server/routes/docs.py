"""The API's own description, for people and for programs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

from server.openapi import Success, document, operation
from server.render import Json

router = APIRouter(tags=["docs"], include_in_schema=False)
# Swagger's page loads its script from a CDN; nothing else may.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' https://fastapi.tiangolo.com data:; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net"
)


@router.get("/openapi.json", **operation("infer", {200: Success("the document")}))
async def openapi(request: Request) -> Response:
    """OpenAPI 3.1."""
    return Json(document(request.app))


@router.get("/docs", **operation("infer", {200: Success("a page", media="text/html")}))
async def page(request: Request) -> Response:
    """A page to try it on."""
    answer = get_swagger_ui_html(openapi_url="/openapi.json", title=request.app.title)
    answer.headers["Content-Security-Policy"] = POLICY
    return answer
