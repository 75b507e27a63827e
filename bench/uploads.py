"""A steady stream of uploads beside a load: versions of one task, each with other bytes, so that none is known already.

Knows the registry's upload; knows no load.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from itertools import count

import httpx


@contextlib.asynccontextmanager
async def uploading(
    url: str, rate: float, prompt: bytes, key: str | None = None, seed: int = 0
) -> AsyncIterator[Counter[str]]:
    """`rate` POSTs a second to `url` of `prompt`, a safetensors file in fp32 whose last two numbers, by less than a
    percent, are others each time, and others for another seed.

    Gives what went wrong so far, and how often; ends what is under way with the block.
    """
    wrong: Counter[str] = Counter()
    headers = {"content-type": "application/octet-stream"} | ({"authorization": f"Bearer {key}"} if key else {})
    async with httpx.AsyncClient(headers=headers, timeout=60, trust_env=False) as client, asyncio.TaskGroup() as tasks:
        clock = tasks.create_task(_by_the_clock(client, url, rate, (prompt, seed), wrong, tasks))
        yield wrong
        clock.cancel()


async def _by_the_clock(
    client: httpx.AsyncClient,
    url: str,
    rate: float,
    what: tuple[bytes, int],
    wrong: Counter[str],
    tasks: asyncio.TaskGroup,
) -> None:
    start = asyncio.get_running_loop().time()
    for number in count():
        await asyncio.sleep(start + number / rate - asyncio.get_running_loop().time())
        tasks.create_task(_upload(client, url, _variant(*what, number), wrong))


async def _upload(client: httpx.AsyncClient, url: str, body: bytes, wrong: Counter[str]) -> None:
    try:
        status = (await client.post(url, content=body)).status_code
    except httpx.HTTPError as error:
        wrong[f"upload: {type(error).__name__}"] += 1
        return
    if status != 201:
        wrong[f"upload: http {status}"] += 1


def _variant(prompt: bytes, seed: int, number: int) -> bytes:
    """Other bytes in the lower halves of the last two fp32 numbers."""
    return b"".join((prompt[:-8], seed.to_bytes(2, "little"), prompt[-6:-4], number.to_bytes(2, "little"), prompt[-2:]))
