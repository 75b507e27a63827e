"""The ways to compress one layer: the solver, and the baselines that it is held against.

All of them put weights on the same grid, that of `llama.rtn`. Knows one layer; knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lab.compress.level import Level, Sparsity
from lab.compress.solve import IntScales, Solution, polish, solve
from llama import rtn
from llama.errors import UnsupportedModel

CLIPS = tuple(1 - step / 40 for step in range(21))  # shares of the largest weight that the search tries: 1 to 0.5
KEPT = torch.bfloat16  # what weights are rounded to that stay and are put on no grid


@dataclass(frozen=True, slots=True)
class Method:
    """`solves` pushes errors on; else `score` ranks weights by W (N, K) and diag(H) (K,), and what stays is rounded."""

    name: str
    calibrated: bool  # whether it looks at inputs
    solves: bool = False
    score: Callable[[Tensor, Tensor], Tensor] | None = None


METHODS = {
    method.name: method
    for method in (
        Method("gptq", calibrated=True, solves=True),
        Method("sparsegpt", calibrated=True, solves=True),
        Method("rtn", calibrated=False),
        Method("magnitude", calibrated=False, score=lambda weight, squares: weight.abs()),
        Method("wanda", calibrated=True, score=lambda weight, squares: weight.abs() * squares.sqrt()),
    )
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to a layer.

    With `clip`, each group's scale is the one of several whose rounding error, weighted by the inputs' own moments, is
    the least; else it is that of the largest weight. `sweeps` of coordinate descent follow the solver.
    """

    level: Level
    method: Method
    clip: bool = False
    sweeps: int = 0


def choose(name: str | None, level: Level) -> Method:
    """The method of this name, by default the solver. Raises UnsupportedModel where the level is not of its kind."""
    fitting = ("sparsegpt", "magnitude", "wanda") if level.sparsity else ("gptq", "rtn")
    name = name or fitting[0]
    if name not in METHODS:
        raise UnsupportedModel(f"method is {name!r}; choose one of: {', '.join(METHODS)}")
    if name not in fitting:
        raise UnsupportedModel(f"{name} does not make level {level.name}; choose one of: {', '.join(fitting)}")
    return METHODS[name]


def compress_layer(weight: Tensor, moments: Tensor | None, recipe: Recipe) -> Solution:
    """W (N, K) fp32 on a grid, with weights dropped, or both.

    `moments` (K, K) are the second moments of its inputs; None will do for a method that does not look at them.
    Weights that are put on no grid are rounded to bf16, in which they are stored.
    Raises ModelError, Indefinite.
    """
    method, bits, sparsity = recipe.method, recipe.level.grid, recipe.level.sparsity
    if moments is None and method.calibrated:
        raise ValueError(f"{method.name} needs the second moments of the inputs")
    importance = torch.ones_like(weight[0]) if moments is None else moments.diagonal()
    grid = None
    if bits:
        group = bits.width(weight.shape[1])
        grid = IntScales(bits.bits, grid_scales(weight, bits.bits, group, importance if recipe.clip else None))
    if method.solves and moments is not None:
        solution = polish(weight, moments, solve(weight, moments, grid, sparsity), recipe.sweeps)
        return solution if grid else replace(solution, weight=solution.weight.to(KEPT).to(weight.dtype))
    kept = _top(method.score(weight, importance), sparsity) if method.score and sparsity else None
    masked = weight if kept is None else weight * kept
    if grid is None:
        return Solution(masked.to(KEPT).to(weight.dtype), kept)
    codes = _nearest(masked, grid)
    return Solution(rtn.dequantise(codes, grid.scales, weight.dtype), kept, codes, grid)


def grid_scales(weight: Tensor, bits: int, group: int, importance: Tensor | None) -> Tensor:
    """Scales (N, K / group) bf16: those of `llama.rtn`, or with the importance (K,) of the inputs, the best clipped."""
    plain = rtn.quantise(weight, bits, group)[1]
    if importance is None:
        return plain
    n, k = weight.shape
    heaviness = importance.view(1, k // group, group)
    best, least = plain, torch.full(plain.shape, torch.inf, device=weight.device)
    for share in CLIPS:
        scales = (plain.float() * share).to(plain.dtype)
        grid = IntScales(bits, scales)
        lost = weight - rtn.dequantise(_nearest(weight, grid), scales, weight.dtype)
        error = (lost.view(n, -1, group).square() * heaviness).sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def _nearest(weight: Tensor, grid: IntScales) -> Tensor:
    """Codes (N, K) int8."""
    scaled = weight.view(*grid.scales.shape, -1) / grid.scales.float()[..., None]
    return scaled.round_().clamp_(*grid.limits).to(torch.int8).view(weight.shape)


def _top(score: Tensor, sparsity: Sparsity) -> Tensor:
    """The `keep` highest of every `of` neighbours in a row (N, K), as a mask."""
    pieces = score.view(len(score), -1, sparsity.of)
    best = pieces.topk(sparsity.keep, dim=-1).indices
    return torch.zeros_like(pieces, dtype=torch.bool).scatter_(-1, best, True).view(score.shape)
