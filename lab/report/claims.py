"""What an evaluation shows of a prompt, joined with how the prompt was learned and how the model was made.

One claim is one evaluation of one prompt on one model and text; claims that differ in nothing but the seed form a
group. Knows records; knows no table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.evaluate.bootstrap import Estimate
from lab.report.evidence import WHOLE, Evidence, Record, estimate
from lab.report.page import GAP


@dataclass(frozen=True)
class Claim:
    """`learned` and `made` are the runs of the prompt and of the model, None where none of them is at hand."""

    record: Record
    learned: Record | None
    made: Record | None

    @property
    def told(self) -> Mapping[str, Any]:
        return self.record.figures

    @property
    def level(self) -> str:
        return str(self.told.get("level"))

    @property
    def method(self) -> str:
        """How the model was compressed, where a run that did it is at hand or the evaluation did it."""
        if self.made:
            return made_by(self.made.figures)
        return "-" if self.level == "dense" else str(self.told.get("method") or GAP)

    @property
    def disk_bytes(self) -> int | None:
        """Of the checkpoint; None for a level that may have been made while loading, from a larger one."""
        if self.made is None and self.level != "dense":
            return None
        return self.told.get("disk_bytes")

    @property
    def prompt(self) -> Mapping[str, Any]:
        return dict(self.told.get("prompt") or {})

    @property
    def data(self) -> str:
        text = self.told.get("text")
        name = Path(str(text.get("source"))).name if isinstance(text, Mapping) else "unnamed"
        return f"{name}, all of it" if self.told.get("split", WHOLE) == WHOLE else name

    @property
    def of_a_task(self) -> bool:
        """Whether the text is prompts with completions, which the dense model alone cannot be expected to know."""
        text = self.told.get("text")
        return isinstance(text, Mapping) and text.get("form") == "completion"

    @property
    def data_digest(self) -> str | None:
        text = self.told.get("text")
        return str(text["digest"]) if isinstance(text, Mapping) and "digest" in text else None

    @property
    def scored(self) -> tuple[str | None, int | None]:
        """What figures must have in common to be compared: the data, and how many of its tokens were scored."""
        return self.data_digest, self.told.get("scored_tokens")

    @property
    def positions(self) -> int | None:
        n = self.prompt.get("num_virtual_tokens")
        return None if n is None else int(n)

    @property
    def tokens(self) -> int | None:
        """Text tokens that the prompt was learned from."""
        return None if self.learned is None else self.learned.figures.get("tokens")

    @property
    def learned_level(self) -> str | None:
        """Where the prompt was learned, if that was through other weights."""
        if self.learned is None or self.learned.figures.get("weights") == self.told.get("weights"):
            return None
        return str(self.learned.figures.get("level"))

    @property
    def group(self) -> str:
        """Equal for claims that differ in the seed alone, and perhaps in the machine that made the same level: the last
        bits of what a solver makes are not the same on every processor."""
        how: dict[str, Any] = dict(self.learned.config if self.learned else {"digest": self.told.get("prompt_digest")})
        made = [self.made.digest, self.made.seed] if self.made else self.told.get("weights")
        if self.made and self.learned_level is None and "model" in how:
            how["model"] = {**how["model"], "weights": made}
        where = [made, self.told.get("dtype"), *self.scored, self.told.get("window")]
        return json.dumps([where, how], sort_keys=True)

    def measure(self, name: str) -> Estimate | None:
        """One of the measures of recovery."""
        return estimate(self.recovery.get(name))

    @property
    def recovery(self) -> Mapping[str, Any]:
        return dict(self.told.get("recovery") or {})


def made_by(told: Mapping[str, Any]) -> str:
    """The method of a run of `compress`, with what was unusual about it."""
    how = (told.get("allocation"), told.get("embedding"))
    return ", ".join([str(told.get("method")), *(str(each) for each in how if each not in (None, "uniform", "keep"))])


def claims(evidence: Evidence) -> list[Claim]:
    """Every evaluation, dense and prompted ones too, in an order that puts like by like."""
    learned = {each.figures.get("digest"): each for each in evidence.of("learn") if each.figures.get("digest")}
    made = {each.figures.get("weights"): each for each in evidence.of("compress")}
    found = [
        Claim(each, learned.get(each.figures.get("prompt_digest")), made.get(each.figures.get("weights")))
        for each in evidence.of("evaluate")
    ]
    return sorted(found, key=lambda c: (c.data, c.level, c.method, str(c.prompt.get("kind")), c.group, _seed(c)))


def prompted(found: Sequence[Claim]) -> list[Claim]:
    """Those with a prompt and the dense model beside them."""
    return [each for each in found if each.recovery]


def groups(found: Sequence[Claim]) -> list[list[Claim]]:
    """Claims by what they have in common but the seed, in the order given, each seed once: the same run may lie in
    several folders."""
    grouped: dict[str, dict[int, Claim]] = {}
    for each in found:
        grouped.setdefault(each.group, {}).setdefault(_seed(each), each)
    return [list(seeds.values()) for seeds in grouped.values()]


def _seed(claim: Claim) -> int:
    return claim.learned.seed or 0 if claim.learned else 0
