"""The optimal brain surgeon for one linear layer: what goes, what is rounded to what, what the others make up for.

W (N, K) becomes Ŵ such that ‖(W − Ŵ) X‖² is small for the inputs X (K, T), known by their second moments H = X Xᵀ.
Columns are decided one after another; the error of each is pushed into those that are still open. With a grid alone
this is GPTQ (Frantar et al. 2023), with sparsity alone SparseGPT (Frantar & Alistarh 2023), with both their joint pass.
The inverse of H over the columns still open is never formed: rows of one Cholesky factor hold all that is needed of it.
Knows one layer; knows no model and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lab.compress.level import Sparsity

DAMPING = 0.01  # of the mean of H's diagonal
BLOCK = 128  # columns whose errors are pushed into the rest of the row at once
TINY = 1e-30  # keeps inputs that are always zero from dividing by it


@dataclass(frozen=True, slots=True)
class IntScales:
    """A symmetric grid for one layer: scales (N, K / group) in the dtype that they are stored in."""

    bits: int
    scales: Tensor

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


@dataclass(frozen=True, slots=True)
class Solution:
    """A compressed layer. What is None was not asked for: `kept` with sparsity, `codes` and `grid` with a grid."""

    weight: Tensor  # (N, K) what is meant, in the dtype of the problem
    kept: Tensor | None = None  # (N, K) bool
    codes: Tensor | None = None  # (N, K) int8
    grid: IntScales | None = None
    damping: float = 0.0  # what was needed, as a share of the mean of H's diagonal

    def rows(self, start: int, stop: int) -> Solution:
        """Some of its outputs as a layer of their own."""
        rows = slice(start, stop)
        grid = self.grid and IntScales(self.grid.bits, self.grid.scales[rows])
        kept, codes = (None if t is None else t[rows] for t in (self.kept, self.codes))
        return Solution(self.weight[rows], kept, codes, grid, self.damping)


class Indefinite(ValueError):
    """H cannot be factored, or is not finite."""


def solve(weight: Tensor, moments: Tensor, grid: IntScales | None, sparsity: Sparsity | None) -> Solution:
    """Decide every weight of W (N, K) for inputs of the second moments H (K, K), in the dtype of W.

    Without sparsity, columns come by falling diag(H) (static act-order: groups are those of the stored order, so
    nothing is permuted at run time). With it, so do whole pieces of `sparsity.of` columns, inside of which the same
    number is kept in every row. Raises Indefinite.
    """
    k = weight.shape[1]
    step = sparsity.of if sparsity else 1
    order = _order(moments.diagonal(), step)
    factor, damping = inverse_factor(moments.index_select(0, order).index_select(1, order), weight.dtype)
    open_ = weight.t()[order].contiguous()  # (K, N): columns of W in the order in which they are decided
    scales = _column_scales(grid, k, order)
    kept = torch.ones_like(open_, dtype=torch.bool)
    codes = torch.zeros_like(open_, dtype=torch.int8)
    size = max(BLOCK // step, 1) * step
    for start in range(0, k, size):
        stop = min(start + size, k)
        columns, triangle = open_[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(columns)
        for i in range(stop - start):
            pivot = triangle[i, i]
            if sparsity and i % step == 0:
                kept[start + i : start + i + step] = _best(columns, triangle.diagonal(), i, sparsity)
            decided = columns[i]
            if scales is not None and grid is not None:
                nearest = (decided / scales[start + i]).round_().clamp_(*grid.limits) * kept[start + i]
                codes[start + i] = nearest.to(torch.int8)
                decided = nearest * scales[start + i]
            else:
                decided = decided * kept[start + i]
            errors[i] = (columns[i] - decided) / pivot
            columns[i] = decided
            columns[i + 1 :].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
        open_[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    back = order.argsort()
    return Solution(
        open_[back].t().contiguous(),
        kept[back].t().contiguous() if sparsity else None,
        codes[back].t().contiguous() if grid else None,
        grid,
        damping,
    )


def polish(weight: Tensor, moments: Tensor, solution: Solution, sweeps: int) -> Solution:
    """The solution after `sweeps` of coordinate descent: each column in turn is put where it is best given all others.

    What the solver decides first it decides without knowing what later columns can make up for. Masks and scales stay,
    and the error, damped as the solver saw it, never grows.
    """
    k = weight.shape[1]
    damped = moments.clone()
    damped.diagonal().add_(solution.damping * moments.diagonal().mean())
    target, found = weight.t().contiguous(), solution.weight.t().contiguous()  # (K, N)
    scales = _column_scales(solution.grid, k, torch.arange(k, device=weight.device))
    kept = torch.ones_like(found, dtype=torch.bool) if solution.kept is None else solution.kept.t().contiguous()
    for start in [*range(0, k, BLOCK)] * sweeps:
        block = slice(start, min(start + BLOCK, k))
        pull = damped[block] @ (target - found)  # (B, N): half the slope of the error, downhill
        among = damped[block, block]
        for i, column in enumerate(range(block.start, block.stop)):
            best = found[column] + pull[i] / among[i, i].clamp(min=TINY)
            if scales is not None and solution.grid is not None:
                best = (best / scales[column]).round_().clamp_(*solution.grid.limits) * scales[column]
            step = best * kept[column] - found[column]
            found[column] += step
            pull.addr_(among[i], step, alpha=-1)
    codes = None if scales is None else (found / scales).round_().to(torch.int8).t().contiguous()
    return replace(solution, weight=found.t().contiguous(), codes=codes)


def inverse_factor(moments: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The upper triangular U with UᵀU = (H + damping)⁻¹, in `dtype`, and the damping that it took.

    Row i of U is, up to its pivot, row i of the inverse of H over the columns from i on. Computed in fp64; if H is
    not positive definite even so, damping grows tenfold at a time. Raises Indefinite.
    """
    flipped = moments.double().flip(0, 1)
    mean = float(flipped.diagonal().mean()) or 1.0
    if not math.isfinite(mean):
        raise Indefinite("the inputs of the layer are not finite")
    damping = DAMPING
    while damping <= 1e3:
        damped = flipped.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            # H = RRᵀ with R = flip(L) upper triangular, so U = R⁻¹: one factorisation, no explicit inverse.
            eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).to(dtype), damping
        damping *= 10
    raise Indefinite("the second moments of the layer's inputs cannot be factored")


