"""One process that serves: socket, signals, exit code. The first SIGTERM drains, the second ends at once.

Exit codes: 0 after draining, 1 if the model could not be loaded or the port is taken, 2 if the settings do not hold.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI
from uvicorn.config import Config

from engine.api import EngineInfo
from prompts_store.store import PromptStore
from server import logs
from server.app import EngineFactory, create_app
from server.host import EngineHost
from server.http import BoundedProtocol
from server.settings import Settings, SettingsError

logger = logging.getLogger("promptstitch.server")

KEEP_ALIVE_SECONDS = 30
FLUSH_SECONDS = 5  # for the last answers to leave, once the engine is closed
HURRY_SECONDS = 1.0

Ready = Callable[[EngineInfo, str], None]


def serve(
    settings: Settings,
    engine_factory: EngineFactory,
    store: PromptStore,
    on_ready: Ready = lambda info, url: None,
) -> int:
    """Serve until told to stop; the exit code. `on_ready` is told once what is served, and where."""
    logs.configure(settings.log_level)
    failures: list[BaseException] = []
    server: Server | None = None

    def failed(error: BaseException) -> None:
        failures.append(error)
        if server is not None:
            server.should_exit = True

    try:
        app = create_app(settings, engine_factory, store, failed)
    except SettingsError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr)  # noqa: T201 - the answer to whoever typed the command
        return 2
    server = Server(uvicorn_config(app, settings), app.state.host, on_ready)
    try:
        server.run([server.config.bind_socket()])  # before the model is loaded
    except SystemExit:  # uvicorn's way to say that it could not start; it has logged why
        where = f"port: cannot listen on {settings.host}:{settings.port}; choose another, or stop what listens there"
        print(where, file=sys.stderr)  # noqa: T201 - the answer to whoever typed the command
        return 1
    if app.state.host.abandoned:
        _exit_over_loader()
    return 1 if failures else 0


def _exit_over_loader() -> NoReturn:
    """Told to stop while the model is still being loaded: its thread would hold the interpreter up, or fall over it."""
    logging.shutdown()
    os._exit(0)


def uvicorn_config(app: FastAPI, settings: Settings) -> Config:
    """How the socket is served: by C (httptools, uvloop), bounded heads, no access log of uvicorn's own."""
    return Config(
        app,
        host=settings.host,
        port=settings.port,
        http=_protocol(settings),
        loop="uvloop",
        ws="none",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
    )


def _protocol(settings: Settings) -> type[BoundedProtocol]:
    """uvicorn takes a class; the deadline is the settings'."""
    return type("Protocol", (BoundedProtocol,), {"header_seconds": settings.receipt_timeout})


class Server(uvicorn.Server):
    """uvicorn, but a signal drains first: the port stays open and /readyz says no, until the last answer has left."""

    def __init__(self, config: Config, host: EngineHost, on_ready: Ready) -> None:
        super().__init__(config)
        self._host = host
        self._on_ready = on_ready
        self._leaving: asyncio.Task[None] | None = None
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; any other ends the process, answers or not."""
        if self._leaving is None:
            asyncio.get_running_loop().call_soon_threadsafe(self._leave)
        else:
            logger.warning("a second signal: leaving at once")
            signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
            signal.setitimer(signal.ITIMER_REAL, HURRY_SECONDS)
            self.force_exit = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's pulse, ten times a second."""
        if not self._told and self._host.loaded is not None:
            self._told = True
            self._on_ready(self._host.loaded.info, self._url())
        return await super().on_tick(counter)

    def _leave(self) -> None:
        self._leaving = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._host.leave()
        self.should_exit = True

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
