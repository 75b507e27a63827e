"""How much of a prompt's worth survives on another level: one number for a table of transfer.

Of prompts that were learned from no other prompt, on levels that they were not learned at: the sum of what they gain
there over the sum of what the prompt gains that was learned through just those weights. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lab.evaluate.bootstrap import Estimate, by_document, estimate
from lab.transfer.cells import Cell

Key = tuple[str | None, str, str]  # task, kind, weights


@dataclass(frozen=True)
class Ratio:
    """`share` is None where there is no pair, or the native prompts' gain is not more than chance. Sums are in nats a
    token."""

    share: Estimate | None
    transferred: float
    native: float
    pairs: int

    def told(self) -> dict[str, Any]:
        """As JSON."""
        share = {"value": None, "interval": None} if self.share is None else self.share.told()
        return {**share, "transferred": self.transferred, "native": self.native, "pairs": self.pairs}


def transfer_ratio(found: Sequence[Cell]) -> Ratio:
    """The ratio over cells of one data set and split, with its interval by document.

    A cell counts where the prompt's level is another than the model's and a native prompt of the same task and kind was
    measured on the same model; of several native ones (seeds) the mean counts. A prompt whose parents nobody told, and
    one of the same level but other weights, counts on neither side. Raises ValueError for cells of different windows.
    """
    if len({cell.windows.digest for cell in found}) > 1:
        raise ValueError("the cells are of different windows; give those of one data set and split")
    parentless = [cell for cell in found if cell.contender.parents == ()]
    natives = _natives(parentless)
    pairs = [
        (cell.saved, natives[_key(cell)])
        for cell in parentless
        if cell.contender.level not in (None, cell.place.level) and _key(cell) in natives
    ]
    if not pairs:
        return Ratio(None, 0.0, 0.0, 0)
    windows = found[0].windows
    sums = by_document([torch.stack(side).sum(0)[:, None] for side in zip(*pairs, strict=True)], windows)
    transferred, native = (float(mean) for mean in sums.means)
    low = estimate(sums, lambda means: means[1]).low
    certain = (native if low is None else low) > 0
    share = estimate(sums, lambda means: means[0] / means[1]) if certain else None
    return Ratio(share, transferred, native, len(pairs))


def _natives(found: Sequence[Cell]) -> Mapping[Key, torch.Tensor]:
    """What native prompts save, (W,), the mean of those of one key."""
    by_key: dict[Key, list[torch.Tensor]] = {}
    for cell in found:
        if cell.same_weights:
            by_key.setdefault(_key(cell), []).append(cell.saved)
    return {key: torch.stack(saved).mean(0) for key, saved in by_key.items()}


def _key(cell: Cell) -> Key:
    return cell.contender.task, cell.contender.prompt.kind, cell.place.weights
