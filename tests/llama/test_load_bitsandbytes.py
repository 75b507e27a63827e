"""NF4 and LLM.int8: codes and scales are bitsandbytes' own, and so are the logits, without its traps."""

import bitsandbytes.functional as bnb
import pytest
import torch
from support.checkpoints import LINEARS, logits, model, relative, save, write
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llama.checkpoint import Checkpoint
from llama.errors import UnsupportedModel
from llama.formats.bitsandbytes import MadeInt8, MadeNf4
from llama.formats.matrix import DenseMatrix
from llama.load import load
from llama.model import CausalAttention
from llama.packed import CodebookLinear, Int8Linear

IDS = torch.randint(0, 260, (60,), generator=torch.Generator().manual_seed(1))
NAME = "model.layers.0.mlp.down_proj.weight"


def dequantised(reference, rule):
    """`reference` with each linear of its blocks put through `rule`."""
    for name, parameter in reference.named_parameters():
        if name.split(".")[-2] in LINEARS:
            parameter.data = rule(parameter.data)
    return reference


def nf4(weight: torch.Tensor) -> torch.Tensor:
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def int8(weight: torch.Tensor) -> torch.Tensor:
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    return codes.float() * absmax[:, None] / 127


@pytest.fixture
def dense(tmp_path):
    """A matrix in a checkpoint, and its values; one row is zeros."""
    made = model()
    made.get_parameter(NAME).data[3] = 0
    save(tmp_path, made)
    weight = made.get_parameter(NAME).data
    return DenseMatrix(Checkpoint(tmp_path), NAME, tuple(weight.shape)), weight


def test_nf4_codes_are_bitsandbytes_own(dense):
    matrix, weight = dense
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, absmax, _ = MadeNf4(matrix).rows(0, len(weight))
    assert torch.equal(absmax, state.absmax)
    flat = codes.flatten().to(torch.uint8)
    assert torch.equal(flat[0::2] << 4 | flat[1::2], packed.flatten())


def test_int8_codes_are_bitsandbytes_own_but_zeros_stay_zeros(dense):
    matrix, weight = dense
    theirs, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    codes, scales, _ = MadeInt8(matrix).rows(0, len(weight))
    others = torch.arange(len(weight)) != 3
    assert torch.equal(codes[others], theirs[others])
    assert not codes[3].any()
    assert torch.equal(scales[:, 0], absmax / 127)


@pytest.mark.parametrize(("level", "rule", "kind"), [("nf4", nf4, CodebookLinear), ("int8", int8, Int8Linear)])
def test_made_at_load(tmp_path, level, rule, kind):
    save(tmp_path, model())
    reference = dequantised(model(), rule)
    loaded = load(tmp_path, level=level, dtype="float32", device="cpu")
    assert type(loaded.model.blocks[0].qkv) is kind
    torch.testing.assert_close(logits(loaded.model, IDS), logits(reference, IDS), atol=1e-4, rtol=0)
    half = load(tmp_path, level=level, dtype="bfloat16", device="cpu").model
    assert relative(logits(half, IDS), logits(reference, IDS)) < 2.5e-2
    assert relative(logits(half, IDS[:9]), logits(reference, IDS[:9])) < 2.5e-2


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_stored_nf4(tmp_path, nested, storage):
    save(tmp_path / "dense", model())
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()
    folder = save(tmp_path / "nf4", theirs, "nf4")
    ours = load(folder, dtype="float32", device="cpu")
    assert type(ours.model.blocks[0].qkv) is CodebookLinear
    states = {name: module.weight for name, module in theirs.named_modules() if hasattr(module, "quant_state")}
    for name, layer in (("mlp.down_proj", ours.model.blocks[1].down), ("self_attn.o_proj", ours.model.blocks[1].o)):
        weight = states[f"model.layers.1.{name}"]
        assert torch.equal(layer.dense(), bnb.dequantize_4bit(weight.data, weight.quant_state))
    # In training mode it multiplies dequantised weights; in eval, on the CPU, in bf16 whatever the model's dtype.
    torch.testing.assert_close(logits(ours.model, IDS), logits(theirs.train(), IDS), atol=1e-4, rtol=0)
    assert relative(logits(ours.model, IDS), logits(theirs.eval(), IDS)) < 2.5e-2
    again = load(folder, level="nf4", dtype="bfloat16", device="cpu")
    assert relative(logits(again.model, IDS), logits(ours.model, IDS)) < 2.5e-2


def test_stored_int8(tmp_path):
    save(tmp_path / "dense", model())
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
        device_map="cpu",
    ).eval()
    folder = save(tmp_path / "int8", theirs, "int8")
    ours = load(folder, dtype="float32", device="cpu").model
    reference = dequantised(model(), int8)
    torch.testing.assert_close(logits(ours, IDS), logits(reference, IDS), atol=1e-4, rtol=0)
    # bitsandbytes also rounds activations to 8 bits, which weight-only serving does not.
    assert relative(logits(ours, IDS), logits(theirs, IDS)) < 3e-2


@pytest.mark.parametrize("level", ["nf4", "int8"])
def test_serving_scoring_and_learning_share_one_path(tmp_path, level):
    """bitsandbytes' CPU layers lose the gradient in eval, silently, and change their answer by mode."""
    loaded = load(save(tmp_path, model()), level=level, dtype="float32", device="cpu").model

    def hidden(rows: torch.Tensor) -> torch.Tensor:
        return loaded(rows, torch.arange(len(rows)), CausalAttention(1))

    rows = loaded.embed(IDS).requires_grad_()
    learned = hidden(rows)
    learned.pow(2).sum().backward()
    with torch.inference_mode():
        served = hidden(loaded.embed(IDS))
    torch.testing.assert_close(
        served, learned.detach(), rtol=1e-5, atol=1e-5
    )  # with a gradient, fused between products
    reference = load(tmp_path, dtype="float32", device="cpu", prepare=False).model
    for block, packed in zip(reference.blocks, loaded.blocks, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            getattr(block, name).weight.data = getattr(packed, name).dense()
    plain = loaded.embed(IDS).requires_grad_()
    reference(plain, torch.arange(len(IDS)), CausalAttention(1)).pow(2).sum().backward()
    assert relative(rows.grad, plain.grad) < 1e-5


def test_fp4_is_refused_by_name(tmp_path):
    made = model()
    quantisation = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    write(tmp_path, made.config.to_dict() | {"quantization_config": quantisation}, made.state_dict(), "fp4")
    with pytest.raises(UnsupportedModel, match="'fp4'; supported: nf4"):
        load(tmp_path, device="cpu")
