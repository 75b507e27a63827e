"""Requests over HTTP, noted as they happen and read afterwards.

While the clock runs a recording only takes in what bytes came when, so that a client on the server's own cores costs
little. Knows OpenAI's completions and server-sent events; knows no workload and no server by name.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

EVENT_END = re.compile(rb"\r?\n\r?\n")
TIMEOUT = httpx.Timeout(600.0)
Call = tuple[float, bytes, int | None]  # when, in seconds from the start; the body; chunks to stay for, None: all


@dataclass(frozen=True, slots=True)
class Recording:
    """What came over the wire, unread."""

    started: float  # seconds on the monotonic clock
    seconds: float  # from sending to the end
    status: int | None  # None if no answer came
    chunks: tuple[tuple[float, bytes], ...]  # (seconds since sending, bytes)
    failure: str | None = None  # what broke the connection
    left: bool = False  # this end hung up, as it was to


@dataclass(frozen=True, slots=True)
class Answer:
    """A recording, read. `error` is None only if every token came and the stream was closed properly."""

    error: str | None
    tokens: int = 0
    cached_tokens: int | None = None  # input tokens that the server says it did not compute again
    arrivals: tuple[float, ...] = ()  # of events with text, seconds since sending
    text: str = ""


def unheard() -> None:
    """Nobody asks when an answer has come."""


async def drive(
    url: str, bodies: Sequence[bytes], concurrency: int, key: str | None = None, answered: Callable[[], None] = unheard
) -> list[Recording]:
    """POST every body to `url`, `concurrency` at a time, and return the recordings in the bodies' order.

    Client w takes bodies w, w + concurrency, … one after the other, so that where `concurrency` is a multiple of the
    number of prompts each client stays with one: the kindest order for servers that keep a cache per slot.
    """
    recordings: dict[int, Recording] = {}
    async with _client(concurrency, key) as client:

        async def work(worker: int) -> None:
            for i in range(worker, len(bodies), concurrency):
                recordings[i] = await _record(client, url, bodies[i])
                answered()

        await asyncio.gather(*(work(worker) for worker in range(concurrency)))
    return [recordings[i] for i in range(len(bodies))]


async def drive_by_the_clock(
    url: str,
    calls: Sequence[Call],
    key: str | None = None,
    answered: Callable[[], None] = unheard,
) -> list[Recording]:
    """Make every call at its time, whatever became of those before it; recordings in the calls' order."""
    async with _client(len(calls), key) as client:

        async def call(at: float, body: bytes, stay: int | None) -> Recording:
            await asyncio.sleep(at)
            recording = await _record(client, url, body, stay)
            answered()
            return recording

        return list(await asyncio.gather(*(call(*each) for each in calls)))


def _client(connections: int, key: str | None) -> httpx.AsyncClient:
    """A connection for each request: some servers close a kept one just when the next request is on its way."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)
    return httpx.AsyncClient(headers=headers, timeout=TIMEOUT, limits=limits, trust_env=False)


async def _record(client: httpx.AsyncClient, url: str, body: bytes, stay: int | None = None) -> Recording:
    """`stay`: hang up after so many chunks."""
    started = time.monotonic()
    status, failure, left = None, None, False
    chunks: list[tuple[float, bytes]] = []
    try:
        async with client.stream("POST", url, content=body) as response:
            status = response.status_code
            async for chunk in response.aiter_raw():
                chunks.append((time.monotonic() - started, chunk))
                if left := len(chunks) == stay:
                    break
    except httpx.HTTPError as error:
        failure = type(error).__name__
    return Recording(started, time.monotonic() - started, status, tuple(chunks), failure, left)


def read(recording: Recording, max_tokens: int) -> Answer:
    """What a recording says, whether it was streamed or not. Anything but `max_tokens` tokens is an error."""
    if recording.failure:
        return Answer(recording.failure)
    if recording.status != 200:
        return Answer(f"http {recording.status}")
    try:
        events, closed = _events(recording.chunks)
    except ValueError:
        return Answer("not JSON")
    arrivals: list[float] = []
    text = ""
    usage: dict[str, Any] = {}
    for at, event in events:
        if "error" in event:
            return Answer("error in a 200")
        if piece := "".join(choice.get("text") or "" for choice in event.get("choices", ())):
            arrivals.append(at)
            text += piece
        usage = event.get("usage") or usage
    if not closed:
        return Answer("cut off")
    tokens = usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    error = None if tokens == max_tokens else f"{tokens} tokens, not {max_tokens}"
    return Answer(error, tokens, cached, tuple(arrivals), text)


def _events(chunks: Sequence[tuple[float, bytes]]) -> tuple[list[tuple[float, dict[str, Any]]], bool]:
    """The JSON objects of a body with the time when each was complete, and whether the body came to its proper end.

    Raises ValueError where something is not JSON.
    """
    whole = b"".join(chunk for _, chunk in chunks)
    if whole.lstrip()[:1] == b"{":
        return [(chunks[-1][0], json.loads(whole))], True
    events: list[tuple[float, dict[str, Any]]] = []
    closed, rest = False, b""
    for at, chunk in chunks:
        *complete, rest = EVENT_END.split(rest + chunk)
        for block in complete:
            data = b"\n".join(line[5:].strip() for line in block.splitlines() if line.startswith(b"data:"))
            if data == b"[DONE]":
                closed = True
            elif data:
                events.append((at, json.loads(data)))
    return events, closed
