"""How often a server's next token is the dense model's: what the weights of a contestant cost, beside what they win.

The dense model writes texts, sampled, and is asked what comes next at cuts of them; so is every contestant, greedily.
Two servers of the same weights in the same type differ at near ties alone, which shows what a difference means. Knows
forms and answers; knows no server by name.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.forms import Form
from bench.wire import Answer, drive, read
from bench.workload import Job

CUTS = 6  # of each text
CONCURRENCY = 32


@dataclass(frozen=True, slots=True)
class Fidelity:
    """`share` of the contexts, those with an error aside, whose next token is the dense model's; None of none."""

    asked: int
    errors: dict[str, int]
    share: float | None
    client_cpu: float

    def headline(self) -> str:
        """In a line."""
        share = float("nan") if self.share is None else self.share
        return f"{share:.1%} of next tokens as the dense model's, {sum(self.errors.values())} errors"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Measure:
    """Contexts, and what the dense model says next."""

    contexts: Sequence[str]
    truth: Sequence[Answer]
    errors: Counter[str]  # of the dense model's server

    @classmethod
    def of(cls, url: str, jobs: Sequence[Job], form: Form) -> Measure:
        """From the server of the dense model, which writes `max_tokens` tokens behind each job's text."""
        bodies = [form(job) | {"max_tokens": job.max_tokens, "temperature": 1, "seed": i} for i, job in enumerate(jobs)]
        written = _ask(url, bodies, [job.max_tokens for job in jobs])
        contexts = [
            context
            for job, answer in zip(jobs, written, strict=True)
            for context in _cuts(f"{job.text}{answer.text}", behind=len(job.text))
        ]
        truth = _next(url, contexts, form)
        return cls(contexts, truth, Counter(f"dense: {each.error}" for each in (*written, *truth) if each.error))

    def compare(self, url: str, form: Form) -> Fidelity:
        """A server with the dense model."""
        began, before = time.monotonic(), time.process_time()
        answers = _next(url, self.contexts, form)
        cpu = (time.process_time() - before) / (time.monotonic() - began)
        pairs = [(a, b) for a, b in zip(answers, self.truth, strict=True) if a.error is None and b.error is None]
        same = sum(a.text == b.text for a, b in pairs)
        errors = self.errors + Counter(answer.error for answer in answers if answer.error)
        return Fidelity(len(self.contexts), dict(errors), same / len(pairs) if pairs else None, cpu)


def _cuts(text: str, behind: int) -> list[str]:
    """Beginnings of a text that end with a word, all of them longer than `behind` characters."""
    ends = [i for i in range(behind, len(text)) if text[i] == " " and text[i - 1] != " "]
    return [text[: ends[len(ends) * i // CUTS]] for i in range(CUTS)] if len(ends) >= CUTS else []


def _next(url: str, contexts: Sequence[str], form: Form) -> list[Answer]:
    bodies = [form(Job(context, 0)) | {"max_tokens": 1, "temperature": 0} for context in contexts]
    return _ask(url, bodies, [1] * len(bodies))


def _ask(url: str, bodies: Sequence[dict[str, Any]], tokens: Sequence[int]) -> list[Answer]:
    sent = [json.dumps(body | {"ignore_eos": True}).encode() for body in bodies]
    recordings = asyncio.run(drive(f"{url}/v1/completions", sent, CONCURRENCY))
    return [read(recording, each) for recording, each in zip(recordings, tokens, strict=True)]
