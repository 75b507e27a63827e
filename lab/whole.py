"""How far a command of several steps is, and when all of it ends.

Each step brings an estimate in seconds; what it reports on its way sharpens the end of that step, and the steps to come
count as they were estimated. Knows no step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta

from lab.progress import Report

SURE = 0.1  # share of a part after which its own pace is believed, not the estimate


class Whole:
    """Hands out a `Report` for each step of `estimates` (seconds, in order); all of them end up in one."""

    def __init__(
        self,
        estimates: Mapping[str, float],
        report: Report,
        *,
        ends: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ends`: tell the end of all; not where this is itself a step of something longer."""
        self._estimates, self._report, self._ends, self._clock = dict(estimates), report, ends, clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[Report]:
        """Of the step while it runs. `seconds` holds what it took, if nothing was raised."""
        names = list(self._estimates)
        place = f"{names.index(name) + 1} of {len(names)} {name}"
        began = self._clock()
        part, since, first = "", began, 0

        def report(step: str, done: int, total: int) -> None:
            nonlocal part, since, first
            now = self._clock()
            if (called := step.partition(",")[0]) != part:
                part, since, first = called, now, done
            left = max(0.0, self._estimates[name] - (now - began))
            if total and first < done and done - first >= SURE * (total - first):
                left = max(left if done < total else 0.0, (now - since) * (total - done) / (done - first))
            end = f", all done about {self._end(name, left)}" if self._ends else ""
            self._report(f"{place}: {step}{end}", done, total)

        report("start", 0, 0)
        yield report
        self.seconds[name] = round(self._clock() - began, 1)

    def _end(self, name: str, left: float) -> str:
        names = list(self._estimates)
        later = sum(self._estimates[each] for each in names[names.index(name) + 1 :])
        return f"{datetime.now() + timedelta(seconds=left + later):%H:%M}"
