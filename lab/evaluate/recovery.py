"""What part of the harm of compression a prompt undoes, in three measures side by side.

    (a) share       of the gap in log-perplexity closed, the paper's measure
    (b) net share   the same, less what an equal prompt gives the dense model: recovery apart from adapting to a domain
    (c) KL share    of KL(dense ‖ ·) closed, and top-1 agreement, which adapting cannot inflate: the headline

Of a task, besides, what is kept of the gain that an equal prompt brings the dense model.

Where a gap is small or its interval touches 0 there is no percentage, only nats and a test of non-inferiority. Pure
functions of losses; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lab.evaluate.bootstrap import Estimate, Floats, by_document, estimate, not_inferior
from lab.evaluate.score import Scores

LEAST_GAP = 0.05  # nats; shares of less are noise


def share_closed(dense: Floats, compressed: Floats, prompted: Floats) -> Floats:
    """(a): 1 where the compressed model with its prompt is as good as the dense one, 0 where it does nothing."""
    return (compressed - prompted) / (compressed - dense)


def net_share_closed(dense: Floats, compressed: Floats, prompted: Floats, dense_prompted: Floats) -> Floats:
    """(b): 1 - (L[c+p_c] - L[d+p_d]) / (L[c] - L[d])."""
    return 1 - (prompted - dense_prompted) / (compressed - dense)


def kl_closed(compressed: Floats, prompted: Floats) -> Floats:
    """(c): share of the divergence from the dense model closed."""
    return 1 - prompted / compressed


def gain_kept(dense: Floats, prompted: Floats, dense_prompted: Floats) -> Floats:
    """1 where the compressed model with its prompt is as good as the dense one with its own, 0 where as the dense one
    without."""
    return (dense - prompted) / (dense - dense_prompted)


@dataclass(frozen=True)
class Recovery:
    """Means in nats a token, with intervals. Shares are None where their gap is too small, or nothing tells them."""

    gap: Estimate  # compressed above dense
    gain: Estimate  # what the prompt takes off
    excess: Estimate  # what is left above dense
    not_inferior: bool | None
    share: Estimate | None
    net_share: Estimate | None
    kept: Estimate | None
    kl: Estimate | None  # of the compressed model
    kl_prompted: Estimate | None
    kl_share: Estimate | None
    top1: Estimate | None
    top1_prompted: Estimate | None

    def told(self) -> Mapping[str, Any]:
        """As JSON."""
        return {name: value.told() if isinstance(value, Estimate) else value for name, value in vars(self).items()}


def recovery(
    dense: Scores, compressed: Scores, prompted: Scores, dense_prompted: Scores | None = None, *, seed: int = 0
) -> Recovery:
    """All measures of scores of the same windows. Raises ValueError where the windows differ."""
    given = [dense, compressed, prompted, *([dense_prompted] if dense_prompted else [])]
    if len({scores.windows.digest for scores in given}) > 1:
        raise ValueError("the scores are of different windows; score the same ones in every condition")
    losses = by_document([scores.nll for scores in given], dense.windows)
    gap = estimate(losses, lambda m: m[1] - m[0], seed=seed)
    excess = estimate(losses, lambda m: m[2] - m[0], seed=seed)
    told = _worth_sharing(gap)
    taught = dense_prompted and _worth_sharing(estimate(losses, lambda m: m[0] - m[3], seed=seed))
    kl = _both(compressed.kl, prompted.kl, dense, seed)
    top1 = _both(compressed.agrees, prompted.agrees, dense, seed)
    return Recovery(
        gap=gap,
        gain=estimate(losses, lambda m: m[1] - m[2], seed=seed),
        excess=excess,
        not_inferior=not_inferior(excess),
        share=estimate(losses, lambda m: share_closed(m[0], m[1], m[2]), seed=seed) if told else None,
        net_share=(
            estimate(losses, lambda m: net_share_closed(m[0], m[1], m[2], m[3]), seed=seed)
            if told and dense_prompted
            else None
        ),
        kept=estimate(losses, lambda m: gain_kept(m[0], m[2], m[3]), seed=seed) if taught else None,
        kl=kl[0],
        kl_prompted=kl[1],
        kl_share=_kl_share(compressed, prompted, seed) if kl[0] and _worth_sharing(kl[0]) else None,
        top1=top1[0],
        top1_prompted=top1[1],
    )


def _worth_sharing(gap: Estimate) -> bool:
    return gap.value >= LEAST_GAP and (gap.low is None or gap.low > 0)


def _both(
    one: Tensor | None, other: Tensor | None, scores: Scores, seed: int
) -> tuple[Estimate | None, Estimate | None]:
    if one is None or other is None:
        return None, None
    paired = by_document([one, other], scores.windows)
    return estimate(paired, lambda m: m[0], seed=seed), estimate(paired, lambda m: m[1], seed=seed)


def _kl_share(compressed: Scores, prompted: Scores, seed: int) -> Estimate:
    assert compressed.kl is not None
    assert prompted.kl is not None
    paired = by_document([compressed.kl, prompted.kl], compressed.windows)
    return estimate(paired, lambda m: kl_closed(m[0], m[1]), seed=seed)
