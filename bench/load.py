"""A closed-loop load generator that speaks OpenAI's HTTP, one for every server.

    python -m bench.load --checkpoint DIR --url http://127.0.0.1:8000 --model base --prompts 'general@1,task2'

Sends a workload to POST /v1/completions and reports throughput, latencies, every error and its own share of the CPU.
With `--ttft` it compares the time to the first token with and without a warm prompt instead.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.forms import Form, named, prompt_embeds, text_prefix
from bench.result import FirstToken, Result, compare_first_tokens, summarise, table
from bench.wire import Recording, drive
from bench.workload import Job, Workload, load_tokenizer


class FormName(StrEnum):
    named = "named"
    prefix = "prefix"
    embeds = "embeds"


def run(
    url: str, jobs: Sequence[Job], form: Form, workload: Workload, *, stream: bool = True, key: str | None = None
) -> Result:
    """Drive the server at `url` (without /v1) with the jobs, greedily, to exactly `workload.max_tokens` tokens each."""
    bodies = [_body(form, job, workload.max_tokens, stream) for job in jobs]
    before = time.process_time()
    recordings = asyncio.run(drive(f"{url}/v1/completions", bodies, workload.concurrency, key))
    text_tokens = sum(job.text_tokens for job in jobs)
    return summarise(recordings, workload.max_tokens, text_tokens, time.process_time() - before)


def first_tokens(url: str, jobs: Sequence[Job], form: Form, *, key: str | None = None) -> FirstToken:
    """Ask each job's text with its prompt and without, one at a time, in turns first and second.

    Every prompt is used once before, so that it is warm; no text is sent twice in the same form.
    """
    tokens = 2
    warm_up = list(jobs[: len({job.prompt for job in jobs})])  # prompts take turns
    ours: list[Job] = []
    for i, job in enumerate(jobs[len(warm_up) :]):
        ours += [job, replace(job, prompt=None)][:: 1 if i % 2 else -1]
    bodies = [_body(form, job, tokens, stream=True) for job in warm_up + ours]
    before = time.process_time()
    recordings = asyncio.run(drive(f"{url}/v1/completions", bodies, 1, key))[len(warm_up) :]
    return compare_first_tokens(_pairs(recordings, ours), tokens, time.process_time() - before)


def _pairs(recordings: Sequence[Recording], jobs: Sequence[Job]) -> list[tuple[Recording, Recording]]:
    """(with the prompt, without), whichever was asked first."""
    twos = zip(recordings[::2], recordings[1::2], jobs[::2], strict=True)
    return [(a, b) if job.prompt else (b, a) for a, b, job in twos]


def _body(form: Form, job: Job, max_tokens: int, stream: bool) -> bytes:
    body: dict[str, Any] = form(job) | {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the served model; its tokenizer measures the texts.")],
    url: Annotated[str, typer.Option(help="Server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Name of the bare model.")] = "base",
    prompts: Annotated[str, typer.Option(help="Comma-separated names, taken in turns; empty: none.")] = "",
    form: Annotated[
        FormName,
        typer.Option(
            help="named: a prompt is a `model`; prefix: a cached text of 64 tokens; embeds: vectors in the request."
        ),
    ] = FormName.named,
    prompt_dir: Annotated[Path | None, typer.Option(help="For embeds: folder of {prompt}.safetensors.")] = None,
    requests: int = 96,
    concurrency: int = 32,
    max_tokens: int = 64,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest text.")] = 32,
    longest: Annotated[int, typer.Option(help="Tokens of the longest text.")] = 128,
    corpus: Annotated[Path | None, typer.Option(help="Text file to cut from; without: random words.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other texts.")] = 0,
    stream: bool = True,
    ttft: Annotated[bool, typer.Option("--ttft", help="Compare first tokens with and without a warm prompt.")] = False,
    key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Bearer key.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Put a load on a server and report what it did. Exits 1 if a request failed."""
    tokenizer = load_tokenizer(checkpoint)
    names: tuple[str | None, ...] = tuple(prompts.split(",")) if prompts else (None,)
    workload = Workload(requests, concurrency, max_tokens, shortest, longest, names, seed)
    if form is FormName.embeds and prompt_dir is None:
        raise typer.BadParameter("--form embeds reads the vectors from --prompt-dir")
    if ttft and not prompts:
        raise typer.BadParameter("--ttft compares with a prompt: give --prompts")
    if form is FormName.prefix:
        speak = text_prefix(model, tokenizer)
    elif prompt_dir is not None:
        speak = prompt_embeds(model, tokenizer, checkpoint, prompt_dir, torch.bfloat16)
    else:
        speak = named(model)
    jobs = workload.jobs(tokenizer, corpus)
    figures = (
        first_tokens(url, jobs, speak, key=key) if ttft else run(url, jobs, speak, workload, stream=stream, key=key)
    )
    Console().print(table(f"{url} ({form})", figures))
    if json_file:
        json_file.write_text(json.dumps(figures.as_json(), indent=2) + "\n")
    raise typer.Exit(bool(figures.errors))


if __name__ == "__main__":
    typer.run(main)
