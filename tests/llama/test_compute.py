"""`compute`: what the linears of a loaded model multiply, and how far that takes it from the weights that are meant."""

import pytest
import torch
from support.checkpoints import logits, model, relative, save, write

from llama import native
from llama.errors import UnsupportedModel
from llama.formats.promptstitch import q8_tensors, with_q8_tables
from llama.linear import DenseLinear
from llama.load import choose_compute, choose_dtype, load
from llama.panels import IntegerPanelLinear, PanelLinear
from llama.q8 import q8_nearest

IDS = torch.randint(0, 260, (60,), generator=torch.Generator().manual_seed(1))
CPU, BF16 = torch.device("cpu"), torch.bfloat16
ours = native.kernels()
needs_integers = pytest.mark.skipif(
    ours is None or not ours.multiplies_integers, reason="this CPU multiplies no integers"
)


@needs_integers
@pytest.mark.parametrize("level", ["w8g32", "w4g64", "w3g64", "w2g64", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_integers_stand_for_the_same_weights(tmp_path, level, tied):
    """Up to rounded inputs: the weights of the blocks are the level's, those of the head are on an 8-bit grid."""
    folder = save(tmp_path, model(tie_word_embeddings=tied))
    plain = load(folder, level=level, dtype="bfloat16", device="cpu")
    fast = load(folder, level=level, dtype="bfloat16", device="cpu", compute="auto")
    assert (plain.compute, fast.compute) == ("bfloat16", "int8")
    for one, other in zip(plain.model.blocks, fast.model.blocks, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            assert isinstance(getattr(other, name), IntegerPanelLinear)
            assert torch.equal(getattr(one, name).dense(), getattr(other, name).dense())
    assert isinstance(fast.model.head, IntegerPanelLinear)
    assert relative(logits(fast.model, IDS), logits(plain.model, IDS)) < 4e-2  # bf16 alone moves them by 2e-2


@needs_integers
def test_values_of_a_table_are_rounded(tmp_path):
    folder = save(tmp_path, model())
    plain, fast = (load(folder, level="nf4", dtype="bfloat16", device="cpu", compute=c) for c in ("bf16", "auto"))
    assert (plain.compute, fast.compute) == ("bfloat16", "int8")
    for name in ("qkv", "o", "gate_up", "down"):
        one, other = (getattr(loaded.model.blocks[0], name) for loaded in (plain, fast))
        assert isinstance(other, IntegerPanelLinear)
        assert relative(other.dense(), one.dense()) < 8e-3  # NF4 itself moves them by 9e-2
    assert relative(logits(fast.model, IDS), logits(plain.model, IDS)) < 4e-2  # bf16 alone moves them by 2e-2


@needs_integers
def test_dense_weights_are_rounded_where_integers_are_asked_for(tmp_path):
    folder = save(tmp_path, model())
    plain = load(folder, dtype="bfloat16", device="cpu", compute="auto")
    fast = load(folder, dtype="bfloat16", device="cpu", compute="int8")
    assert isinstance(plain.model.blocks[0].qkv, DenseLinear)
    assert isinstance(fast.model.blocks[0].qkv, IntegerPanelLinear)
    assert relative(fast.model.blocks[0].qkv.dense(), plain.model.blocks[0].qkv.dense()) < 6e-3
    assert relative(logits(fast.model, IDS), logits(plain.model, IDS)) < 4e-2  # bf16 alone moves them by 2e-2


@needs_integers
def test_tables_on_the_grid_are_there_once(tmp_path):
    reference = model(tie_word_embeddings=True)
    state = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    state |= q8_tensors("model.embed_tokens", *q8_nearest(state.pop("model.embed_tokens.weight")))
    folder = write(tmp_path, reference.config.to_dict() | {"quantization_config": with_q8_tables(None)}, state)
    plain = load(folder, dtype="bfloat16", device="cpu")
    fast = load(folder, dtype="bfloat16", device="cpu", compute="int8")
    assert torch.equal(fast.model.embed(IDS), plain.model.embed(IDS))
    assert fast.model.embedding.table is fast.model.head
    assert relative(logits(fast.model, IDS), logits(plain.model, IDS)) < 4e-2  # bf16 alone moves them by 2e-2


@needs_integers
def test_groups_that_integers_do_not_take_stay_as_they_are(tmp_path):
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    folder = save(tmp_path, model(**shape))
    fast = load(folder, dtype="bfloat16", device="cpu", compute="int8")
    assert isinstance(fast.model.blocks[0].qkv, DenseLinear)
    assert isinstance(fast.model.blocks[0].down, IntegerPanelLinear)


@needs_integers
@pytest.mark.parametrize(
    ("name", "dtype", "level", "found"),
    [
        ("auto", BF16, "w3g64", "int8"),
        ("auto", BF16, "w4g64-s50", "int8"),
        ("auto", BF16, "int8", "int8"),
        ("auto", BF16, "nf4", "int8"),
        ("auto", BF16, "s50", "bfloat16"),
        ("auto", BF16, "dense", "bfloat16"),
        ("auto", torch.float32, "w3g64", "float32"),
        ("int8", BF16, "dense", "int8"),
        ("bf16", BF16, "w3g64", "bfloat16"),
        (None, BF16, "w3g64", "bfloat16"),
    ],
)
def test_what_is_chosen(name, dtype, level, found):
    assert choose_compute(name, dtype, CPU, level) == found


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("int4", BF16, ("int4", "auto, bf16, int8")),
        ("bf16", torch.float32, ("bf16", "float32")),
        ("int8", torch.float32, ("bfloat16", "VNNI")),
    ],
)
def test_what_cannot_be_is_refused(name, dtype, words):
    with pytest.raises(UnsupportedModel) as raised:
        choose_compute(name, dtype, CPU, "w3g64")
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("compute", [None, "auto"])
def test_auto_is_bf16_only_where_somebody_multiplies_it_fast(monkeypatch, hardware, built, compute):
    """Learning took minutes for seconds in torch's own bf16 product, on a CPU where our kernels serve bf16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(native, "kernels", lambda: object() if built else None)
    assert (choose_dtype("auto", CPU, compute) == BF16) == (hardware or (built and compute is not None))


def test_without_the_kernels_everything_is_as_before(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "kernels", lambda: None)
    loaded = load(save(tmp_path, model()), level="w4g64", dtype="bfloat16", device="cpu", compute="auto")
    assert loaded.compute == "bfloat16"
    assert not any(isinstance(layer, IntegerPanelLinear | PanelLinear) for layer in loaded.model.modules())
    with pytest.raises(UnsupportedModel, match="kernels"):
        choose_compute("int8", BF16, CPU, "w4g64")
