"""Rule of transfer: off the diagonal, without parents, transferred gains over native ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny import rows

from lab.data.windows import windows
from lab.transfer.cells import Cell, Place, verdict
from lab.transfer.prompts import Contender
from lab.transfer.ratio import transfer_ratio

W = 6
WINDOWS = windows(
    torch.zeros(W, 5, dtype=torch.int64), torch.tensor([[False, True, True, True, True]]).repeat(W, 1), torch.arange(W)
)
PLACES = {level: Place("m", level, f"weights-{level}", 0, 0) for level in ("w4", "w3", "w2")}


def cell(learned, on, gain, *, parents=(), seed=0, weights=None, kind="rows", version=1):
    """`gain` in nats a token, the same in every window."""
    contender = Contender(
        rows(1, 2, seed), f"t@{version}", "t", version, learned, weights or f"weights-{learned}", parents
    )
    without = torch.full((W,), 12.0, dtype=torch.float64)
    return Cell(PLACES[on], contender, "d", "select", WINDOWS, without, without - 4 * gain)


def test_sum_of_transferred_over_sum_of_native():
    found = [
        cell("w4", "w4", 0.10),
        cell("w3", "w3", 0.40),
        cell("w3", "w4", 0.08),
        cell("w4", "w3", 0.20),
    ]
    ratio = transfer_ratio(found)
    assert ratio.pairs == 2
    assert (ratio.transferred, ratio.native) == (pytest.approx(0.28), pytest.approx(0.50))
    assert ratio.share.value == pytest.approx(0.56)
    assert ratio.share.low == pytest.approx(0.56)  # all windows alike: no spread
    assert ratio.share.units == W


def test_what_does_not_count():
    native = cell("w3", "w3", 0.4)
    counted = cell("w4", "w3", 0.2)
    others = [
        cell("w4", "w3", 9.0, parents=("sha256:x",)),  # learned from another prompt
        cell("w4", "w3", 9.0, parents=None),  # nobody told
        cell("w3", "w3", 9.0, weights="weights-other"),  # same level, other weights
        cell("w4", "w2", 9.0),  # no native prompt there
    ]
    assert transfer_ratio([native, counted, *others]).told() == transfer_ratio([native, counted]).told()


def test_seeds_of_a_native_prompt_count_as_their_mean():
    ratio = transfer_ratio([cell("w3", "w3", 0.2), cell("w3", "w3", 0.4, seed=1), cell("w4", "w3", 0.15)])
    assert ratio.share.value == pytest.approx(0.5)


def test_no_pair_and_no_gain_give_no_share():
    assert transfer_ratio([]).share is None
    lost = transfer_ratio([cell("w3", "w3", -0.1), cell("w4", "w3", 0.1)])
    assert (lost.share, lost.pairs) == (None, 1)
    assert lost.told()["value"] is None


def test_a_native_gain_that_may_be_chance_gives_no_share():
    sure, unsure = cell("w3", "w3", 0.1), cell("w3", "w3", 0.1)
    unsure = replace(unsure, behind=unsure.behind + torch.tensor([9.0, -9.0] * 3, dtype=torch.float64))
    assert transfer_ratio([sure, cell("w4", "w3", 0.1)]).share is not None
    assert transfer_ratio([unsure, cell("w4", "w3", 0.1)]).share is None


def test_the_verdict_ranks_as_resolution_does_and_tells_by_how_much():
    found = verdict([cell("w4", "w3", 0.1, version=1), cell("w2", "w3", 0.3, version=2)])
    assert (found.best.contender.name, found.next_best.contender.name) == ("t@2", "t@1")
    assert found.ahead.value == pytest.approx(0.2)
    assert found.helps
    tied = verdict([cell("w4", "w3", 0.1, version=1), cell("w2", "w3", 0.1, version=2)])
    assert tied.best.contender.version == 2  # the newest
    assert not verdict([cell("w4", "w3", -0.1)]).helps
