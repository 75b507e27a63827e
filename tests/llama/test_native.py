"""Our kernels against the same arithmetic in torch, at shapes that fill no vector, tile or panel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama import native
from llama.formats.bitsandbytes import NF4_VALUES
from llama.integers import IntegerLinear, rounded
from llama.linear import DenseLinear
from llama.packed import TWOS_COMPLEMENT
from llama.panels import IntegerPanelLinear, PanelLinear
from llama.pointwise import norm, swiglu
from llama.rope import Rotation, rotate

kernels = native.kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the kernels were not built, or this CPU does not run them")
BUILT = {name: found for name in native.LIBRARIES if (found := native.built(name))}
BF16_ROUNDING = 2**-8


@pytest.fixture(autouse=True, params=BUILT)
def library(request, monkeypatch):
    """Every one that this CPU runs in turn, not only the best."""
    monkeypatch.setitem(globals(), "kernels", BUILT[request.param])
    monkeypatch.setattr(native, "kernels", lambda: BUILT[request.param])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def close(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Rounded once from fp32, and summed in another order."""
    torch.testing.assert_close(got.float(), exact, rtol=1.01 * BF16_ROUNDING, atol=2e-5 * float(exact.abs().max()))


needs_dots = pytest.mark.skipif(
    kernels is None or not kernels.dots, reason="this CPU has no bf16 dot product (AVX512-BF16)"
)
layouts = pytest.mark.parametrize("layout", ["panels", pytest.param("pairs", marks=needs_dots)])


@layouts
@pytest.mark.parametrize("tokens", [*range(1, 14), 23, 24, 25, 32, 100])
def test_product_for_every_number_of_rows(tokens, layout):
    x, weight, bias = random(tokens, 72), random(80, 72), random(80)
    got = kernels.linear(x, getattr(kernels, layout)(weight), bias, 80)
    close(got, F.linear(x.float(), weight.float(), bias.float()))


@needs_dots
@pytest.mark.parametrize("k", [200, 192])  # no whole tile of matrix units, and whole ones
def test_a_row_of_dot_products_is_the_same_in_any_batch(k):
    x, pairs = random(70, k), kernels.pairs(random(77, k))
    whole = kernels.linear(x, pairs, None, 77)
    for rows in [*range(1, 20), 33, 40]:
        assert torch.equal(kernels.linear(x[70 - rows :], pairs, None, 77), whole[70 - rows :])


def test_no_rows_give_none():
    """A step of prefill chunks alone asks the head about nothing: the process died of it."""
    nothing, weight = random(0, 64), random(40, 64)
    assert kernels.linear(nothing, kernels.panels(weight), None, 40).shape == (0, 40)
    if kernels.multiplies_integers:
        assert kernels.integers(nothing, rounded(weight), None, 40).shape == (0, 40)


@layouts
@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 16), (16, 17), (31, 34), (32, 31), (33, 200), (129, 576)])
def test_product_of_every_width(n, k, layout):
    if layout == "pairs" and k % 2:
        pytest.skip("pairs are of an even number of inputs")
    for tokens in (1, 2, 7, 30):
        x, weight = random(tokens, k), random(n, k)
        close(kernels.linear(x, getattr(kernels, layout)(weight), None, n), x.float() @ weight.float().t())


needs_integers = pytest.mark.skipif(
    kernels is None or not kernels.multiplies_integers, reason="this CPU multiplies no integers"
)


