"""How far a long command is and when it ends: a bar where someone watches stderr, else a line now and then.

Both hear the same call, `report(step, done, total)`. Knows no run and no result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]  # step (may tell figures), done, in all (0 = unknown)
LINE_SECONDS = 30.0


def silent(step: str, done: int, total: int) -> None:
    """A report that nobody reads."""


@contextmanager
def progress(*, quiet: bool = False, stream: TextIO | None = None) -> Iterator[Report]:
    """A bar on `stream` (stderr) that goes away at the end, or lines every half minute where it is no terminal."""
    target = sys.stderr if stream is None else stream
    if quiet:
        yield silent
    elif target.isatty():
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(file=target), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total or None)
    else:
        yield Lines(target)


class Lines:
    """Writes `step: done of total (share), ends about time` when a step changes name, ends, or 30 s have gone by."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._step, self._since, self._first, self._told = "", 0.0, 0, 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        now, name = self._clock(), step.partition(",")[0]
        if name != self._step:
            self._step, self._since, self._first = name, now, done
        elif now - self._told < LINE_SECONDS and done != total:
            return
        self._told = now
        share = f" of {total} ({done / total:.0%})" if total else ""
        print(f"{step}: {done}{share}{self._end(now, done, total)}", file=self._stream, flush=True)

    def _end(self, now: float, done: int, total: int) -> str:
        gone, left = done - self._first, total - done
        if gone <= 0 or left <= 0:
            return ""
        end = datetime.now() + timedelta(seconds=(now - self._since) * left / gone)
        return f", ends about {end:%H:%M:%S}"
