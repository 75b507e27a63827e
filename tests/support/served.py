"""A served app for tests: a store with prompts, a fake engine, and uvicorn on a free port in a thread."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from support.drive import until as until
from support.fake_engine import BASE, HIDDEN, LEVEL, WEIGHTS, FakeEngine

from prompts_store.file import PromptFile, Provenance, encode_prompt
from prompts_store.prompt import SoftPrompt
from prompts_store.store import PromptStore
from server.app import create_app
from server.run import uvicorn_config
from server.settings import Settings

JSON = "Content-Type: application/json\r\n"


def soft_prompt(seed: int = 0, n: int = 4, h: int = HIDDEN, base: str = BASE, **layout: Any) -> SoftPrompt:
    """A prompt of kind rows; one seed, one digest."""
    values = torch.randn(n, h, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt("rows", base, {"prompt_embeddings": values}, **layout)


def prompt_file(seed: int = 0, level: str | None = LEVEL, weights: str | None = WEIGHTS, **shape: Any) -> PromptFile:
    """The same as a file, learned at the served level through the served weights."""
    return PromptFile(soft_prompt(seed, **shape), Provenance(level=level, weights=weights))


def prompt_bytes(seed: int = 0, **shape: Any) -> bytes:
    """The same as an upload."""
    return encode_prompt(prompt_file(seed, **shape))


def stock(store) -> None:
    """haiku: two versions at the served level, alias `best` on the first; deep: one learned at a higher compression."""
    store.push(prompt_file(1), "haiku")
    store.push(prompt_file(2), "haiku")
    store.aliases.put("haiku", "best", 1)
    store.push(prompt_file(3, level="w3g64", weights=None), "deep")


@dataclass
class Served:
    """A running server. `client` speaks to it, with the headers of its caller if keys are configured."""

    client: httpx.Client
    engine: FakeEngine
    store: PromptStore
    settings: Settings
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    @property
    def port(self) -> int:
        return int(self.client.base_url.port or 0)


@contextmanager
def serving(
    folder: Path,
    *,
    engine: FakeEngine | None = None,
    engine_factory: Callable[[Settings], Any] | None = None,
    prepare: Callable[[PromptStore], None] = lambda store: None,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Served]:
    """Serve until the context is left. `prepare` sees the store before the app does."""
    engine = engine or FakeEngine()
    config = Settings(store=str(folder), port=0, drain=5.0, **settings)
    with PromptStore.open(folder) as store:
        prepare(store)
        app = create_app(config, engine_factory or (lambda _: engine), store)
        server = uvicorn.Server(uvicorn_config(app, config))
        thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{_port(server)}", timeout=30) as client:
                if wait:
                    until(lambda: client.get("/readyz").status_code == 200)
                yield Served(client, engine, store, config, server)
        finally:
            server.should_exit = True
            engine.held.clear()
            engine.wedged.clear()
            thread.join(20)
            engine.close()
            assert not thread.is_alive()


def _port(server: uvicorn.Server) -> int:
    until(lambda: server.started)
    return int(server.servers[0].sockets[0].getsockname()[1])


def begin(port: int, body: dict, path: str = "/v1/generate") -> socket.socket:
    """Send a request and keep the connection."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(head.encode() + raw)
    return connection
