"""Packed checkpoints, and dense ones packed at load: logits are those of the weights that the bits mean.

Tensors come from writers that share nothing with the readers (`support.packers`); transformers reads the same files
where it can.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import packers
from support.checkpoints import LINEARS, logits, model, packed, relative, save
from transformers import AutoModelForCausalLM

from llama import native
from llama.errors import UnsupportedModel
from llama.int4 import Int4Linear, kernel_block
from llama.linear import FusedLinear
from llama.load import load
from llama.packed import CodebookLinear, Int8Linear
from llama.panels import PanelLinear
from llama.rtn import dequantise, quantise

IDS = torch.randint(0, 260, (60,), generator=torch.Generator().manual_seed(1))
BF16 = 2.5e-2  # relative error of a dense bf16 model of this size is 1.3e-2
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
}


def check(folder, reference, kind: type, gradient: bool = True) -> None:
    """fp32 logits and the gradient of a soft row equal the dense model's; bf16 logits are near, packed all along."""
    loaded = load(folder, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(loaded.model, IDS), logits(reference, IDS), atol=1e-4, rtol=0)
    assert type(loaded.model.blocks[0].qkv) is kind
    half = load(folder, dtype="bfloat16", device="cpu")
    assert relative(logits(half.model, IDS), logits(reference, IDS)) < BF16
    for few in (IDS[:1], IDS[:20]):  # the kernels of few rows
        assert relative(logits(half.model, few), logits(reference, few)) < BF16
    dense = sum(p.numel() for n, p in reference.named_parameters() if n.split(".")[-2] in LINEARS)
    rest = sum(p.numel() for p in reference.parameters()) - dense
    assert loaded.resident_bytes < 4 * rest + 1.45 * dense  # 8 bits, scales, offsets, inputs' order, tables


def scheme(bits: int, group: int, symmetric: bool = True, **extra) -> dict:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group > 0 else "channel",
        "group_size": group if group > 0 else None,
        **extra,
    }
    return {**COMPRESSED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def kind(bits: int) -> type:
    return CodebookLinear if bits <= 4 else Int8Linear


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized(tmp_path, bits, group, symmetric):
    def pack(name, weight):
        grid = packers.quantise(weight, bits, group if group > 0 else weight.shape[1], symmetric)
        return packers.pack_quantized(name, grid, bits, zeros=not symmetric), grid.weight

    reference = model()
    check(packed(tmp_path, reference, scheme(bits, group, symmetric), f"w{bits}", pack), reference, kind(bits))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized_of_older_versions_leaves_gaps(tmp_path, bits, symmetric):
    def pack(name, weight):
        grid = packers.quantise(weight, bits, 32, symmetric)
        return packers.pack_quantized(name, grid, bits, gapped=True, zeros=not symmetric), grid.weight

    reference = model()
    check(packed(tmp_path, reference, scheme(bits, 32, symmetric), f"w{bits}g32", pack), reference, kind(bits))


@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized_with_act_order(tmp_path, symmetric):
    def pack(name, weight):
        seed = 1 if name.endswith(("q_proj", "k_proj", "v_proj")) else len(name)
        grid = packers.quantise(weight, 4, 32, symmetric, seed)
        return packers.pack_quantized(name, grid, 4, zeros=not symmetric, g_idx=True), grid.weight

    reference = model()
    quantisation = scheme(4, 32, symmetric, actorder="group")
    check(packed(tmp_path, reference, quantisation, "w4g32", pack), reference, CodebookLinear)


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (4, 32), (4, -1), (8, 64), (8, -1)])
def test_transformers_reads_the_same_from_pack_quantized(tmp_path, bits, group):
    def pack(name, weight):
        grid = packers.quantise(weight, bits, group if group > 0 else weight.shape[1], True)
        return packers.pack_quantized(name, grid, bits), grid.weight

    folder = packed(tmp_path, model(), scheme(bits, group), f"w{bits}", pack)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load(folder, dtype="float32", device="cpu").model
    torch.testing.assert_close(logits(ours, IDS), logits(theirs, IDS), atol=1e-4, rtol=0)


