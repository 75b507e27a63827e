"""The embedded model at every level that is made at load, against transformers with the weights that the bits mean."""

import time
from copy import deepcopy

import bitsandbytes.functional as bnb
import pytest
import torch
from support.checkpoints import LINEARS, logits, relative
from transformers import AutoTokenizer, LlamaForCausalLM

from llama.load import load
from llama.model import CausalAttention
from llama.rtn import dequantise, quantise

pytestmark = pytest.mark.slow
TEXT = (
    "The lighthouse keeper counted the ships again. There had been eleven at noon and there were twelve now, and no "
    "twelfth had come past the point. He wrote the number down, crossed it out, and went to wake his daughter."
)


def rounded(bits: int):
    return lambda weight: dequantise(*quantise(weight, bits, 64), torch.float32)


def nf4(weight: torch.Tensor) -> torch.Tensor:
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def int8(weight: torch.Tensor) -> torch.Tensor:
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    return codes.float() * absmax[:, None] / 127


RULES = {"dense": lambda weight: weight, "w3g64": rounded(3), "w4g64": rounded(4), "nf4": nf4, "int8": int8}
RESIDENT = {"dense": 16, "w3g64": 4.5, "w4g64": 4.5, "nf4": 4.5, "int8": 8.03}  # bits of a decoder weight beside bf16


@pytest.fixture(scope="module")
def ids(embedded):
    return AutoTokenizer.from_pretrained(embedded)(TEXT, return_tensors="pt")["input_ids"][0]


@pytest.fixture(scope="module")
def reference(embedded):
    return LlamaForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def originals(reference):
    return {n: p.detach().clone() for n, p in reference.named_parameters() if n.split(".")[-2] in LINEARS}


@pytest.mark.parametrize("level", RULES)
def test_logits(embedded, reference, originals, ids, level):
    parameters = dict(reference.named_parameters())
    for name, weight in originals.items():
        parameters[name].data.copy_(RULES[level](weight))
    expected = logits(reference, ids)
    theirs = relative(logits(deepcopy(reference).bfloat16(), ids), expected)
    ours = logits(load(embedded, level=level, dtype="float32", device="cpu").model, ids)
    print(f"{level}: fp32 off by {(ours - expected).abs().max():.1e}, transformers' bf16 error {theirs:.4f}")
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)
    start = time.perf_counter()
    loaded = load(embedded, level=level, dtype="bfloat16", device="cpu")
    seconds = time.perf_counter() - start
    short = ids[:24]  # the kernels of few rows
    errors = [relative(logits(loaded.model, ids), expected), relative(logits(loaded.model, short), expected[:24])]
    print(f"{level}: {seconds:.1f} s, {loaded.resident_bytes / 1e6:.1f} MB, bf16 error {errors[0]:.4f} {errors[1]:.4f}")
    assert max(errors) < 1.5 * theirs
    linears = sum(weight.numel() for weight in originals.values())
    assert (
        loaded.resident_bytes < linears * RESIDENT[level] / 8 + 2.02 * 2 * loaded.model.embedding.dense().numel() + 1e6
    )


def test_a_gradient_through_three_bits(embedded, ids):
    """The first learned prompt goes through exactly this, in bf16 with prepared weights."""

    def gradient(dtype: str) -> torch.Tensor:
        model = load(embedded, level="w3g64", dtype=dtype, device="cpu").model
        rows = model.embed(ids).requires_grad_()
        hidden = model(rows, torch.arange(len(ids)), CausalAttention(1))
        loss = torch.nn.functional.cross_entropy(model.logits(hidden[:-1]).float(), ids[1:])
        loss.backward()
        return rows.grad.float()

    exact, near = gradient("float32"), gradient("bfloat16")
    assert torch.cosine_similarity(exact.flatten(), near.flatten(), 0) > 0.98
