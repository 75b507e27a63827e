"""A load on a server that speaks OpenAI's HTTP, the same for every server.

Knows bodies, paces and what came back; what is asked is `bench.workload`'s business.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.forms import Form
from bench.result import FirstToken, Result, compare_first_tokens, summarise
from bench.uploads import uploading
from bench.wire import Call, Recording, drive, drive_by_the_clock, unheard
from bench.workload import Job

FEWEST_CHUNKS = 2  # before a client hangs up: it has seen a token


@dataclass(frozen=True, slots=True)
class Pace:
    """How jobs are sent: `concurrency` at a time, or `rate` a second by the clock, at exponential distances (a Poisson
    process), where the share `hang_up` of the clients leaves in the midst of its answer; and what goes on beside."""

    concurrency: int = 32
    rate: float | None = None
    hang_up: float = 0.0
    uploads: float = 0.0  # prompts a second
    seed: int = 0


def run(
    url: str,
    jobs: Sequence[Job],
    form: Form,
    pace: Pace,
    *,
    stream: bool = True,
    key: str | None = None,
    upload: tuple[str, bytes] = ("", b""),
    answered: Callable[[], None] = unheard,
) -> Result:
    """Drive the server at `url` (without /v1) with the jobs, greedily, to exactly the tokens that each asks for.

    `upload`: where to `pace.uploads` puts a prompt, again and again with other bytes. `answered` is called after each
    answer.
    """
    calls = _calls(jobs, form, pace, stream)
    before = time.process_time()
    recordings, wrong = asyncio.run(_drive(url, calls, pace, key, upload, answered))
    seconds = time.process_time() - before
    return summarise(recordings, [job.max_tokens for job in jobs], sum(job.text_tokens for job in jobs), seconds, wrong)


async def _drive(
    url: str, calls: list[Call], pace: Pace, key: str | None, upload: tuple[str, bytes], answered: Callable[[], None]
) -> tuple[list[Recording], Mapping[str, int]]:
    """The recordings, and what went wrong beside them."""
    target, bodies = f"{url}/v1/completions", [body for _, body, _ in calls]
    if pace.rate is not None:
        return await drive_by_the_clock(target, calls, key, answered), {}
    if not pace.uploads:
        return await drive(target, bodies, pace.concurrency, key, answered), {}
    path, prompt = upload
    async with uploading(f"{url}{path}", pace.uploads, prompt, key, pace.seed) as wrong:
        recordings = await drive(target, bodies, pace.concurrency, key, answered)
    return recordings, wrong


def _calls(jobs: Sequence[Job], form: Form, pace: Pace, stream: bool) -> list[Call]:
    """With the times and the chunks to stay for that a load by the clock has."""
    draw, at, calls = random.Random(pace.seed), 0.0, list[Call]()
    for job in jobs:
        leaves = draw.random() < pace.hang_up
        stay = draw.randint(FEWEST_CHUNKS, max(FEWEST_CHUNKS, job.max_tokens // 2)) if leaves else None
        calls.append((at, _body(form, job, stream), stay))
        at += draw.expovariate(pace.rate) if pace.rate else 0.0
    return calls


def first_tokens(
    url: str, jobs: Sequence[Job], form: Form, *, key: str | None = None, answered: Callable[[], None] = unheard
) -> FirstToken:
    """Ask each job's text with its prompt and without, one at a time, in turns first and second.

    Every prompt is used once before, so that it is warm; no text is sent twice in the same form.
    """
    tokens = 2
    warm_up = list(jobs[: len({job.prompt for job in jobs})])  # prompts take turns
    ours: list[Job] = []
    for i, job in enumerate(jobs[len(warm_up) :]):
        ours += [job, replace(job, prompt=None)][:: 1 if i % 2 else -1]
    bodies = [_body(form, replace(job, max_tokens=tokens), stream=True) for job in warm_up + ours]
    before = time.process_time()
    recordings = asyncio.run(drive(f"{url}/v1/completions", bodies, 1, key, answered))[len(warm_up) :]
    return compare_first_tokens(_pairs(recordings, ours), tokens, time.process_time() - before)


def _pairs(recordings: Sequence[Recording], jobs: Sequence[Job]) -> list[tuple[Recording, Recording]]:
    """(with the prompt, without), whichever was asked first."""
    twos = zip(recordings[::2], recordings[1::2], jobs[::2], strict=True)
    return [(a, b) if job.prompt else (b, a) for a, b, job in twos]


def _body(form: Form, job: Job, stream: bool) -> bytes:
    body: dict[str, Any] = form(job) | {"max_tokens": job.max_tokens, "temperature": 0, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()
