"""A condition is computed once: what is kept is what would be computed, and belongs to just this condition."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import model as reference
from support.tiny import BASE, ours, rows

from lab.data.windows import windows
from lab.errors import RunError
from lab.evaluate import scorer as module
from lab.evaluate.score import score
from lab.evaluate.scorer import Scorer
from lab.evaluate.teacher import teacher
from llama.identity import Identity
from llama.load import LoadedModel


def loaded(seed=0, weights="w"):
    return LoadedModel(ours(reference(seed)), Identity("tiny", BASE, "w4g64", weights), 0, 0, "float32")


def made(seed=0):
    ids = torch.randint(260, (5, 12), generator=torch.Generator().manual_seed(seed))
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    return windows(ids, scored, torch.arange(5))


def silent(step, done, total):
    pass


@pytest.fixture
def counted(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "score", lambda *args, **rest: calls.append(1) or score(*args, **rest))
    return calls


@pytest.mark.parametrize("taught", [False, True])
def test_the_second_time_nothing_is_computed(tmp_path, counted, taught):
    model, data, prompt = loaded(), made(), rows(3, 128)
    dense = teacher(loaded(1, "dense"), data) if taught else None
    first, again = (Scorer(model, tmp_path)(data, prompt, silent, dense) for _ in range(2))
    assert len(counted) == 1
    for name in ("nll", "hits", "kl", "agrees"):
        one, other = getattr(first, name), getattr(again, name)
        assert torch.equal(one, other) if taught or name in ("nll", "hits") else one is other is None


def test_every_condition_is_another_one(tmp_path, counted):
    model, data, dense = loaded(), made(), teacher(loaded(1, "dense"), made())
    tuned = teacher(loaded(2, "tuned"), made())  # of the same base: that names no weights but the embedding's
    Scorer(model, tmp_path)(data, None, silent)
    one, other = (Scorer(model, tmp_path)(data, None, silent, each) for each in (dense, tuned))
    assert not torch.equal(one.kl, other.kl)
    Scorer(model, tmp_path)(data, rows(3, 128), silent)
    Scorer(model, tmp_path)(data, rows(4, 128), silent)
    Scorer(model, tmp_path)(made(1), None, silent)
    Scorer(loaded(weights="other"), tmp_path)(data, None, silent)
    assert len(counted) == 7


def test_without_a_folder_nothing_is_kept_and_a_broken_file_is_made_anew(tmp_path, counted):
    model, data = loaded(), made()
    Scorer(model)(data, None, silent)
    whole = Scorer(model, tmp_path)(data, None, silent)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(Scorer(model, tmp_path)(data, None, silent).nll, whole.nll)
    assert len(counted) == 3


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        Scorer(loaded(), tmp_path)(made(), None, silent)
    assert list(tmp_path.iterdir()) == []
