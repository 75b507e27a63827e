"""Dense checkpoints: what dtype the files are in and what is computed in, what stays in memory, what is told."""

import pytest
import torch
from support.checkpoints import logits, model, relative, save
from transformers import LlamaForCausalLM

from llama.linear import DenseLinear
from llama.load import load

IDS = torch.randint(0, 260, (90,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_files_are_computed_in_fp32(tmp_path, stored):
    save(tmp_path, model().to(getattr(torch, stored)))
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load(tmp_path, dtype="float32", device="cpu").model
    torch.testing.assert_close(logits(ours, IDS), logits(reference, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("prepare", [True, False])
def test_half_precision_compute(tmp_path, dtype, prepare):
    reference = model()
    ours = load(save(tmp_path, reference), dtype=dtype, device="cpu", prepare=prepare).model
    error = relative(logits(ours, IDS), logits(reference, IDS))
    assert error < {"bfloat16": 2e-2, "float16": 3e-3}[dtype]
    half = reference.to(getattr(torch, dtype))  # as far from fp32 as transformers is
    assert error < 1.3 * relative(logits(half, IDS), logits(model(), IDS))


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_real_ones(tmp_path, tied):
    reference = model(tie_word_embeddings=tied)
    loaded = load(save(tmp_path, reference), dtype="float32", device="cpu")
    parameters = sum(p.numel() for p in reference.parameters())
    assert loaded.resident_bytes == 4 * parameters
    assert loaded.disk_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert load(tmp_path, dtype="bfloat16", device="cpu", prepare=False).resident_bytes == 2 * parameters


def test_a_tied_head_is_copied_only_when_it_is_rearranged(tmp_path):
    save(tmp_path, model(tie_word_embeddings=True))
    plain = load(tmp_path, dtype="bfloat16", device="cpu", prepare=False)
    assert isinstance(plain.model.head, DenseLinear)
    assert plain.model.head.dense().data_ptr() == plain.model.embedding.dense().data_ptr()
    prepared = load(tmp_path, dtype="bfloat16", device="cpu")
    assert torch.equal(prepared.model.head.dense(), prepared.model.embedding.dense())
    assert prepared.resident_bytes > plain.resident_bytes


def test_nothing_of_the_file_stays_mapped(tmp_path):
    """Weights that were views of the file would follow it when it is overwritten, and crash when it is cut."""
    folder = save(tmp_path, model())
    loaded = load(folder, dtype="float32", device="cpu").model
    before = logits(loaded, IDS)
    file = folder / "model.safetensors"
    with file.open("r+b") as data:
        data.seek(file.stat().st_size // 2)
        data.write(b"\x7f" * (file.stat().st_size // 2))
    assert torch.equal(logits(loaded, IDS), before)


def test_progress_ends_with_everything(tmp_path):
    folder = save(tmp_path, model())
    told = []
    load(folder, device="cpu", progress=lambda *report: told.append(report))
    size = (folder / "model.safetensors").stat().st_size
    assert told == [("load", 0, size), ("load", size // 2, size), ("load", size, size)]
