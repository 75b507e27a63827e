"""Products with codes in Triton against the dequantised weights: on CUDA, or by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")

from llama import coded, packed  # noqa: E402
from llama.formats.bitsandbytes import NF4_VALUES  # noqa: E402
from llama.packed import TWOS_COMPLEMENT, CodebookLinear, Int8Linear  # noqa: E402

N, K = 70, 256
# The interpreter has no bf16; in bf16 the values of NF4 and the weights are rounded at other places.
KINDS = [(torch.float32, 1e-4), *([(torch.bfloat16, 2e-2)] if DEVICE.type == "cuda" else [])]


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """The program is taken whatever the device."""
    monkeypatch.setattr(packed, "coded", coded.multiply)


def filled(layer, codes, group, offsets):
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(N, K // group, generator=generator) * 0.1 + 0.01
    shifts = torch.randn(N, K // group, generator=generator) * 0.1
    layer.fill(0, *(t.to(DEVICE) for t in (codes, scales, *([shifts] if offsets else []))))
    return layer


@pytest.mark.parametrize("rows", [1, 16, 17, 80])
@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
@pytest.mark.parametrize(("values", "group", "offsets"), [
    (TWOS_COMPLEMENT, 32, True), (TWOS_COMPLEMENT, K, False), (NF4_VALUES, 64, False),
    (None, 64, True), (None, K, False),
])  # fmt: skip
def test_products_are_those_of_the_dequantised_weights(rows, dtype, tolerance, values, group, offsets):
    generator = torch.Generator().manual_seed(0)
    bits = 4 if values else 8
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (N, K), dtype=torch.int8, generator=generator)
    bias, x = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((N,), (rows, K)))
    layer = (
        CodebookLinear((N, K), values, group, torch.float32, dtype, DEVICE, bias, with_offsets=offsets)
        if values
        else Int8Linear((N, K), group, dtype, DEVICE, bias, with_offsets=offsets)
    )
    filled(layer, codes, group, offsets)
    y = layer(x)
    expected = torch.nn.functional.linear(x.float(), layer.dense().float(), bias.float())
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_groups_that_are_taken():
    assert [group for group in (16, 32, 48, 64, 96, 256, 576) if coded.takes(group, 4 * group)] == [
        32,
        64,
        96,
        256,
        576,
    ]
