"""A steady stream of uploads beside a load: versions of one task, each with other bytes, so that none is known already.

Plain sockets in threads, since a client on the server's own cores must cost little. Knows the registry's upload; knows
no load.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
from collections import Counter, deque
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from urllib.parse import urlsplit

CONNECTIONS = 16  # uploads under way at once; beyond them the clock's uploads wait for one another
PATIENCE = 60.0
ENOUGH = 0.95


@contextlib.asynccontextmanager
async def uploading(
    url: str, rate: float, prompt: bytes, key: str | None = None, seed: int = 0
) -> AsyncIterator[Counter[str]]:
    """`rate` POSTs a second to `url` of `prompt`, a safetensors file in fp32 whose last two numbers, by less than a
    percent, are others each time, and others for another seed.

    Gives what went wrong and how often, which is complete when the block has ended, and with it what was under way.
    Fewer than ENOUGH of those that were due being done by then is wrong, too: the load did not have them beside it.
    """
    wrong: Counter[str] = Counter()
    headers = {"content-type": "application/octet-stream"} | ({"authorization": f"Bearer {key}"} if key else {})
    sent: list[Future[str | None]] = []
    done = 0
    with contextlib.closing(_Client(url, headers)) as client, ThreadPoolExecutor(CONNECTIONS) as pool:

        async def by_the_clock() -> None:
            start = asyncio.get_running_loop().time()
            for number in count():
                await asyncio.sleep(start + number / rate - asyncio.get_running_loop().time())
                sent.append(pool.submit(client.post, _variant(prompt, seed, number)))

        clock = asyncio.create_task(by_the_clock())
        try:
            yield wrong
        finally:
            clock.cancel()
            done = sum(future.done() for future in sent)
            with contextlib.suppress(asyncio.CancelledError):
                await clock
    if done + 1 < ENOUGH * len(sent):  # the last one may have been sent just now
        wrong[f"uploads too slow: {done} of {len(sent)} in time"] += 1
    wrong.update(error for future in sent if (error := future.result()) is not None)


class _Client:
    """Uploads over connections that are kept. Thread-safe."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._host, self._path = parts.netloc, f"{parts.path}?{parts.query}" if parts.query else parts.path
        self._headers = headers
        self._idle: deque[http.client.HTTPConnection] = deque()

    def post(self, body: bytes) -> str | None:
        """What went wrong."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = http.client.HTTPConnection(self._host, timeout=PATIENCE)
        try:
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return f"upload: {type(error).__name__}"
        self._idle.append(connection)
        return None if response.status == 201 else f"upload: http {response.status}"

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def _variant(prompt: bytes, seed: int, number: int) -> bytes:
    """Other bytes in the lower halves of the last two fp32 numbers."""
    return b"".join((prompt[:-8], seed.to_bytes(2, "little"), prompt[-6:-4], number.to_bytes(2, "little"), prompt[-2:]))
