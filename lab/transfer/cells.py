"""One cell of a table of transfer: a prompt on a model and a data set, against no prompt on the same tokens.

Pure functions of losses; knows no model and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lab.data.windows import Windows
from lab.evaluate.bootstrap import Estimate, by_document, estimate
from lab.transfer.prompts import Contender
from prompts_store.records import Measurement
from prompts_store.resolution import METRIC


@dataclass(frozen=True, slots=True)
class Place:
    """A model that prompts are measured on; bytes on disk are those of the folder it was loaded from."""

    name: str
    level: str
    weights: str
    disk_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class Cell:
    """A prompt on W windows of a data set through a model. `without` and `behind` (W,) fp64: the summed losses of each
    window's scored tokens without and behind the prompt, in nats; whatever is told of them is a mean a token.
    """

    place: Place
    contender: Contender
    data: str
    split: str
    windows: Windows
    without: Tensor
    behind: Tensor

    @cached_property
    def gain(self) -> Estimate:
        """What the prompt saves, paired by document."""
        return paired_gain(self.windows, self.without, self.behind)

    @property
    def saved(self) -> Tensor:
        """(W,) nats."""
        return self.without - self.behind

    @property
    def loss_without(self) -> float:
        return float(self.without.sum()) / self.windows.scored_tokens

    @property
    def loss(self) -> float:
        return float(self.behind.sum()) / self.windows.scored_tokens

    @property
    def same_weights(self) -> bool:
        """Whether the prompt was learned through these weights."""
        return self.contender.weights == self.place.weights

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 709.0))  # beyond, a float ends

    def measurement(self) -> Measurement:
        """What the registry is told. Resolution ranks by the perplexity where the split is `select`."""
        gain, low, high = self.gain.value, self.gain.low, self.gain.high
        interval = (None, None, None) if low is None or high is None else (gain, min(low, gain), max(high, gain))
        level, weights, tokens = self.place.level, self.place.weights, self.windows.scored_tokens
        return Measurement(METRIC, self.perplexity, self.windows.digest, self.split, level, weights, tokens, *interval)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.contender.told(),
            "model": self.place.name,
            "level": self.place.level,
            "weights": self.place.weights,
            "same_weights": self.same_weights,
            "data": self.data,
            "split": self.split,
            "dataset": self.windows.digest,
            "scored_tokens": self.windows.scored_tokens,
            "loss_without": self.loss_without,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "gain": self.gain.told(),
        }


def paired_gain(windows: Windows, one: Tensor, other: Tensor) -> Estimate:
    """What `other` saves against `one`, sums (W,) each, in nats a token; paired by document."""
    return estimate(by_document([one[:, None], other[:, None]], windows), lambda means: means[0] - means[1])


@dataclass(frozen=True)
class Verdict:
    """The best prompt of a task on a model: what resolution will choose, as long as no alias and no prompt of that
    very level goes before it. `ahead` is what it saves, in nats a token, against the next best one, if there is one.
    """

    best: Cell
    next_best: Cell | None
    ahead: Estimate | None

    @property
    def helps(self) -> bool:
        """Whether its gain against no prompt is more than chance."""
        return self.best.gain.low is not None and self.best.gain.low > 0

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "task": self.best.contender.task,
            "prompt": self.best.contender.name,
            "digest": self.best.contender.prompt.digest,
            "perplexity": self.best.perplexity,
            "gain": self.best.gain.told(),
            "helps": self.helps,
            "next_best": None if self.next_best is None else self.next_best.contender.name,
            "ahead": None if self.ahead is None else self.ahead.told(),
        }


def verdict(found: Sequence[Cell]) -> Verdict:
    """Of at least one cell of one task, model and data set."""
    ranked = sorted(found, key=lambda cell: (cell.perplexity, -(cell.contender.version or 0)))
    best, *rest = ranked
    if not rest:
        return Verdict(best, None, None)
    return Verdict(best, rest[0], paired_gain(best.windows, rest[0].behind, best.behind))
