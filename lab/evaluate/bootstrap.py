"""Intervals by paired bootstrap over documents: what would come out with other documents of the same kind.

Every resample draws whole documents and takes all quantities from the same draw, so that differences between conditions
are paired. A mean is a ratio of sums, since documents differ in length. Knows numbers; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lab.data.windows import Windows

RESAMPLES = 10_000
COVERAGE = 0.95
MARGIN = 0.005  # nats; above dense by no more than this counts as not worse
CHUNK = 1 << 22  # weights drawn at once

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # means (K, R) of K quantities in R resamples → (R,)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval, from `units` documents (or windows); no interval of a single one."""

    value: float
    low: float | None
    high: float | None
    units: int
    unit: str = "document"

    def told(self) -> Mapping[str, Any]:
        """As JSON."""
        interval = None if self.low is None or self.high is None else [self.low, self.high]
        return {"value": self.value, "interval": interval, "units": self.units, "unit": self.unit}


@dataclass(frozen=True)
class Paired:
    """K quantities summed by unit, `sums` (K, D), and over how many tokens, `counts` (D,)."""

    sums: Floats
    counts: Floats
    unit: str = "document"

    @property
    def means(self) -> Floats:
        """(K,) over all tokens."""
        means: Floats = self.sums.sum(1) / self.counts.sum()
        return means


def by_document(values: Sequence[Tensor], windows: Windows) -> Paired:
    """Token values (W, T) each, 0 where nothing is scored, summed by document; of a lone document, by window."""
    group, unit = windows.document.numpy(), "document"
    if len(set(group.tolist())) == 1:
        group, unit = np.arange(len(windows)), "window"
    _, index = np.unique(group, return_inverse=True)
    counts, *sums = (
        np.bincount(index, weights=each.double().sum(1).numpy()).astype(np.float64)
        for each in (windows.scored, *values)
    )
    held = counts > 0
    return Paired(np.stack(sums)[:, held], counts[held], unit)


def estimate(paired: Paired, statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The statistic of all units, and the percentiles of its resamples. The same seed draws the same resamples."""
    units = len(paired.counts)
    value = float(statistic(paired.means[:, None])[0])
    if units < 2:
        return Estimate(value, None, None, units, paired.unit)
    dice = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, step := max(1, CHUNK // units)):
        size = min(step, resamples - start)
        weights = dice.multinomial(units, np.full(units, 1 / units), size=size).astype(np.float64)  # (R, D)
        found.append(statistic((weights @ paired.sums.T / (weights @ paired.counts)[:, None]).T))
    low, high = np.quantile(np.concatenate(found), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(value, float(low), float(high), units, paired.unit)


def difference(one: Tensor, other: Tensor, windows: Windows, *, seed: int = 0) -> Estimate:
    """Mean of `one` less mean of `other`, token values (W, T) each, over the same tokens."""
    return estimate(by_document([one, other], windows), lambda means: means[0] - means[1], seed=seed)


def not_inferior(excess: Estimate) -> bool | None:
    """Whether the whole interval of a loss above the dense one's lies within MARGIN; None without one."""
    return None if excess.high is None else excess.high <= MARGIN
