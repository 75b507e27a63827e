"""Calls of the registry from the event loop: each in a thread, each timed, each change counted.

Knows no meaning of a call; the store's errors pass through.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool

from server.metrics import Metrics

P = ParamSpec("P")
R = TypeVar("R")


class Registry:
    """Runs the store's functions where they may block. `alone`: no other process can change the store."""

    def __init__(self, metrics: Metrics, backend: str) -> None:
        self._seconds = metrics.store_duration
        self._backend = backend
        self.alone = backend == "directory"
        self._epochs: Counter[str | None] = Counter()

    def epoch(self, task: str | None) -> int:
        """How often the task was changed here, or, None, the keys: what was read in a former epoch may be old."""
        return self._epochs[task]

    async def read(self, op: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """`function(*args)`; `op` names it in the metrics."""
        started = time.monotonic()
        try:
            return await run_in_threadpool(function, *args, **kwargs)
        finally:
            self._seconds.labels(op, self._backend).observe(time.monotonic() - started)

    async def change(self, op: str, task: str | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The same for what may alter a task or, None, the keys, even where it raises."""
        try:
            return await self.read(op, function, *args, **kwargs)
        finally:
            self._epochs[task] += 1
