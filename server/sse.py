"""Server-sent events: one `data:` line of JSON for each, `[DONE]` at the end, and errors told in the stream.

Written for this server: sse-starlette ends every stream at the first SIGTERM, which is when ours begin to drain.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ClientGone, envelope, translate
from server.exchange import exchange_of
from server.generation import Generation, Tagged

logger = logging.getLogger("promptstitch.server")

STALL_SECONDS = 60.0  # a client that takes nothing for so long is gone
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


class Encoder(ABC):
    """Turns events into the objects of a stream. One for each stream; routes subclass it."""

    @abstractmethod
    def encode(self, events: Sequence[Tagged]) -> list[dict[str, Any]]:
        """The objects to send now."""


class EventStream(Response):
    """The answer of a streaming route. Reads the generation to its end and closes it, whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, encoder: Encoder, headers: Mapping[str, str]) -> None:
        self.status_code = 200
        self.background = None
        self.generation = generation
        self.encoder = encoder
        self.init_headers({**headers, "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await send({"type": "http.response.body", "body": data, "more_body": more})
            except TimeoutError:
                raise ClientGone from None

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events(receive):
                await write(data)
        except ClientGone:
            raise
        except Exception as error:
            told = translate(error)
            exchange = exchange_of(scope)
            exchange.code = told.code
            if told.status == 500:
                logger.error("stream %s failed: %s", exchange.request_id, told.code, exc_info=error)
            await write(event(envelope(told, exchange.request_id)))
        finally:
            self.generation.close()
        await write(DONE, more=False)

    async def _events(self, receive: Receive) -> AsyncIterator[bytes]:
        async for events in self.generation.steps(receive):
            data = b"".join(map(event, self.encoder.encode(events)))
            if data or not events:
                yield data or PING


def event(value: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + to_json(value) + b"\n\n"