def test_layers_may_have_grids_of_their_own(tmp_path):
    """As llm-compressor writes them: other layers by a pattern, which is not run; what is stored tells."""
    own = {"down_proj": (8, 64), "v_proj": (4, 32)}

    def pack(name, weight):
        bits, group = own.get(name.split(".")[-1], (3, 64))
        grid = packers.quantise(weight, bits, group, True)
        return packers.pack_quantized(name, grid, bits), grid.weight

    quantisation = scheme(3, 64)
    for name, (bits, group) in own.items():
        weights = scheme(bits, group)["config_groups"]["group_0"]["weights"]
        quantisation["config_groups"][name] = {"targets": [f"re:.*{name}$"], "weights": weights}
    reference = model()
    folder = packed(tmp_path, reference, quantisation, "w3g64", pack)
    loaded = load(folder, dtype="float32", device="cpu")
    assert loaded.identity.level == "w3g64"
    torch.testing.assert_close(logits(loaded.model, IDS), logits(reference, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(tmp_path, bits, version, act_order, symmetric):
    def pack(name, weight):
        # Calibration sees q, k and v with the same inputs, so their order is one; gate and up differ here on purpose.
        seed = (1 if name.endswith(("q_proj", "k_proj", "v_proj")) else len(name)) if act_order else None
        grid = packers.quantise(weight, bits, 64, symmetric, seed)
        return packers.gptq(name, grid, bits, version), grid.weight

    quantisation = {"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": act_order, "sym": symmetric}
    if version == 2:
        quantisation["checkpoint_format"] = "gptq_v2"
    reference = model()
    folder = packed(tmp_path, reference, quantisation, f"w{bits}g64", pack)
    check(folder, reference, kind(bits))
    gate_up = load(folder, dtype="float32", device="cpu").model.blocks[0].gate_up
    assert (type(gate_up) is FusedLinear) == act_order


def test_gptq_with_one_scale_a_row_and_no_g_idx(tmp_path):
    def pack(name, weight):
        grid = packers.quantise(weight, 4, weight.shape[1], False)
        tensors = packers.gptq(name, grid, 4, 1)
        del tensors[f"{name}.g_idx"]
        return tensors, grid.weight

    reference = model()
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    check(packed(tmp_path, reference, quantisation, "w4", pack), reference, CodebookLinear)


def test_gptq_with_biases_of_zeros(tmp_path):
    """AutoGPTQ gives LLaMA biases that it does not have."""

    def pack(name, weight):
        grid = packers.quantise(weight, 4, 64, False)
        return packers.gptq(name, grid, 4, 1) | {f"{name}.bias": torch.zeros(len(weight))}, grid.weight

    reference = model()
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    check(packed(tmp_path, reference, quantisation, "w4g64", pack), reference, CodebookLinear)


def test_gptq_with_a_packed_head_and_biases(tmp_path):
    reference = model(attention_bias=True, vocab_size=256 + 64)

    def pack(name, weight):
        grid = packers.quantise(weight, 4, 64, False)
        return packers.gptq(name, grid, 4, 1), grid.weight

    folder = packed(tmp_path, reference, {"quant_method": "gptq", "bits": 4, "group_size": 64}, "w4g64", pack)
    tensors = load_file(folder / "model.safetensors")
    stored, meant = pack("lm_head", tensors.pop("lm_head.weight"))
    save_file(tensors | stored, folder / "model.safetensors")
    with torch.no_grad():
        reference.lm_head.weight.copy_(meant)
    check(folder, reference, CodebookLinear)
    assert type(load(folder, dtype="float32", device="cpu").model.head) is CodebookLinear


@pytest.mark.parametrize("level", ["w8g32", "w8g64", "w4g32", "w4g64", "w3g64", "w2g64"])
def test_rounding_at_load(tmp_path, level):
    bits, group = int(level[1]), int(level[3:])
    reference = model()
    save(tmp_path, reference)
    for name, parameter in reference.named_parameters():
        if name.split(".")[-2] in LINEARS:
            parameter.data = dequantise(*quantise(parameter.data, bits, group), torch.float32)
    ours = load(tmp_path, level=level, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(ours.model, IDS), logits(reference, IDS), atol=1e-4, rtol=0)
    half = load(tmp_path, level=level, dtype="bfloat16", device="cpu").model
    assert relative(logits(half, IDS), logits(reference, IDS)) < BF16
    kind = PanelLinear if native.kernels() else Int4Linear if bits <= 4 and kernel_block() else None
    if kind is not None:
        assert all(type(layer) is kind for layer in (half.blocks[0].qkv, half.blocks[1].down))


def test_groups_that_do_not_divide_a_row_are_refused_by_name(tmp_path):
    save(tmp_path, model())  # rows of 128 and 192
    with pytest.raises(UnsupportedModel, match="192"):
        load(tmp_path, level="w4g128", device="cpu")
