"""Calls of the registry from the event loop: each in a thread, each timed, each change counted.

Knows no meaning of a call; the store's errors pass through.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar
from zlib import crc32

from anyio import CancelScope, CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool

from server.metrics import Metrics

P = ParamSpec("P")
R = TypeVar("R")
PATIENT = 16  # threads that wait for the engine
NICE = 10  # of uploads, on Linux: a tenth of what a computing thread gets where both want a core
EPOCHS = 4096  # counted apart; tasks that share one are asked for anew with each other, whatever names clients try


class Registry:
    """Runs the store's functions where they may block. `alone`: no other process can change the store.

    What waits for the engine besides, which may be busy for long, has threads of its own: else forty self-tests would
    hold up every look-up, and the probes that say whether the server lives. Uploads give way to who computes: where two
    threads share a step, one that is kept off its core holds up both.
    """

    def __init__(self, metrics: Metrics, backend: str) -> None:
        self._seconds = metrics.store_duration
        self._backend = backend
        self.alone = backend == "directory"
        self._epochs = [0] * EPOCHS
        self._patient = CapacityLimiter(PATIENT)
        self._pushing = ThreadPoolExecutor(PATIENT, "push", _give_way)

    def epoch(self, task: str | None) -> int:
        """How often the task was changed here, or, None, the keys: what was read in a former epoch may be old."""
        return self._epochs[_slot(task)]

    async def read(self, op: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`function(*args)`; `op` names it in the metrics."""
        return await self._timed(op, run_in_threadpool(function, *args, **kwargs))

    async def change(self, op: str, task: str | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The same for what may alter a task or, None, the keys, even where it raises."""
        try:
            return await self.read(op, function, *args, **kwargs)
        finally:
            self._epochs[_slot(task)] += 1

    async def push(self, task: str, function: Callable[[], R]) -> R:
        """`change` for an upload, which waits for the engine, too."""
        try:
            return await self._timed("push", self._giving_way(function))
        finally:
            self._epochs[_slot(task)] += 1

    async def _giving_way(self, function: Callable[[], R]) -> R:
        running = asyncio.get_running_loop().run_in_executor(self._pushing, copy_context().run, function)
        with CancelScope(shield=True):  # the thread cannot be called back
            await asyncio.wait([running])
        return running.result()

    async def wait(self, function: Callable[[], R]) -> R:
        """`function()`, which waits for the engine."""
        return await to_thread.run_sync(function, limiter=self._patient)

    async def _timed(self, op: str, call: Awaitable[R]) -> R:
        started = time.monotonic()
        try:
            return await call
        finally:
            self._seconds.labels(op, self._backend).observe(time.monotonic() - started)


def _give_way() -> None:
    """Elsewhere than on Linux, niceness is a process's."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICE)


def _slot(task: str | None) -> int:
    return crc32((task or "").encode()) % EPOCHS
