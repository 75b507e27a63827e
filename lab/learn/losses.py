"""What is minimised: cross-entropy with the text, the divergence from a dense model, or a mix, in nats.

Logits of a whole batch never exist: some hundred tokens at a time, loss and derivative are computed together and the
logits are dropped, so memory does not grow with tokens x vocabulary. Knows hidden states and heads; knows no prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llama.linear import DenseLinear, Linear, OpaqueLinear

LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}  # elements of a chunk of logits: what a cache holds; what fills a GPU


@dataclass(frozen=True)
class Target:
    """What n tokens are learned from.

    `ids` (n,) int64: the tokens that came. With a teacher also its hidden states `states` (n, H), and `head`, which
    makes logits (m, V) of rows of them; `distil` is then the share of the divergence KL(teacher ‖ model) in the loss.
    """

    ids: Tensor
    states: Tensor | None = None
    head: Callable[[Tensor], Tensor] | None = None
    distil: float = 0.0


@dataclass(frozen=True)
class Loss:
    """Sums over tokens: `total` carries the gradient; `cross_entropy` and `divergence` (None: no teacher) are told."""

    total: Tensor
    cross_entropy: float
    divergence: float | None


def chunked_loss(hidden: Tensor, head: Linear, target: Target, rows: int | None = None) -> Loss:
    """The summed loss of the tokens predicted from `hidden` (n, H); `rows` tokens' logits are made at once.

    The gradient reaches `hidden` alone. Logits are taken to fp32 before anything is summed (fp64 stays).
    """
    rows = rows or max(1, LOGITS[hidden.device.type] // head.out_features)
    out: tuple[Tensor, Tensor] = _Chunked.apply(hidden, head, target, rows)  # type: ignore[no-untyped-call]
    total, parts = out
    cross_entropy, divergence = parts.tolist()
    return Loss(total, cross_entropy, None if target.states is None else divergence)


class _Chunked(torch.autograd.Function):
    """Computes the derivative in `forward`, while the logits are there; `backward` only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Linear, target: Target, rows: int) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if wanted else None
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), rows):
            here = slice(start, start + rows)
            states = None if target.states is None else target.states[here].to(hidden.device)
            dy = _chunk(head(hidden[here]), target, target.ids[here], states, sums)
            if slope is not None:
                slope[here] = _pullback(head, dy.to(hidden.dtype))
        ctx.slope = slope
        distil = target.distil if target.states is not None else 0.0
        total = ((1 - distil) * sums[0] + distil * sums[1]).to(torch.promote_types(hidden.dtype, torch.float32))
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.slope * scale.to(ctx.slope.dtype), None, None, None


def _chunk(logits: Tensor, target: Target, ids: Tensor, states: Tensor | None, sums: Tensor) -> Tensor:
    """Add the chunk's two losses to `sums`; return the derivative of their mix by the logits (n, V).

    Of both losses it is the model's distribution less the one it should have been.
    """
    scores = _log_softmax(logits)
    at = ids.to(scores.device)[:, None]
    sums[0] -= scores.gather(1, at).sum()
    distil = 0.0
    wanted = None
    if states is not None and target.head is not None:
        distil = target.distil
        wanted = _log_softmax(target.head(states)).to(scores.dtype)
        dense = wanted.exp()
        # Σ p (log p − log q): where p underflows to 0 its logarithm is still finite.
        sums[1] += wanted.sub_(scores).mul_(dense).sum()
        wanted = dense
    slope = scores.exp_()
    if wanted is not None and distil:
        slope.sub_(wanted, alpha=distil)
    return slope.scatter_add_(1, at, torch.full_like(at, -(1 - distil), dtype=slope.dtype))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _pullback(head: Linear, dy: Tensor) -> Tensor:
    """dY (n, V) → dY W (n, H)."""
    if isinstance(head, OpaqueLinear) and not isinstance(head, DenseLinear):
        return head.pullback(dy)
    return dy @ head.dense()
