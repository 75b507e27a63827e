"""An app without a socket: its whole ASGI stack and its lifespan, driven on the test's own loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI


@asynccontextmanager
async def in_process(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app once it is ready. What no handler caught is raised in the test."""
    async with app.router.lifespan_context(app) as state:

        async def called(scope, receive, send):  # as uvicorn does: every request gets the lifespan's state
            await app({**scope, "state": dict(state)}, receive, send)

        transport = httpx.ASGITransport(called)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
            async with asyncio.timeout(5):
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.005)
            yield client
