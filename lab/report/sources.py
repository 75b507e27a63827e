"""The list of what the figures come from: every table cites it by number. Knows records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab.report.evidence import Evidence, Measured, Record
from lab.report.page import GAP, Section, Table


class Sources:
    """Numbers records in the order in which they are cited."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, ...], int] = {}

    def cite(self, record: Record) -> str:
        """`[3]`."""
        return self._number(record.command, *_told(record))

    def cite_measured(self, measured: Measured) -> str:
        """A measurement that only the registry knows."""
        version, told = measured.version, measured.measurement
        what = (f"prompt {version.digest}", f"data {told.dataset}", str(told.scored_tokens or GAP))
        where = f"registry: {version.task}@{version.version}"
        return self._number("promptstitch transfer, or a client", GAP, *what, where)

    def section(self, evidence: Evidence) -> Section:
        """All that was cited, the machines, and what could not be used."""
        columns = ("source", "command", "seed", "digests of what was measured", "data", "scored tokens", "run")
        rows = [[f"[{number}]", *row] for row, number in self._rows.items()]
        tables = [Table("Where each figure comes from", columns, rows), _machines(evidence.records)]
        if evidence.unusable:
            tables.append(
                Table("Of these nothing is shown", ("run", "why"), [list(each) for each in evidence.unusable])
            )
        return Section("Sources", (), tables)

    def _number(self, *row: str) -> str:
        return f"[{self._rows.setdefault(row, len(self._rows) + 1)}]"


def _told(record: Record) -> list[str]:
    """Seed, digests, data, scored tokens, run."""
    figures, config = record.figures, record.config
    told = {"config": record.digest, "weights": figures.get("weights"), "prompt": figures.get("prompt_digest")}
    told |= {"prompt": figures["digest"]} if figures.get("digest") and not told["prompt"] else {}
    told |= {"models": " ".join(each["weights"] for each in config.get("models") or ())}
    told |= {"prompts": " ".join(config.get("prompts") or ())}
    digests = ", ".join(f"{name} {value}" for name, value in told.items() if value)
    text, data = figures.get("text"), config.get("data")
    if isinstance(text, dict):
        data = text.get("digest")
    elif isinstance(data, list):
        data = ", ".join(f"{Path(str(each['data'])).name}/{each['split']} {each['digest']}" for each in data)
    seed = GAP if record.seed is None else str(record.seed)
    return [seed, digests or GAP, str(data or GAP), str(figures.get("scored_tokens", "-")), record.name]


def _machines(records: Sequence[Record]) -> Table:
    """What the runs ran with, each set of versions once."""
    seen: dict[str, list[str]] = {}
    for record in records:
        if record.versions:
            told = [f"{name} {value}" for name, value in record.versions.items() if value is not None]
            seen.setdefault(", ".join(told), []).append(record.name)
    rows = [[told, str(len(names))] for told, names in seen.items()]
    return Table("Run with", ("versions", "runs"), rows)
