"""The engine's life inside the server: loading, ready, leaving, gone. And who may come in meanwhile.

Knows when requests are taken and how many run; knows nothing of what they ask.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import anyio
import anyio.to_thread

from engine.api import Engine
from engine.request import Event, GenerationRequest, RequestDone, RequestFailed, SamplingParams
from server.errors import ApiError
from server.metrics import Metrics
from server.settings import Settings

logger = logging.getLogger("promptstitch.server")

STATS_SECONDS = 2.0  # an engine that cannot even be looked at in this time hangs
POLL_SECONDS = 0.05


class Phase(Enum):
    """The values are what /readyz says."""

    LOADING = "loading"  # the model is on its way; nothing is served
    READY = "ready"
    FAILED = "failed"  # the model could not be loaded; the process is about to end
    LEAVING = "leaving"  # told to stop: not ready any more, still taking requests, for those that had not heard
    DRAINING = "draining"  # finishing what is under way


class EngineHost:
    """One engine, from factory to close. Touched by the event loop only, but for `load`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._engine: Engine | None = None
        self._running: Counter[str | None] = Counter()  # key id -> requests under way
        self.phase = Phase.LOADING
        self.abandoned = False  # the loader's thread was left behind
        self._looking = anyio.CapacityLimiter(1)  # so that nobody else's threads decide whether this server lives

    @property
    def loaded(self) -> Engine | None:
        """The engine, if there is one."""
        return self._engine

    @property
    def engine(self) -> Engine:
        """The engine, for a request that needs it. Raises ApiError 503."""
        if self._engine is not None and self.phase in (Phase.READY, Phase.LEAVING):
            return self._engine
        if self.phase is Phase.DRAINING:
            raise ApiError(503, "server_is_draining", "this server is about to stop; ask another one", retry_after=5)
        raise ApiError(503, "server_is_loading", "the model is still being loaded", retry_after=5)

    @property
    def model_name(self) -> str:
        """What the base is called in the API. Raises ApiError 503 before it is known."""
        return self._settings.served_model_name or self.engine.info.model

    @property
    def running(self) -> int:
        """Inference requests under way."""
        return self._running.total()

    @contextmanager
    def place(self, key_id: str | None) -> Iterator[Engine]:
        """A place for one request, until the context is left. Raises ApiError 503, 429."""
        try:
            engine = self.engine
        except ApiError as refusal:
            self._metrics.rejected.labels(refusal.code.removeprefix("server_is_")).inc()
            raise
        limit = self._settings.key_concurrency
        if limit is not None and self._running[key_id] >= limit:
            self._metrics.rejected.labels("rate_limit").inc()
            message = f"this key has {limit} requests under way, as many as it may have"
            raise ApiError(429, "rate_limit_exceeded", message, retry_after=1)
        self._running[key_id] += 1
        try:
            yield engine
        finally:
            self._running[key_id] -= 1
            if not self._running[key_id]:
                del self._running[key_id]

    async def load(self, factory: Callable[[], Engine]) -> None:
        """Build the engine in a thread and let it speak one token. Raises what the factory raises.

        Cancelled, it leaves the thread behind: nothing stops a loader but the end of the process.
        """
        started = time.monotonic()
        try:
            engine = await anyio.to_thread.run_sync(_built, factory, abandon_on_cancel=True)
        except asyncio.CancelledError:
            self.abandoned = True
            raise
        except Exception:
            self.phase = Phase.FAILED
            raise
        self._engine = engine
        if self.phase is Phase.LOADING:  # a signal may have come meanwhile
            self.phase = Phase.READY
        logger.info("ready: %s at %s after %.1f s", engine.info.model, engine.info.level, time.monotonic() - started)

    async def live(self) -> bool:
        """Whether the engine's loop turns. True while there is none yet: loading takes its time."""
        if self._engine is None:
            return True
        try:
            async with asyncio.timeout(STATS_SECONDS):
                asked = anyio.to_thread.run_sync(self._engine.stats, abandon_on_cancel=True, limiter=self._looking)
                stats = await asked
        except TimeoutError:
            return False
        return stats.last_step_age <= self._settings.liveness_timeout

    async def leave(self) -> None:
        """From the first signal to the last answer: not ready, then closed to new requests, then idle or late."""
        self._enter(Phase.LEAVING, 1)
        await asyncio.sleep(self._settings.drain_delay)
        self._enter(Phase.DRAINING, 2)
        deadline = time.monotonic() + self._settings.drain
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Fail what is still under way, each with its own answer, and let the engine go."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await anyio.to_thread.run_sync(engine.close)

    def _enter(self, phase: Phase, state: int) -> None:
        logger.info("%s, %d requests under way", phase.value, self.running)
        self.phase = phase
        self._metrics.drain_state.set(state)


def _built(factory: Callable[[], Engine]) -> Engine:
    engine = factory()
    try:
        _warm_up(engine)
    except BaseException:
        engine.close()
        raise
    return engine


def _warm_up(engine: Engine) -> None:
    """One token: what is compiled or allocated at first use is so before the first client comes."""
    ended = threading.Event()
    failures: list[RequestFailed] = []

    def sink(events: Sequence[Event]) -> None:
        failures.extend(event for event in events if isinstance(event, RequestFailed))
        if isinstance(events[-1], RequestDone | RequestFailed):
            ended.set()

    ids = tuple(engine.tokenizer.encode("Hello"))
    engine.submit(GenerationRequest("warm-up", ids, sampling=SamplingParams(temperature=0, max_tokens=1)), sink)
    ended.wait()
    if failures:
        raise RuntimeError(f"the engine failed its first request: {failures[0].message}")
