"""Intervals cover what they claim to, pair what is paired, and say of what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lab.data.windows import windows
from lab.evaluate.bootstrap import Estimate, Paired, by_document, difference, estimate, not_inferior


def first(means):
    return means[0]


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """400 samples of 60 documents of unequal length with a mean of 3: 95 % ± 3.3 points (three standard errors)."""
    dice = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        counts = dice.integers(50, 500, 60).astype(float)
        level = 3 + dice.normal(0, 0.5, 60)  # documents differ more than their tokens do
        found = estimate(Paired((counts * level)[None], counts), first, resamples=1000, seed=trial)
        covered += found.low <= 3 <= found.high
    assert 0.917 <= covered / 400 <= 0.983


def test_pairing_leaves_the_noise_of_documents_out():
    dice = np.random.default_rng(2)
    counts = np.full(80, 100.0)
    level = 3 + dice.normal(0, 1, 80)
    gain = 0.1 + dice.normal(0, 0.02, 80)
    paired = Paired(np.stack([counts * level, counts * (level - gain)]), counts)
    found = estimate(paired, lambda m: m[0] - m[1])
    assert found.value == pytest.approx(gain.mean())
    assert found.low > 0.09
    assert found.high < 0.11
    alone = estimate(paired, first)
    assert alone.high - alone.low > 0.3


def test_a_mean_is_over_tokens_not_over_documents():
    paired = Paired(np.array([[10.0, 900.0]]), np.array([10.0, 300.0]))
    assert estimate(paired, first).value == pytest.approx(910 / 310)


def test_the_seed_alone_decides():
    paired = Paired(np.random.default_rng(0).random((2, 60)), np.full(60, 2.0))
    assert estimate(paired, first, seed=3) == estimate(paired, first, seed=3)
    assert estimate(paired, first, seed=3) != estimate(paired, first, seed=4)


def test_chunks_of_draws_change_nothing(monkeypatch):
    paired = Paired(np.arange(12.0).reshape(2, 6), np.full(6, 2.0))
    whole = estimate(paired, first)
    monkeypatch.setattr("lab.evaluate.bootstrap.CHUNK", 60)
    assert estimate(paired, first) == whole


def test_tokens_are_summed_by_document():
    scored = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    data = windows(torch.zeros(4, 3, dtype=torch.int64), scored, torch.tensor([5, 5, 2, 9]))
    values = scored * torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    paired = by_document([values], data)
    assert paired.sums.tolist() == [[8.0, 4.0]]  # documents 2 and 5; 9 has nothing that is scored
    assert paired.counts.tolist() == [2.0, 3.0]
    assert paired.unit == "document"


def test_a_lone_document_is_resampled_by_window_and_a_lone_window_has_no_interval():
    scored = torch.tensor([[0, 1, 1]] * 3).bool()
    data = windows(torch.zeros(3, 3, dtype=torch.int64), scored, torch.zeros(3, dtype=torch.int64))
    values = scored * torch.tensor([[1.0], [2.0], [3.0]])
    found = difference(values, values * 0, data)
    assert (found.units, found.unit, found.value) == (3, "window", 2.0)
    assert 1.0 <= found.low < 2.0 < found.high <= 3.0
    one = data.select(torch.tensor([0]))
    assert difference(values[:1], values[:1] * 0, one) == Estimate(1.0, None, None, 1, "window")
    assert difference(values[:1], values[:1] * 0, one).told()["interval"] is None


@pytest.mark.parametrize(("high", "expected"), [(0.004, True), (0.005, True), (0.006, False), (None, None)])
def test_not_inferior_is_said_of_the_whole_interval(high, expected):
    assert not_inferior(Estimate(0.001, None if high is None else -0.1, high, 9)) is expected