def on_a_grid(x: torch.Tensor, share: int = native.GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, K) as integers (T, groups, share) and scales (T, groups, 1), as the kernel rounds it."""
    groups = x.view(len(x), -1, share)
    largest = groups.abs().amax(-1, keepdim=True)
    return (groups * (torch.full_like(largest, 127) / largest).nan_to_num(posinf=0)).round(), largest / 127


@needs_integers
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 64, 64), (12, 128, 192), (25, 192, 576), (40, 77, 128)])
def test_products_of_integers_are_summed_exactly(tokens, n, k):
    x, weight, bias = random(tokens, k).float(), random(n, k).float(), random(n).float()
    x[0] = 0
    held = rounded(weight)
    codes = held.codes.transpose(1, 2).reshape(-1, k)[:n].double() - 128
    scales = held.scales.transpose(1, 2).reshape(-1, k // native.GROUP)[:n].double()
    (inputs, steps), grouped = on_a_grid(x), codes.view(n, -1, native.GROUP)
    sums = torch.einsum("tgi,ngi->tng", inputs.double(), grouped) * steps.squeeze(-1).double()[:, None] * scales
    exact = sums.sum(-1) + bias.double()
    got = kernels.integers(x, held, bias, n)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    assert (exact - F.linear(x, weight, bias)).norm() < 0.02 * exact.norm()


@needs_integers
@pytest.mark.parametrize("odd", [float("inf"), 1e-37, 1e-40])
def test_what_is_too_large_or_too_small_for_a_grid_is_the_same_in_any_batch(odd):
    """Matrix units take many rows; sums of codes that had been cut to 8 bits only later were wrong beside them."""
    x, weight = random(20, 128).float(), random(64, 128).float()
    x[1, 64:] = odd
    held = rounded(weight)
    whole = kernels.integers(x, held, None, 64)
    for rows in (2, 6, 7, 19):
        torch.testing.assert_close(
            kernels.integers(x[:rows], held, None, 64), whole[:rows], rtol=0, atol=0, equal_nan=True
        )


@needs_integers
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_becomes_no_integer(bad):
    x, weight = random(3, 128).float(), random(64, 128).float()
    x[1, 70] = bad
    got = kernels.integers(x, rounded(weight), None, 64)
    assert got[[0, 2]].isfinite().all()
    assert not got[1].isfinite().any()


@needs_integers
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_on_a_coarse_grid_stay_what_they_are(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (64, 128), generator=generator).float()
    weight = codes * torch.rand(64, 1, generator=generator)
    layer = IntegerLinear(kernels, weight)
    held = layer._forth
    got = (held.codes.transpose(1, 2).reshape(64, 2, 64).float() - 128) * held.scales.transpose(1, 2).reshape(64, 2, 1)
    torch.testing.assert_close(got.view(64, 128), weight, rtol=1e-6, atol=0)


@needs_integers
def test_the_derivative_of_a_product_of_integers():
    weight, x = random(128, 192).float(), random(30, 192).float().requires_grad_()
    dy = random(30, 128).float()
    (slope,) = torch.autograd.grad(IntegerLinear(kernels, weight)(x), x, dy)
    assert (slope - dy @ weight).norm() < 0.02 * slope.norm()


@needs_integers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(("group", "scales"), [(32, torch.float16), (64, torch.float32), (192, torch.bfloat16)])
@pytest.mark.parametrize(("bits", "values"), [(4, None), (8, None), (4, NF4_VALUES)])
def test_packed_integers_times_inputs_on_a_grid(bits, values, group, scales, offsets, dtype):
    """Exact sums within a share of the inputs; whichever rows are beside it, a row's outputs are the same bits."""
    n, k, share = 77, 192, 64 if group % 64 == 0 else 32
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), generator=generator).to(torch.int8)
    scale = torch.rand(n, k // group, generator=generator).to(scales)
    shift = torch.randn(n, k // group, generator=generator).to(scales) if offsets else None
    bias, cpu = random(n).to(dtype), torch.device("cpu")
    layer = IntegerPanelLinear(kernels, (n, k), bits, group, scales, dtype, cpu, bias, None, offsets, values)
    for start, stop in ((0, 32), (32, 77)):
        layer.fill(start, codes[start:stop], scale[start:stop], None if shift is None else shift[start:stop])
    if values is None:
        meant, kept = codes.double(), scale
    else:  # to 127ths
        meant, kept = torch.tensor(values).mul(127).round().double()[codes.int() & 15], (scale / 127).to(scales)
    meant = meant.view(n, -1, group) * kept.double()[..., None]
    meant = (meant + (0 if shift is None else shift.double()[..., None])).view(n, k)
    torch.testing.assert_close(layer.dense(), meant.to(dtype))
    ids = torch.tensor([3, 76, 31, 3])
    assert torch.equal(layer.gather(ids), layer.dense()[ids])
    x = random(40, k).to(dtype)
    x[1] = 0
    inputs, steps = on_a_grid(x.float(), share)
    exact = F.linear((inputs.double() * steps.double()).view(40, k), meant, bias.double())
    whole = layer(x)
    rounding = BF16_ROUNDING if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(whole.double(), exact, rtol=rounding, atol=1e-5 * float(exact.abs().max()))
    for rows in [*range(1, 20), 33]:
        assert torch.equal(layer(x[:rows]), whole[:rows])
        assert torch.equal(layer(x[40 - rows :]), whole[40 - rows :])


@pytest.mark.parametrize("scales", native.SCALES)
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("values", [None, TWOS_COMPLEMENT, NF4_VALUES])
def test_products_of_codes_equal_those_of_what_they_stand_for(values, offsets, scales):
    n, k, group = 77, 832, 64  # more inputs than are unpacked at once
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(1)
    codes = torch.randint(-8 if values else -128, 8 if values else 128, (n, k), generator=generator).to(torch.int8)
    scale = torch.rand(n, k // group, generator=generator).to(scales)
    shift = torch.randn(n, k // group, generator=generator).to(scales) if offsets else None
    layer = PanelLinear(kernels, (n, k), values, group, scales, torch.bfloat16, cpu, random(n), with_offsets=offsets)
    for start, stop in ((0, 32), (32, 77)):
        layer.fill(start, codes[start:stop], scale[start:stop], None if shift is None else shift[start:stop])
    meant = codes.float() if values is None else torch.tensor(values)[codes.int() & 15]
    meant = meant.view(n, -1, group) * scale.float()[..., None] + (0 if shift is None else shift.float()[..., None])
    meant = meant.view(n, k)
    assert torch.equal(layer.dense(), meant.bfloat16())
    for tokens in (1, 2, 3, 6, 7, 25):
        x = random(tokens, k)
        close(layer(x), F.linear(x.float(), meant, random(n).float()))


def test_codes_over_inputs_in_another_order():
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    layer = PanelLinear(
        kernels, (32, 64), TWOS_COMPLEMENT, 32, torch.float32, torch.bfloat16, torch.device("cpu"), order=order
    )
    layer.fill(0, torch.arange(32 * 64).view(32, 64).remainder(16).sub(8).to(torch.int8), torch.ones(32, 2))
    x = random(3, 64)
    close(layer(x), x.float() @ layer.dense().float().t())


def test_panels_give_the_weight_back():
    weight = random(45, 8)
    assert torch.equal(native.unpanelled(kernels.panels(weight), 45), weight)
    assert torch.equal(native.unpanelled(kernels.pairs(weight), 45), weight)


@layouts
def test_what_is_not_finite_stays_so(layout):
    x, weight = torch.ones(2, 64).bfloat16(), torch.ones(32, 64).bfloat16()
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    got = kernels.linear(x, getattr(kernels, layout)(weight), None, 32)
    assert got[0].isnan().all()
    assert got[1].isinf().all()


def test_norm():
    x, weight = random(5, 77), random(77)
    close(kernels.norm(x, weight, 1e-5), F.rms_norm(x.float(), (77,), weight.float(), 1e-5))


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_rotation_of_some_heads_of_a_wider_row(dim):
    x, cos, sin = random(6, 5, dim), random(6, 1, dim), random(6, 1, dim)
    exact = rotate(x[:, :3].float(), Rotation(cos.float(), sin.float()))
    close(rotate(x[:, :3], Rotation(cos, sin)), exact)
    close(rotate(x.transpose(0, 1).contiguous().transpose(0, 1)[:, :3], Rotation(cos, sin)), exact)


def test_swiglu_from_one_end_of_bf16_to_the_other():
    gate, up = torch.linspace(-200, 200, 90).bfloat16().expand(3, 90), random(3, 90)
    close(kernels.swiglu(torch.cat((gate, up), 1)), F.silu(gate.float()) * up.float())


@pytest.mark.parametrize("dots", [False, pytest.param(True, marks=needs_dots)])
def test_prepared_layers_multiply_and_differentiate_as_before(monkeypatch, dots):
    """`prepare` chooses by speed; here it is told what to take."""
    monkeypatch.setattr(native, "product", lambda: kernels)
    monkeypatch.setattr(native, "in_pairs", lambda inputs: dots)
    weight, x, dy = random(80, 64), random(9, 64), random(9, 80)
    layer = DenseLinear(weight.clone())
    layer.prepare()
    assert layer.weight is None
    assert torch.equal(layer.dense(), weight)
    asked = x.clone().requires_grad_()
    y = layer(asked)
    y.backward(dy)
    close(y.detach(), x.float() @ weight.float().t())
    close(asked.grad, dy.float() @ weight.float())


def gradients(function, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the function makes of x, and dy pulled back."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return y.detach(), *torch.autograd.grad(y, leaf, dy.to(y.dtype))


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_derivatives_between_the_products_are_those_of_fp64(tokens):
    """Widths that fill no vector, gates that saturate; fp32 takes the kernels, fp64 plain torch."""
    weight, wide = random(77).float(), random(tokens, 77).float()
    gate_up = torch.cat((random(tokens, 77).float() * 30, random(77, tokens).float().t()), 1)
    heads, cos, sin = (
        random(tokens, 3, 64).float(),
        random(tokens, 1, 64).float(),
        random(1, tokens, 64).float()[0, :, None],
    )
    for function, x in (
        (lambda x: norm(x, weight.to(x.dtype), 1e-5), wide),
        (lambda x: rotate(x, Rotation(cos.to(x.dtype), sin.to(x.dtype))), heads),
        (swiglu, gate_up),
    ):
        assert native.fused(x.clone().requires_grad_()) is kernels
        dy = function(x) + 1
        for got, exact in zip(gradients(function, x, dy), gradients(function, x.double(), dy), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
