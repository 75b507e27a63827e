"""The solver against a direct one, which forms the inverse of H over the open columns anew after each, in fp64."""

import pytest
import torch

from lab.compress.level import Level, Sparsity
from lab.compress.methods import Recipe, choose, compress_layer
from lab.compress.solve import DAMPING, Indefinite, IntScales, Solution, inverse_factor, layer_error, solve
from llama import rtn

LEVELS = ("w2g32", "w3g64", "w4g64", "w4g32", "w4", "w8g64", "s50", "s60", "s2of4", "s4of8")
JOINT = ("w4g64-s50", "w3g64-s25", "w4g32-s2of4", "w4-s75")


def layer(n: int = 24, k: int = 192, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (N, K) and H (K, K) in fp32: inputs that are correlated and of unequal size, as behind a norm."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(48, k, generator=generator)
    x = torch.randn(400, 48, generator=generator) @ mixing + 2 * torch.randn(400, k, generator=generator)
    x *= torch.rand(k, generator=generator) + 0.1
    return torch.randn(n, k, generator=generator) * 0.05, x.t() @ x


def direct(weight, moments, grid: IntScales | None, sparsity: Sparsity | None) -> torch.Tensor:
    """Ŵ (N, K) fp64 by the textbook: decide a column, compensate by the explicit inverse, strike the column out."""
    n, k = weight.shape
    w, h = weight.double().clone(), moments.double()
    h = h + DAMPING * h.diagonal().mean() * torch.eye(k)
    step = sparsity.of if sparsity else 1
    pieces = h.diagonal().reshape(-1, step)
    order = [
        int(piece) * step + int(column)
        for piece in pieces.sum(1).argsort(descending=True, stable=True)
        for column in pieces[piece].argsort(descending=True, stable=True)
    ]
    kept = torch.ones(n, k, dtype=torch.bool)
    for place, column in enumerate(order):
        if sparsity and place % step == 0:
            costs, open_ = torch.empty(n, step, dtype=torch.double), order[place:]
            for i in range(step):  # the loss of each column of the piece once those before it in the piece are struck
                rest = torch.tensor(open_[i:])
                costs[:, i] = w[:, rest[0]] ** 2 / torch.linalg.inv(h[rest][:, rest])[0, 0]
            for row in range(n):
                lost = costs[row].argsort()[: step - sparsity.keep]
                kept[row, torch.tensor(order[place : place + step])[lost]] = False
        rest = torch.tensor(order[place:])
        inverse = torch.linalg.inv(h[rest][:, rest])
        value = w[:, column].clone()
        if grid is not None:
            scale = grid.scales[:, column // (k // grid.scales.shape[1])].double()
            value = torch.round(value / scale).clamp(*grid.limits) * scale
        value = value * kept[:, column]
        error = (w[:, column] - value) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0]
        w[:, column] = value
    return w


@pytest.mark.parametrize("name", [*LEVELS, *JOINT])
def test_equals_the_direct_solution(name):
    weight, moments = layer()
    level = Level.parse(name)
    grid = None
    if level.grid:
        grid = IntScales(level.grid.bits, rtn.quantise(weight, level.grid.bits, level.grid.width(192))[1])
    found = solve(weight.double(), moments, grid, level.sparsity)
    torch.testing.assert_close(found.weight, direct(weight, moments, grid, level.sparsity), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", [*LEVELS, *JOINT])
@pytest.mark.parametrize("seed", [1, 2])
def test_errs_less_than_every_baseline(name, seed):
    weight, moments = layer(seed=seed)
    level = Level.parse(name)
    baselines = [m for m in ("rtn", "magnitude", "wanda") if (m == "rtn") == (level.sparsity is None)]
    for clip in (False, True):
        errors = {m: layer_error(weight, made(weight, moments, level, m, clip).weight, moments) for m in baselines}
        ours = layer_error(weight, made(weight, moments, level, None, clip).weight, moments)
        assert all(ours < error for error in errors.values())


def made(weight, moments, level: Level, method: str | None, clip: bool = False, sweeps: int = 0) -> Solution:
    return compress_layer(weight, moments, Recipe(level, choose(method, level), clip, sweeps))


@pytest.mark.parametrize("name", [*LEVELS, *JOINT])
@pytest.mark.parametrize("clip", [False, True])
def test_sweeps_only_lower_the_error_and_keep_mask_and_scales(name, clip):
    weight, moments = layer()
    level = Level.parse(name)
    solved, polished = (made(weight, moments, level, None, clip, sweeps) for sweeps in (0, 3))
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(192)
    assert layer_error(weight, polished.weight, damped) < layer_error(weight, solved.weight, damped)
    if level.sparsity:
        assert torch.equal(polished.kept, solved.kept)
        assert not polished.weight[~polished.kept].any()
    if level.grid:
        assert torch.equal(polished.grid.scales, solved.grid.scales)
        assert torch.equal(rtn.dequantise(polished.codes, polished.grid.scales, torch.float32), polished.weight)


@pytest.mark.parametrize("name", [name for name in (*LEVELS, *JOINT) if "s" in name])
@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "wanda"])
def test_keeps_exactly_as_many_in_every_piece_of_every_row(name, method):
    weight, moments = layer()
    level = Level.parse(name)
    found = made(weight, moments, level, method)
    assert level.sparsity is not None
    assert (found.kept.view(24, -1, level.sparsity.of).sum(-1) == level.sparsity.keep).all()
    assert not found.weight[~found.kept].any()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, method) for name in LEVELS if name.startswith("w") for method in ("gptq", "rtn")),
        *((name, method) for name in JOINT for method in ("sparsegpt", "magnitude", "wanda")),
    ],
)
def test_codes_and_scales_mean_the_weights(name, method):
    weight, moments = layer()
    level = Level.parse(name)
    found = made(weight, moments, level, method)
    assert found.grid.scales.dtype == torch.bfloat16
    assert torch.equal(rtn.dequantise(found.codes, found.grid.scales, torch.float32), found.weight)


def test_round_to_nearest_is_that_of_loading():
    weight, moments = layer()
    found = made(weight, moments, Level.parse("w3g64"), "rtn")
    codes, scales = rtn.quantise(weight, 3, 64)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.grid.scales, scales)


def test_fp32_decides_nearly_as_fp64_does():
    weight, moments = layer()
    grid = IntScales(4, rtn.quantise(weight, 4, 64)[1])
    single, double = (solve(weight.to(dtype), moments, grid, None).codes for dtype in (torch.float32, torch.float64))
    assert (single != double).double().mean() < 0.01


def test_inputs_that_are_always_zero_are_rounded_and_disturb_nobody():
    weight, moments = layer()
    dead = torch.tensor([3, 64, 191])
    moments[dead] = 0
    moments[:, dead] = 0
    grid = IntScales(4, rtn.quantise(weight, 4, 64)[1])
    found = solve(weight, moments, grid, None)
    assert torch.equal(found.codes[:, dead], rtn.quantise(weight, 4, 64)[0][:, dead])
    assert torch.isfinite(found.weight).all()
    nothing = solve(weight, torch.zeros_like(moments), grid, None)
    assert torch.equal(nothing.codes, rtn.quantise(weight, 4, 64)[0])


def test_more_damping_is_tried_and_told():
    moments = torch.eye(8)
    moments[0, 0] = -0.5  # not a matrix of moments; rounding can leave one like it
    factor, damping = inverse_factor(moments, torch.float64)
    assert damping == pytest.approx(DAMPING * 100)
    damped = moments.double() + damping * moments.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped))


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(Indefinite, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan), torch.float32)
