"""What a model will take in memory is known before it is loaded."""

import pytest
from support.checkpoints import model, save, write

from llama import native
from llama.formats.promptstitch import q8_tensors, with_q8_tables
from llama.load import expected_bytes, load
from llama.q8 import q8_nearest


@pytest.mark.parametrize(("dtype", "compute"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")])
@pytest.mark.parametrize("level", [None, "w4g64", "w8g32", "nf4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_told_is_what_there_is(tmp_path, dtype, compute, level, tied):
    if dtype == "bfloat16" and compute is None and native.product() is None:
        pytest.skip("oneDNN rearranges dense weights here, and does not tell beforehand what it fills up")
    folder = save(tmp_path, model(tie_word_embeddings=tied))
    if compute == "int8" and (native.kernels() is None or not native.kernels().multiplies_integers):
        pytest.skip("this CPU multiplies no integers")
    loaded = load(folder, level=level, dtype=dtype, device="cpu", compute=compute)
    assert expected_bytes(folder, loaded.identity, dtype=dtype, device="cpu", compute=compute) == loaded.resident_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_in_8_bits_count_once(tmp_path, dtype):
    reference = model(tie_word_embeddings=True)
    state = dict(reference.state_dict())
    del state["lm_head.weight"]
    state |= q8_tensors("model.embed_tokens", *q8_nearest(state.pop("model.embed_tokens.weight")))
    config = reference.config.to_dict() | {"quantization_config": with_q8_tables(None)}
    folder = write(tmp_path, config, state)
    loaded = load(folder, dtype=dtype, device="cpu")
    assert expected_bytes(folder, loaded.identity, dtype=dtype, device="cpu") == loaded.resident_bytes
