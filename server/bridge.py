"""From the engine's thread to the event loop: many events, one wake-up.

The engine's thread and the loop share one interpreter lock, so each crossing costs tokens. Whatever the engine posts
while the loop has not yet run travels together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Bridge:
    """Calls functions on the loop, in the order in which other threads post them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[Callable[[], None]] = deque()
        self._awake = False  # whether the loop is due to look; may be True once too often, never too seldom

    def post(self, deliver: Callable[[], None]) -> None:
        """From any thread. After the loop has closed, nothing happens."""
        self._posted.append(deliver)
        if not self._awake:
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._posted.clear()

    def _deliver(self) -> None:
        self._awake = False  # before looking, so that whoever posts from here on wakes the loop again
        while self._posted:
            self._posted.popleft()()
