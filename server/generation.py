"""One HTTP request under way in the engine: its engine requests, their events, and the client who may hang up.

Without streaming the engine's thread only appends to lists, and the loop wakes once, at the end. With streaming it
wakes once for a step of the whole batch. Knows no shapes of answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from functools import partial

from starlette.types import Receive

from engine.api import Engine, Sink
from engine.request import Event, GenerationRequest, RequestDone, RequestFailed, Timings, TokenEvent
from server.bridge import Bridge
from server.errors import ApiError, ClientGone, failed
from server.exchange import Exchange
from server.metrics import Metrics

GRACE_SECONDS = 5.0  # the engine keeps the deadline; this much later we do
PING_SECONDS = 15.0  # a silent stream says that it lives

Tagged = tuple[int, Event]  # the index of the text, and what happened to it


class Generation:
    """Used by one task. `place` is left when it ends; `start` it, read it to its end, and `close` it in any case."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[GenerationRequest],
        *,
        place: ExitStack,
        bridge: Bridge,
        metrics: Metrics,
        model_name: str,
        exchange: Exchange,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._place = place
        self._bridge = bridge
        self._metrics = metrics
        self._model_name = model_name
        self._exchange = exchange
        self._running: set[int] = set()
        self._arrived: list[Tagged] = []
        self._wake = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._failure: RequestFailed | None = None
        self._gone = False

    def start(self, *, streaming: bool) -> None:
        """Submit everything or nothing. Raises InvalidRequest, Overloaded, EngineClosed."""
        for index, request in enumerate(self._requests):
            self._engine.submit(request, self._stream_sink(index) if streaming else self._whole_sink(index))
            self._running.add(index)

    async def whole(self, receive: Receive) -> list[Tagged]:
        """All events, each text's in order. Raises ApiError, ClientGone."""
        self._watch(receive)
        end = self._end()
        while self._running:
            await self._news(end)
        return self._take()

    async def steps(self, receive: Receive) -> AsyncIterator[list[Tagged]]:
        """Events as they come; none as a sign of life. Raises ApiError, ClientGone."""
        self._watch(receive)
        end = self._end()
        while self._running or self._arrived:
            if not self._arrived:
                await self._news(end, PING_SECONDS)
            self._check()
            yield self._take()

    def close(self) -> None:
        """Cancel what still runs and give the place back. Twice is once."""
        if self._watcher is not None:
            self._watcher.cancel()
        for index in self._running:
            self._engine.cancel(self._requests[index].request_id)
        self._running.clear()
        self._place.close()

    def _end(self) -> float:
        """The loop's time at which waiting has no sense any more."""
        patience = max(request.timeout or 0.0 for request in self._requests)
        return asyncio.get_running_loop().time() + patience + GRACE_SECONDS

    async def _news(self, end: float, ping: float = float("inf")) -> None:
        """Wait for something to happen, `ping` seconds at most. Raises what stands against going on."""
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(end, now + ping)):
                await self._wake.wait()
        except TimeoutError:
            if end <= now + ping:
                raise ApiError(504, "timeout", "the engine did not answer in time") from None
        self._wake.clear()
        self._check()

    def _check(self) -> None:
        if self._gone:
            raise ClientGone
        if self._failure is not None:
            raise failed(self._failure)

    def _take(self) -> list[Tagged]:
        self._wake.clear()
        taken, self._arrived = self._arrived, []
        return taken

    # From the engine's thread to the loop.

    def _stream_sink(self, index: int) -> Sink:
        return lambda events: self._bridge.post(partial(self._deliver, index, events))

    def _whole_sink(self, index: int) -> Sink:
        collected: list[Event] = []

        def sink(events: Sequence[Event]) -> None:
            collected.extend(events)
            if isinstance(events[-1], RequestDone | RequestFailed):
                self._bridge.post(partial(self._deliver, index, collected))

        return sink

    def _deliver(self, index: int, events: Sequence[Event]) -> None:
        if index not in self._running:
            return  # closed meanwhile
        for event in events:
            self._note(event)
        self._arrived.extend((index, event) for event in events)
        if isinstance(events[-1], RequestDone | RequestFailed):
            self._running.discard(index)
        self._wake.set()

    def _note(self, event: Event) -> None:
        noted = self._exchange
        if isinstance(event, TokenEvent):
            if event.finish_reason is not None:
                noted.finish_reason = event.finish_reason
                self._metrics.success.labels(self._model_name, event.finish_reason).inc()
        elif isinstance(event, RequestDone):
            self._metrics.request_done(self._model_name, event)
            noted.text_tokens = (noted.text_tokens or 0) + event.text_tokens
            noted.soft_tokens = (noted.soft_tokens or 0) + event.soft_tokens
            noted.completion_tokens = (noted.completion_tokens or 0) + event.completion_tokens
            noted.timings = event.timings if noted.timings is None else _longest(noted.timings, event.timings)
        elif isinstance(event, RequestFailed):
            noted.finish_reason = event.code
            self._failure = event
            if event.code == "deadline":
                self._metrics.rejected.labels("deadline").inc()

    # The client.

    def _watch(self, receive: Receive) -> None:
        self._watcher = asyncio.create_task(_until_gone(receive))
        self._watcher.add_done_callback(self._hung_up)

    def _hung_up(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled():
            self._gone = True
            self._wake.set()


async def _until_gone(receive: Receive) -> None:
    """Nothing else reads from here on: the body has come, what follows is the end of the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _longest(one: Timings, other: Timings) -> Timings:
    return Timings(max(one.queued, other.queued), max(one.prefill, other.prefill), max(one.decode, other.decode))
