"""What a race says: medians over its rounds, ratios within a round, and whether they hold what was claimed.

Pure arithmetic over measurements; runs nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from bench.fidelity import Fidelity
from bench.plan import Claim, matches
from bench.race import Measured


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim beside what was measured: the median of the rounds' ratios, the lowest and the highest. `ok` is None, and
    the figures too, where no round has both sides. `share` and `peer_share`: of next tokens that are the dense model's,
    where the weights of the two are not of one kind."""

    line: str
    what: str
    ours: str
    peer: str  # the best of most rounds; empty where there is none
    bound: str
    aim: float | None
    median: float | None
    low: float | None
    high: float | None
    ok: bool | None
    share: float | None = None
    peer_share: float | None = None
    absent: tuple[str, ...] = ()  # peers that the claim names and that took no part: it holds against the others alone


@dataclass(frozen=True, slots=True)
class _Ratio:
    value: float
    ours: str
    peer: str


def judge(measured: Sequence[Measured], claims: Sequence[Claim]) -> list[Verdict]:
    """A verdict for each claim, or, where it says `each`, for each of ours that took part."""
    verdicts = []
    for claim in claims:
        taking = dict.fromkeys(m.contestant for m in measured if matches(m.contestant, claim.ours))
        sides: list[Sequence[str]] = [(name,) for name in taking] if claim.each else [claim.ours]
        there = [m.contestant for m in measured if m.load == claim.against]
        lacking = tuple(peer for peer in claim.peers if not any(matches(name, (peer,)) for name in there))
        verdicts += [replace(_verdict(measured, claim, ours), absent=lacking) for ours in sides]
    return verdicts


def beside(peer: str, lacking: Collection[str]) -> str:
    """The peer, and who was not there to be it."""
    return ", ".join([peer] * bool(peer) + [f"without {name}" for name in lacking])


def _verdict(measured: Sequence[Measured], claim: Claim, ours: Sequence[str]) -> Verdict:
    rounds = sorted({m.round for m in measured})
    ratios = [
        ratio
        for number in rounds
        if (ratio := _ratio([m for m in measured if m.round == number], claim, ours)) is not None
    ]
    if not ratios:
        return Verdict(claim.line, claim.what, ", ".join(ours), "", claim.bound, claim.aim, None, None, None, None)
    values = [ratio.value for ratio in ratios]
    median = statistics.median(values)
    names = (statistics.mode(ratio.ours for ratio in ratios), statistics.mode(ratio.peer for ratio in ratios))
    spread = (median, min(values), max(values))
    shares = (_share(measured, name) for name in names) if claim.across else ()
    return Verdict(claim.line, claim.what, *names, claim.bound, claim.aim, *spread, claim.holds(median), *shares)


def _share(measured: Sequence[Measured], contestant: str) -> float | None:
    found = (m.figures for m in measured if m.contestant == contestant)
    return next((figures.share for figures in found if isinstance(figures, Fidelity)), None)


def _ratio(one_round: Sequence[Measured], claim: Claim, ours: Sequence[str]) -> _Ratio | None:
    """None where the round lacks a side."""
    mine = _best(one_round, claim, ours, claim.load)
    if mine is None:
        return None
    if not claim.against:
        return _Ratio(mine[0], mine[1], "")
    other = _best(one_round, claim, claim.peers or (mine[1],), claim.against)
    return None if other is None or not other[0] else _Ratio(mine[0] / other[0], mine[1], other[1])


def _best(one_round: Sequence[Measured], claim: Claim, names: Sequence[str], load: str) -> tuple[float, str] | None:
    """The figure and who made it."""
    found = [
        (value, m.contestant)
        for m in one_round
        if m.load == load and matches(m.contestant, names) and (value := m.figure(claim.figure)) is not None
    ]
    choose = min if claim.at_most is not None else max
    return choose(found, default=None)


def medians(measured: Sequence[Measured]) -> dict[tuple[str, str], dict[str, float | None]]:
    """(contestant, load) -> the median over the rounds of every figure that is a number."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for m in measured:
        groups.setdefault((m.contestant, m.load), []).append(m)
    return {key: _medians(group) for key, group in groups.items()}


def _medians(group: Sequence[Measured]) -> dict[str, float | None]:
    own = ("server_cpu", "others_cpu", "beyond_model_mb")
    rows = [{**m.figures.as_json(), **{name: getattr(m, name) for name in own}} for m in group]
    columns = {name: [row[name] for row in rows if isinstance(row[name], (int, float))] for name in rows[0]}
    return {name: statistics.median(values) if values else None for name, values in columns.items()}
