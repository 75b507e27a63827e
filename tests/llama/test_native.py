"""Our kernels against the same arithmetic in torch, at shapes that fill no vector, tile or panel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama import native
from llama.formats.bitsandbytes import NF4_VALUES
from llama.linear import DenseLinear
from llama.packed import TWOS_COMPLEMENT
from llama.panels import PanelLinear
from llama.rope import Rotation, rotate

kernels = native.kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the kernels were not built, or this CPU does not run them")
BF16_ROUNDING = 2**-8


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def close(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Rounded once from fp32, and summed in another order."""
    torch.testing.assert_close(got.float(), exact, rtol=1.01 * BF16_ROUNDING, atol=2e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("tokens", [*range(1, 14), 23, 24, 25, 32, 100])
def test_product_for_every_number_of_rows(tokens):
    x, weight, bias = random(tokens, 72), random(80, 72), random(80)
    got = kernels.linear(x, kernels.panels(weight), bias, 80)
    close(got, F.linear(x.float(), weight.float(), bias.float()))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 16), (16, 17), (31, 33), (32, 31), (33, 200), (129, 576)])
def test_product_of_every_width(n, k):
    for tokens in (1, 2, 7, 30):
        x, weight = random(tokens, k), random(n, k)
        close(kernels.linear(x, kernels.panels(weight), None, n), x.float() @ weight.float().t())


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
    weight = random(45, 7)
    assert torch.equal(native.unpanelled(kernels.panels(weight), 45), weight)


def test_what_is_not_finite_stays_so():
    x, weight = torch.ones(2, 64).bfloat16(), torch.ones(32, 64).bfloat16()
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    got = kernels.linear(x, kernels.panels(weight), None, 32)
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


def test_prepared_layers_multiply_and_differentiate_as_before(monkeypatch):
    """`prepare` chooses by speed; here it is told to take ours."""
    monkeypatch.setattr(native, "product", lambda: kernels)
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
