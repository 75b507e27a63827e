"""Who may do what: every route names a scope, and one that names none is closed.

The check is a dependency of the whole app and looks at the route that was chosen, never at the text of a URL.
Secrets are hashed by the store before they are looked up; this module keeps none and logs none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import Request

from prompts_store.records import Actor, ApiKey, Scope
from prompts_store.store import PromptStore
from server.errors import ApiError
from server.exchange import exchange_of
from server.settings import Settings, SettingsError
from server.state import services_of

logger = logging.getLogger("promptstitch.server")

Access = Scope | Literal["public"]
SCOPE_KEY = "x-scope"  # where a route names its scope, in its OpenAPI operation
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
PUBLIC = frozenset({"/livez", "/readyz", "/startupz", "/health"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `key_id` is None where no keys are configured."""

    key_id: str | None
    namespace: str
    actor: Actor


def check_exposure(settings: Settings, store: PromptStore) -> None:
    """Refuse to serve the network without a key. Raises SettingsError."""
    if not (settings.loopback or settings.insecure or store.keys.any()):
        raise SettingsError(
            [
                f"host: {settings.host} is reachable from outside and no API key exists: make one "
                "(`promptstitch keys create`), stay on 127.0.0.1, or say --insecure"
            ]
        )


def allowed_hosts(settings: Settings, store: PromptStore) -> frozenset[str] | None:
    """The Host names to answer to, None for any.

    Without keys a server on loopback trusts whoever reaches it: no web page shall, by a name that points at 127.0.0.1.
    """
    names = frozenset(name.lower() for name in settings.allowed_hosts)
    if names:
        return names
    return LOOPBACK_NAMES if settings.loopback and not store.keys.any() else None


LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


async def authorise(request: Request) -> Caller:
    """The app's dependency. Raises ApiError 401, 403, and 400 for a query parameter that the route does not have."""
    services, route = services_of(request), request.scope["route"]
    scope = scope_of(route)
    if scope is None:
        logger.error("route %s names no scope and stays closed", route.path)
        raise ApiError(403, "insufficient_scope", "this route is closed")
    caller = Caller(None, services.store.namespace, _actor(request, "anonymous"))
    if scope != "public" and await services.keys.configured():
        key = await _key(request)
        if scope not in key.scopes and "admin" not in key.scopes:
            services.metrics.auth_failures.labels("scope").inc()
            raise ApiError(403, "insufficient_scope", f"this key does not have the scope {scope}")
        exchange_of(request.scope).key_id = key.id
        caller = Caller(key.id, key.namespace, _actor(request, key.id))
    elif request.method not in SAFE and _from_elsewhere(request.headers):
        message = "while no API key exists, no page of another site may change anything here; make a key for it"
        raise ApiError(403, "cross_site_request", message, param="Origin")
    request.scope["state"]["caller"] = caller
    _check_query(request, route)
    return caller


def caller_of(request: Request) -> Caller:
    """The caller whom `authorise` let in."""
    caller = request.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


def scope_of(route: Any) -> Access | None:
    """The scope that a route names; "public" only where it stands in the short list."""
    extra: Mapping[str, Any] = getattr(route, "openapi_extra", None) or {}
    scope: Access | None = extra.get(SCOPE_KEY)
    return scope if scope != "public" or route.path in PUBLIC else None


async def _key(request: Request) -> ApiKey:
    services = services_of(request)
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    given = scheme.lower() == "bearer" and bool(secret.strip())
    key = await services.keys.lookup(secret.strip()) if given else None
    if key is None:
        services.metrics.auth_failures.labels("invalid" if given else "missing").inc()
        message = "this key is not valid" if given else "give an API key: Authorization: Bearer ps_…"
        raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
    return key


def _from_elsewhere(headers: Mapping[str, str]) -> bool:
    """Whether a browser sent this for a page of another origin. It lets a page send what a form could without asking
    first, uploads among them."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def _actor(request: Request, name: str) -> Actor:
    address = request.client.host if request.client else None
    return Actor(name, request_id=exchange_of(request.scope).request_id, address=address)


def _check_query(request: Request, route: Any) -> None:
    known = {field.alias for field in route.dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise ApiError(
                400,
                "unknown_parameter",
                f"{name[:64]!a} is no query parameter of this route",
                param=name[:64],
            )
