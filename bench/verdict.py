"""What a race says: medians over its rounds, ratios within a round, and whether they hold what was claimed.

Pure arithmetic over measurements; runs nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.race import BARE, FIRST_TOKEN, STITCHED, Measured
from bench.result import FirstToken, Result

OURS, PACKED = "promptstitch", "promptstitch-w4g64"


@dataclass(frozen=True, slots=True)
class Claim:
    """Ours against a peer in tokens a second, or our time to the first token with a prompt against without."""

    workload: str
    peer: str | None  # beginning of its name; of several the fastest of the round counts
    at_least: float | None = None
    at_most: float | None = None
    ours: str = OURS

    @property
    def text(self) -> str:
        return f"{self.workload}: {self.ours} / {self.peer or 'itself without'}"

    def holds(self, ratio: float) -> bool:
        return ratio >= (self.at_least or 0.0) and ratio <= (self.at_most or float("inf"))


CLAIMS = (
    Claim(STITCHED, "vllm", at_least=1.0),
    Claim(STITCHED, "llama.cpp", at_least=2.4),
    Claim(BARE, "vllm", at_least=0.9),
    Claim(STITCHED, "llama.cpp", at_least=4.0, ours=PACKED),
    Claim(STITCHED, "vllm", at_least=1.6, ours=PACKED),  # across classes: its weights are bf16
    Claim(FIRST_TOKEN, None, at_most=1.15),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim beside what was measured: the median of the rounds' ratios, the lowest and the highest."""

    claim: str
    bound: str
    median: float
    low: float
    high: float
    ok: bool


def judge(measured: Sequence[Measured], claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """A verdict for each claim whose contestants took part."""
    verdicts = []
    for claim in claims:
        ratios = [
            ratio
            for number in sorted({m.round for m in measured})
            if (ratio := _ratio([m for m in measured if m.round == number], claim)) is not None
        ]
        if ratios:
            bound = f">= {claim.at_least}" if claim.at_least else f"<= {claim.at_most}"
            median = statistics.median(ratios)
            verdicts.append(Verdict(claim.text, bound, median, min(ratios), max(ratios), claim.holds(median)))
    return verdicts


def _ratio(one_round: Sequence[Measured], claim: Claim) -> float | None:
    """None where the round lacks a side."""
    figures = {m.contestant: m.figures for m in one_round if m.workload == claim.workload}
    mine = figures.get(claim.ours)
    if claim.peer is None:
        return mine.ratio if isinstance(mine, FirstToken) else None
    peers = [
        f.output_tokens_per_second
        for name, f in figures.items()
        if name.startswith(claim.peer) and isinstance(f, Result)
    ]
    best = max(peers, default=0.0)
    return mine.output_tokens_per_second / best if isinstance(mine, Result) and best else None


def medians(measured: Sequence[Measured]) -> dict[tuple[str, str], dict[str, float | None]]:
    """(contestant, workload) -> the median over the rounds of every figure that is a number."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for m in measured:
        groups.setdefault((m.contestant, m.workload), []).append(m)
    return {key: _medians(group) for key, group in groups.items()}


def _medians(group: Sequence[Measured]) -> dict[str, float | None]:
    rows = [{**m.figures.as_json(), "others_cpu": m.others_cpu, "server_cpu": m.server_cpu} for m in group]
    columns = {name: [row[name] for row in rows if isinstance(row[name], (int, float))] for name in rows[0]}
    return {name: statistics.median(values) if values else None for name, values in columns.items()}
