"""Tables and heat maps of prompts on models that they were not learned through, on data to report on alone.

Knows records of transfer and the registry's measurements; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from lab.evaluate.bootstrap import Estimate
from lab.report.evidence import REPORTED, Evidence, Measured, Record, estimate
from lab.report.page import GAP, Chart, Section, Table, nats, number, share, short
from lab.report.plots import heat
from lab.report.sources import Sources

RULE = (
    "Between levels: of prompts that were learned from no other prompt, on levels that they were not learned at, the "
    "sum of what they gain over the sum of what the prompt gains that was learned through just those weights."
)
COLUMNS = (
    "prompt",
    "kind",
    "learned at",
    "served",
    "weights",
    "data",
    "perplexity",
    "gain, nats",
    "scored tokens",
    "source",
)


@dataclass(frozen=True)
class Gain:
    """One prompt on one model and data set."""

    prompt: str
    digest: str
    kind: str
    learned: str
    native: bool
    level: str
    weights: str | None
    data: str  # its name where it has one
    dataset: str
    perplexity: float
    gain: Estimate | None
    scored_tokens: int | None
    source: str

    @property
    def key(self) -> tuple[str, str | None, str]:
        return self.digest, self.weights, self.dataset

    @property
    def row(self) -> str:
        return f"{self.prompt} {self.kind}, {self.learned}"

    @property
    def column(self) -> str:
        return f"{self.level} {short(self.weights)[:6]}"


def transfer_section(evidence: Evidence, sources: Sources) -> Section:
    """What is told of transfer; runs first, then what only the registry holds."""
    records = evidence.of("transfer")
    found = list(
        {each.key: each for each in (*_registered(evidence.measured, sources), *_run(records, sources))}.values()
    )
    found.sort(key=lambda each: (each.data, each.level, str(each.weights), each.perplexity))
    names: dict[str, str] = {}
    for each in found:
        names.setdefault(each.dataset, each.data)
    rows = [_row(each) for each in found]
    tables = [Table("Prompts on models", COLUMNS, rows), _ratios(records, sources)]
    return Section("Transfer", (RULE,), tables, [_heat(names[d], [g for g in found if g.dataset == d]) for d in names])


def _run(records: Iterable[Record], sources: Sources) -> Iterable[Gain]:
    for record in records:
        cells: Sequence[Mapping[str, Any]] = record.figures.get("cells") or ()
        for cell in cells:
            if cell["split"] == REPORTED:
                yield Gain(
                    cell["prompt"],
                    cell["digest"],
                    cell["kind"],
                    cell["learned_level"] or GAP,
                    cell["same_weights"],
                    cell["level"],
                    cell["weights"],
                    f"{cell['data'].rpartition('/')[2]} {short(cell['dataset'])}",
                    cell["dataset"],
                    cell["perplexity"],
                    estimate(cell["gain"]),
                    cell["scored_tokens"],
                    sources.cite(record),
                )


def _registered(measured: Iterable[Measured], sources: Sources) -> Iterable[Gain]:
    for each in measured:
        version, told = each.version, each.measurement
        if told.metric != "perplexity":
            continue
        gain = None if told.gain is None else Estimate(told.gain, told.gain_low, told.gain_high, 0)
        yield Gain(
            f"{version.task}@{version.version}",
            version.digest,
            version.kind,
            version.level,
            version.weights is not None and version.weights == told.served_weights,
            told.served_level,
            told.served_weights,
            short(told.dataset),
            told.dataset,
            told.value,
            gain,
            told.scored_tokens,
            sources.cite_measured(each),
        )


def _row(each: Gain) -> list[str]:
    learned = f"{each.learned}, these weights" if each.native else each.learned
    tokens = GAP if each.scored_tokens is None else f"{each.scored_tokens:,}"
    served = [each.level, short(each.weights), each.data]
    prompt = f"{each.prompt} {short(each.digest)}"
    return [prompt, each.kind, learned, *served, number(each.perplexity), nats(each.gain), tokens, each.source]


def _ratios(records: Iterable[Record], sources: Sources) -> Table:
    rows = []
    for record in records:
        for told in record.figures.get("transfer") or ():
            if told["split"] == REPORTED:
                sums = [number(told["transferred"], "+.4f"), number(told["native"], "+.4f"), str(told["pairs"])]
                kept = share(estimate(told)) if told["pairs"] else "no pair"
                rows.append([told["data"].rpartition("/")[2], kept, *sums, sources.cite(record)])
    columns = ("data", "gain that stays", "sum transferred, nats", "sum native, nats", "pairs", "source")
    return Table("Between levels", columns, rows)


def _heat(name: str, found: Sequence[Gain]) -> Chart:
    rows, columns = (list(dict.fromkeys(names)) for names in ((g.row for g in found), (g.column for g in found)))
    values = {(each.row, each.column): each.gain.value for each in found if each.gain is not None}
    field = [[values.get((row, column), nan) for column in columns] for row in rows]
    return heat(f"Gain of each prompt on each model, {name}", rows, columns, field, "nats a token")
