"""The outermost layer, pure ASGI: request id, Host, security headers, log line, metrics, and the last resort.

It never reads a body; where an answer leaves before the body has come, it takes leave of the client politely: it says
`Connection: close` and reads on for a moment, so that the answer is not lost in a reset. Knows no routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, ClientGone, error_response, translate
from server.exchange import KEY, Exchange
from server.http import MAX_HEADER_BYTES
from server.logs import log_exchange
from server.metrics import Metrics

logger = logging.getLogger("promptstitch.server")

LINGER_SECONDS = 2.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class Edge:
    """Wraps the whole app. `hosts`: the Host names to answer to, None for any."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, hosts: Collection[str] | None) -> None:
        self.app = app
        self.metrics = metrics
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        exchange = Exchange(given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16))
        scope.setdefault("state", {})[KEY] = exchange
        wire = _Wire(exchange, headers, receive, send)
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
                await self._answer(_LONG_HEAD, exchange, scope, wire)
            elif self.hosts is not None and _host(headers) not in self.hosts:
                await self._answer(_WRONG_HOST, exchange, scope, wire)
            else:
                await self.app(scope, wire.receive, wire.send)
        except ClientGone:
            exchange.status, exchange.code = 499, "client_gone"
        except Exception as error:
            logger.exception("request %s failed", exchange.request_id)
            if not wire.started:
                await self._answer(translate(error), exchange, scope, wire)
        finally:
            self._note(scope, exchange, time.monotonic() - started)

    async def _answer(self, error: ApiError, exchange: Exchange, scope: Scope, wire: _Wire) -> None:
        exchange.code = error.code
        await error_response(error, exchange.request_id)(scope, wire.receive, wire.send)

    def _note(self, scope: Scope, exchange: Exchange, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.http_requests.labels(method, route, f"{exchange.status // 100}xx").inc()
        self.metrics.http_duration.labels(method, route).observe(seconds)
        log_exchange(exchange, method, route, seconds)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LONG_HEAD = ApiError(431, "headers_too_large", f"the headers may have {MAX_HEADER_BYTES} bytes")
_WRONG_HOST = ApiError(400, "invalid_host", "this server does not answer to that Host; see allowed_hosts", param="Host")


def _host(headers: Headers) -> str:
    """The Host without its port."""
    host = headers.get("host", "").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host


class _Wire:
    """One request's receive and send, watched."""

    def __init__(self, exchange: Exchange, headers: Headers, receive: Receive, send: Send) -> None:
        self._exchange = exchange
        self._receive = receive
        self._send = send
        self._unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        self._closing = False
        self.started = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._exchange.status = message["status"]
            self._closing = self._unread
            message["headers"] = self._dressed(message.get("headers", ()))
        elif self._closing and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    def _dressed(self, given: Collection[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        headers = [*given, (b"x-request-id", self._exchange.request_id.encode())]
        names = {name for name, _ in headers}
        headers += [(name, value) for name, value in _HEADERS.items() if name not in names]
        if self._closing:
            headers.append((b"connection", b"close"))
        return headers

    async def _linger(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread:
                    await self.receive()
