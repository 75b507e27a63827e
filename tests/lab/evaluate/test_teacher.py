"""The dense model's states: the same from memory and from a file, which survives a kill and is shared by windows."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import model as reference
from support.tiny import ours

from lab.data.windows import windows
from lab.errors import RunError
from lab.evaluate import teacher as kept
from lab.evaluate.score import batches, score
from lab.evaluate.teacher import teacher
from llama.identity import Identity
from llama.load import LoadedModel


def loaded(seed=0, dtype=torch.float32, weights="w"):
    return LoadedModel(ours(reference(seed), dtype), Identity("tiny", "b", "dense", weights), 0, 0, "float32")


def made(seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(260, (9, 16), generator=generator)
    scored = torch.rand(9, 16, generator=generator) < 0.6
    scored[:, 0] = False
    return windows(ids, scored, torch.arange(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_what_memory_gives(tmp_path, dtype):
    dense, data, other = loaded(dtype=dtype), made(), ours(reference(1))
    live = score(other, data, teacher=teacher(dense, data))
    first = score(other, data, teacher=teacher(dense, data, cache=tmp_path))
    again = score(other, data, teacher=teacher(dense, data, cache=tmp_path))
    assert torch.equal(first.kl, again.kl)
    if dtype == torch.bfloat16:
        assert torch.equal(first.kl, live.kl)
    else:
        torch.testing.assert_close(first.kl, live.kl, rtol=1e-2, atol=1e-3)
    (file,) = tmp_path.glob("*.states")
    assert file.stat().st_size == data.scored_tokens * 128 * 2


def test_the_second_time_nothing_is_computed(tmp_path, monkeypatch):
    dense, data = loaded(), made()
    one = teacher(dense, data, cache=tmp_path)
    monkeypatch.setattr(kept, "predicting", None)
    rows = torch.tensor([4, 0, 8])
    assert torch.equal(teacher(dense, data, cache=tmp_path).hidden(rows), one.hidden(rows))


def test_a_file_belongs_to_weights_dtype_and_windows(tmp_path):
    data = made()
    for dense, each in (
        (loaded(), data),
        (loaded(weights="other"), data),
        (loaded(dtype=torch.bfloat16), data),
        (loaded(), made(seed=4)),
    ):
        teacher(dense, each, cache=tmp_path)
    assert len(list(tmp_path.glob("*.states"))) == 4


@pytest.mark.parametrize("cut", [0, 1, 700, 5000, 10**6])
def test_what_a_kill_left_is_taken_up(tmp_path, cut, monkeypatch):
    """Also in the middle of a row: batches that are whole are not computed again, the others with the same windows."""
    dense, data = loaded(), made()
    together = batches(data, 60, in_order=True)
    assert len(together) > 2
    monkeypatch.setattr(kept, "batches", lambda windows, in_order: together)
    teacher(dense, data, cache=tmp_path)
    (file,) = tmp_path.glob("*.states")
    whole = file.read_bytes()
    file.unlink()
    file.with_suffix(".part").write_bytes(whole[:cut])
    computed = []
    real = kept.predicting

    def counted(model, windows, before, some):
        computed.extend(some)
        return real(model, windows, before, some)

    monkeypatch.setattr(kept, "predicting", counted)
    teacher(dense, data, cache=tmp_path)
    assert file.read_bytes() == whole
    ends = torch.stack([data.scored[rows].sum() for rows in together]).cumsum(0) * 128 * 2
    assert len(computed) == int((ends > cut).sum())


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*--cache"):
        teacher(loaded(), made(), cache=tmp_path)
    monkeypatch.undo()
    teacher(loaded(), made(), cache=tmp_path)
