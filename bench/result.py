"""The figures of a run, made from its answers.

Knows quantiles and ratios; knows no wire and no server.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from rich.table import Table

from bench.wire import Recording, read


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Latencies in milliseconds, over good answers only; throughput counts only their tokens.

    Quantiles are None where nothing was there to take them of (no stream, no good answer).
    """

    requests: int
    errors: dict[str, int]  # what went wrong -> how often
    hung_up: int  # clients that left in the midst of an answer, as they were to: neither good nor wrong
    seconds: float
    output_tokens_per_second: float
    requests_per_second: float
    text_tokens: int  # sent, soft positions not counted
    cached_tokens: int | None  # input tokens that the server says it did not compute again
    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None  # between events with text
    itl_p99: float | None
    latency_p50: float | None
    latency_p99: float | None
    client_cpu: float  # cores that the load generator itself kept busy

    def headline(self) -> str:
        """In a line."""
        return f"{self.output_tokens_per_second:.0f} tokens/s, {sum(self.errors.values())} errors"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Times to the first token of the same texts with a warm prompt and without, one request at a time."""

    pairs: int
    errors: dict[str, int]
    with_prompt_p50: float | None  # milliseconds
    without_p50: float | None
    ratio: float | None  # median of the pairs' ratios
    ratio_low: float | None  # quartiles of the same
    ratio_high: float | None
    client_cpu: float

    def headline(self) -> str:
        """In a line."""
        return f"{self.ratio or float('nan'):.2f} x the time without, {sum(self.errors.values())} errors"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Start:
    """A server started anew, with everything on disk read before, up to the end of its first answer."""

    errors: dict[str, int]
    ready_seconds: float
    first_answer_seconds: float
    client_cpu: float = 0.0

    def headline(self) -> str:
        """In a line."""
        return f"{self.first_answer_seconds:.1f} s to the first answer, {sum(self.errors.values())} errors"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    recordings: Sequence[Recording],
    max_tokens: Sequence[int],
    text_tokens: int,
    cpu_seconds: float,
    beside: Mapping[str, int] = MappingProxyType({}),
) -> Result:
    """Figures of answers and the tokens asked of each, of the CPU that the client burnt, of what went wrong beside."""
    stayed = [(read(r, tokens), r) for r, tokens in zip(recordings, max_tokens, strict=True) if not r.left]
    good = [(answer, recording) for answer, recording in stayed if answer.error is None]
    seconds = max(r.started + r.seconds for r in recordings) - min(r.started for r in recordings)
    first = [answer.arrivals[0] for answer, _ in good if len(answer.arrivals) > 1]
    gaps = [b - a for answer, _ in good for a, b in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
    latencies = [recording.seconds for _, recording in good]
    cached = [answer.cached_tokens for answer, _ in good if answer.cached_tokens is not None]
    return Result(
        requests=len(recordings),
        errors=dict(Counter(answer.error for answer, _ in stayed if answer.error)) | dict(beside),
        hung_up=len(recordings) - len(stayed),
        seconds=seconds,
        output_tokens_per_second=sum(answer.tokens for answer, _ in good) / seconds,
        requests_per_second=len(good) / seconds,
        text_tokens=text_tokens,
        cached_tokens=sum(cached) if cached else None,
        ttft_p50=_milliseconds(first, 50),
        ttft_p99=_milliseconds(first, 99),
        itl_p50=_milliseconds(gaps, 50),
        itl_p99=_milliseconds(gaps, 99),
        latency_p50=_milliseconds(latencies, 50),
        latency_p99=_milliseconds(latencies, 99),
        client_cpu=cpu_seconds / seconds,
    )


def compare_first_tokens(
    pairs: Sequence[tuple[Recording, Recording]], max_tokens: int, cpu_seconds: float
) -> FirstToken:
    """`pairs` are the recordings of one text with the prompt and without. A pair with an error does not count."""
    answers = [(read(a, max_tokens), read(b, max_tokens)) for a, b in pairs]
    good = [(a.arrivals[0], b.arrivals[0]) for a, b in answers if a.error is None and b.error is None]
    ratios = [a / b for a, b in good]
    return FirstToken(
        pairs=len(pairs),
        errors=dict(Counter(answer.error for pair in answers for answer in pair if answer.error)),
        with_prompt_p50=_milliseconds([a for a, _ in good], 50),
        without_p50=_milliseconds([b for _, b in good], 50),
        ratio=quantile(ratios, 50),
        ratio_low=quantile(ratios, 25),
        ratio_high=quantile(ratios, 75),
        client_cpu=cpu_seconds / sum(recording.seconds for pair in pairs for recording in pair),
    )


def quantile(values: Sequence[float], percent: int) -> float | None:
    """Linear between neighbours; None of nothing."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _milliseconds(seconds: Sequence[float], percent: int) -> float | None:
    value = quantile(seconds, percent)
    return None if value is None else 1e3 * value


def table(title: str, figures: Result | FirstToken) -> Table:
    """For people."""
    rows = Table(title=title, show_header=False)
    for name, value in figures.as_json().items():
        text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value or 0)
        rows.add_row(name.replace("_", " "), text)
    return rows
