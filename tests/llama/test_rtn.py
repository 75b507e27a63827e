"""The round-to-nearest grid: exact codes and scales, the same on every machine."""

import hashlib

import numpy as np
import pytest
import torch

from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.rtn import BITS, Grid, dequantise, is_quantised, quantise


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Numbers in -1..1 from integers alone, so that no library's generator is part of the claim."""
    state = np.random.PCG64(seed).random_raw(rows * columns)
    uniform = (state >> 40).astype(np.float32) / 2**23 - 1
    return torch.from_numpy(uniform * uniform * uniform).view(rows, columns)  # some near zero, some far


def bf16(value: float) -> float:
    return torch.tensor(value).to(torch.bfloat16).item()


def test_a_group_by_hand():
    codes, scales = quantise(torch.tensor([[-7.0, 0.0, 1.0, 3.0], [0.5, -1.0, 1.5, 3.5]]), bits=3, group=4)
    assert scales.tolist() == [[2.0], [1.0]]  # 7 / 3.5 and 3.5 / 3.5
    assert codes.tolist() == [[-4, 0, 0, 2], [0, -1, 2, 3]]  # ties to even; +amax is clamped to 3


def test_codes_are_taken_against_the_rounded_scale():
    weight = torch.tensor([[1.0, 0.63, -0.37, 0.21]])
    codes, scales = quantise(weight, bits=4, group=4)
    assert scales.item() == bf16(1 / 7.5) != np.float32(1 / 7.5)
    assert codes.tolist() == [[round(w / scales.item()) if w < 1 else 7 for w in weight[0].tolist()]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64])
def test_equal_to_a_second_reading_in_numpy(bits, group):
    weight = weights(48, 192)
    codes, scales = quantise(weight, bits, group)
    grouped = weight.numpy().reshape(48, -1, group)
    amax = np.abs(grouped).max(axis=-1, keepdims=True)
    expected_scales = torch.from_numpy(amax / np.float32((2**bits - 1) / 2)).to(torch.bfloat16)
    nearest = np.rint(grouped / expected_scales.float().numpy())
    expected = np.clip(nearest, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).reshape(48, 192)
    assert torch.equal(scales, expected_scales.squeeze(-1))
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.bfloat16
    assert np.array_equal(codes.numpy(), expected)


def test_the_bits_are_pinned():
    """The `weights` digest of a model quantised at load stands on these; a change needs a new QUANTISER version."""
    digest = hashlib.sha256()
    for bits in BITS:
        codes, scales = quantise(weights(64, 256, seed=bits), bits, 64)
        digest.update(codes.numpy().tobytes() + scales.view(torch.int16).numpy().tobytes())
    assert digest.hexdigest()[:16] == "0e43b30811584154"


@pytest.mark.parametrize("bits", BITS)
def test_no_weight_is_off_by_more_than_the_grid_allows(bits):
    weight = weights(32, 128)
    codes, scales = quantise(weight, bits, 32)
    error = (dequantise(codes, scales, torch.float32) - weight).abs().view(32, 4, 32)
    # Half a step inside the grid; its positive end lies half a step below amax, and bf16 moves that by 2**-9 of it.
    assert bool((error <= scales.float().unsqueeze(-1) * (0.5 + 2**bits * 2.0**-9)).all())


def test_a_group_of_zeros_has_scale_one():
    codes, scales = quantise(torch.zeros(2, 8), bits=3, group=4)
    assert scales.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert not codes.any()


def test_a_group_too_small_for_a_bf16_scale_becomes_zero():
    codes, scales = quantise(torch.full((1, 4), 1e-45), bits=8, group=4)
    assert scales.item() == 1.0
    assert not codes.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantised_values_are_rounded_once(dtype):
    codes, scales = quantise(weights(16, 64), 8, 32)
    exact = codes.double().view(16, 2, 32) * scales.double().unsqueeze(-1)
    assert torch.equal(dequantise(codes, scales, dtype), exact.view(16, 64).to(torch.float32).to(dtype))
    assert torch.equal(exact.float().double(), exact)


def test_refusals_name_what_is_wrong():
    with pytest.raises(UnsupportedModel, match="row of 100 weights cannot be cut into groups of 64"):
        quantise(torch.zeros(2, 100), 3, 64)
    with pytest.raises(UnsupportedModel, match="bits are one of"):
        quantise(torch.zeros(2, 64), 5, 64)
    with pytest.raises(BrokenCheckpoint, match="NaN or infinite"):
        quantise(torch.tensor([[1.0, float("nan")]]), 3, 2)
    with pytest.raises(TypeError, match="fp32"):
        quantise(torch.zeros(2, 64, dtype=torch.bfloat16), 3, 64)


def test_levels_name_grids():
    assert Grid.of_level("w3g64") == Grid(3, 64)
    assert Grid.of_level("w4g128") == Grid(4, 128)
    for other in ("dense", "nf4", "int8", "w3g64-s50", "w3", "w3g0", "w03g64x"):
        assert Grid.of_level(other) is None
    with pytest.raises(UnsupportedModel, match="5 bits"):
        Grid.of_level("w5g64")


def test_only_the_seven_linears_of_a_block():
    block = "model.layers.3."
    linears = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert all(is_quantised(f"{block}self_attn.{name}.weight") for name in linears)
    assert all(is_quantised(f"{block}mlp.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj"))
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        block + "input_layernorm.weight",
        block + "self_attn.q_proj.bias",
    ):
        assert not is_quantised(name)