def layer_error(weight: Tensor, compressed: Tensor, moments: Tensor) -> float:
    """‖(W − Ŵ) X‖² / ‖W X‖²."""
    lost = weight - compressed
    whole = float(((weight @ moments) * weight).sum())
    return float(((lost @ moments) * lost).sum()) / whole if whole > 0 else 0.0


def _order(importance: Tensor, step: int) -> Tensor:
    """Columns by falling importance (K,), in pieces of `step` neighbours that stay together."""
    pieces = importance.view(-1, step)
    inside = pieces.argsort(dim=1, descending=True, stable=True)
    columns = inside + torch.arange(0, len(importance), step, device=importance.device)[:, None]
    return columns[pieces.sum(1).argsort(descending=True, stable=True)].flatten()


def _column_scales(grid: IntScales | None, k: int, order: Tensor) -> Tensor | None:
    """(K, N) fp32: the scale of every weight, columns in the order of solving."""
    if grid is None:
        return None
    group = k // grid.scales.shape[1]
    return grid.scales.float().t()[order // group].contiguous()


def _best(columns: Tensor, pivots: Tensor, start: int, sparsity: Sparsity) -> Tensor:
    """Which of the next columns stay in each row (of, N): those whose loss would cost the most."""
    piece = slice(start, start + sparsity.of)
    cost = (columns[piece] / pivots[piece, None]).square()
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(0, cost.topk(sparsity.keep, dim=0).indices, True)
