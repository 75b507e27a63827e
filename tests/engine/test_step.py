"""All blocks in one call give the bits that block by block gives, over decode steps and prefill chunks side by side."""

import pytest
import torch
from support.checkpoints import model, save

from engine.attention import KVPages, NativeAttention, Span, attend
from engine.runner import Runner
from llama import native
from llama.load import load
from llama.step import Step

ours = native.kernels()
pytestmark = pytest.mark.skipif(ours is None, reason="the kernels were not built, or this CPU does not run them")
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SPANS = [Span([1, 2], 20, 1), Span([3], 7, 1), Span([4, 5, 6], 16, 25), Span([7], 0, 3)]


def loaded(folder, **options):
    return load(folder, dtype="bfloat16", device="cpu", **options).model


def check(llama, spans=SPANS) -> None:
    """Hidden states and everything in the pages."""
    tokens = sum(span.length for span in spans)
    ids = torch.randint(0, 260, (tokens,), generator=torch.Generator().manual_seed(tokens))
    positions = torch.tensor([at for span in spans for at in range(span.start, span.end)])
    found = []
    for whole in (False, True):
        kv = KVPages(llama.config, 8, 16, torch.bfloat16, torch.device("cpu"))
        kv.blank(range(8))
        earlier = torch.Generator().manual_seed(0)
        kv.keys.normal_(generator=earlier)
        kv.values.normal_(generator=earlier)
        runner = Runner(llama, kv)
        assert runner._step is not None
        if not whole:
            runner._step = None
        attention = attend(kv, spans)
        assert isinstance(attention, NativeAttention)
        with torch.inference_mode():
            found.append((runner.hidden(ids, positions, attention), kv.keys, kv.values))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("level", ["w8g64", "w4g64", "w3g32", "nf4", "int8"])
@pytest.mark.parametrize("compute", [None, "auto"])
def test_packed_weights(tmp_path, level, compute):
    check(loaded(save(tmp_path, model(**HEADS)), level=level, compute=compute))


@pytest.mark.parametrize("dots", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_dense_weights(tmp_path, monkeypatch, biased, dots):
    if dots and not ours.dots:
        pytest.skip("this CPU has no bf16 dot product (AVX512-BF16)")
    monkeypatch.setattr(native, "dot_is_faster", lambda: dots)
    monkeypatch.setattr(native, "product", lambda: ours)
    monkeypatch.setattr(native, "in_pairs", lambda inputs: dots)
    check(loaded(save(tmp_path, model(**HEADS, attention_bias=biased, mlp_bias=biased))))


@pytest.mark.parametrize("spans", [[Span([1], 0, 1)], [Span([1, 2], 0, 32)], [Span([i], i, 1) for i in range(1, 8)]])
def test_batches_of_one_kind(tmp_path, spans):
    check(loaded(save(tmp_path, model(**HEADS)), level="w4g64", compute="auto"), spans)


def test_what_other_means_multiply_goes_block_by_block(tmp_path, monkeypatch):
    llama = loaded(save(tmp_path, model(**HEADS)), level="w4g64")
    assert Step.of(llama) is not None
    monkeypatch.setattr(llama.blocks[1].down, "native", lambda: None)
    assert Step.of(llama) is None
    assert Step.of(load(tmp_path, level="w4g64", dtype="float32", device="cpu").model) is None
