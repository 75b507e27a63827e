"""Three measures of recovery on losses whose answers are known, and no percentage where there is none to tell."""

from __future__ import annotations

import json

import pytest
import torch

from lab.data.windows import windows
from lab.evaluate.recovery import recovery
from lab.evaluate.score import Scores

DOCUMENTS, LENGTH = 40, 11
SCORED = torch.ones(DOCUMENTS, LENGTH, dtype=torch.bool)
SCORED[:, 0] = False
DATA = windows(torch.zeros(DOCUMENTS, LENGTH, dtype=torch.int64), SCORED, torch.arange(DOCUMENTS))
NOISE = torch.randn(DOCUMENTS, 1, generator=torch.Generator().manual_seed(0))


def scores(nll, kl=None, agrees=None, spread=0.01, data=DATA):
    """Every token costs nll, more or less by document."""

    def around(value):
        return None if value is None else (value + spread * NOISE) * SCORED

    top = None if agrees is None else (torch.arange(LENGTH - 1) < agrees * (LENGTH - 1)).expand(DOCUMENTS, -1)
    top = None if top is None else torch.cat((torch.zeros(DOCUMENTS, 1, dtype=torch.bool), top), 1)
    return Scores(data, around(nll), SCORED, around(kl), top)


def test_the_three_measures():
    found = recovery(scores(3.0), scores(4.0, 0.8, 0.5), scores(3.25, 0.2, 0.7), scores(2.9))
    assert found.gap.value == pytest.approx(1.0, abs=1e-5)
    assert found.gain.value == pytest.approx(0.75, abs=1e-5)
    assert found.share.value == pytest.approx(0.75, abs=1e-5)
    assert found.net_share.value == pytest.approx(1 - 0.35, abs=1e-5)
    assert found.kept.value == pytest.approx(-2.5, abs=1e-4)
    assert found.kl_share.value == pytest.approx(0.75, abs=0.01)
    assert (found.top1.value, found.top1_prompted.value) == pytest.approx((0.5, 0.7))
    assert found.not_inferior is False
    for each in (found.share, found.net_share, found.kl_share):
        assert each.low <= each.value <= each.high
        assert each.units == DOCUMENTS
    told = json.loads(json.dumps(found.told()))
    assert told["share"]["value"] == found.share.value
    assert told["not_inferior"] is False


def test_an_idle_prompt_recovers_nothing():
    found = recovery(scores(3.0), scores(4.0, 0.8, 0.5), scores(4.0, 0.8, 0.5), scores(3.0))
    assert found.gain.value == found.share.value == found.net_share.value == found.kl_share.value == 0


def test_adapting_to_a_domain_is_no_recovery():
    """A prompt that helps the dense model as much closes half the gap by the first measure, none by the second."""
    found = recovery(scores(3.0), scores(4.0), scores(3.5), scores(2.5))
    assert found.share.value == pytest.approx(0.5, abs=1e-5)
    assert found.net_share.value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("compressed", "spread"), [(3.04, 0.0), (2.9, 0.0)])
def test_a_small_gap_is_told_in_nats_and_not_in_percent(compressed, spread):
    found = recovery(scores(3.0, spread=spread), scores(compressed, 0.04), scores(3.003, 0.01))
    assert found.share is None
    assert found.net_share is None
    assert found.kl_share is None
    assert found.kl.value == pytest.approx(0.04, abs=0.01)
    assert found.excess.value == pytest.approx(0.003, abs=0.01)


def test_a_gap_whose_interval_touches_0_has_no_percentage():
    """Large on average, but within what documents differ by."""
    noisy = scores(3.1)
    noisy = Scores(DATA, noisy.nll + NOISE.flip(0) * SCORED, SCORED)
    found = recovery(scores(3.0), noisy, scores(3.0))
    assert found.gap.low < 0 < found.gap.high
    assert found.share is None


def test_not_worse_than_dense_needs_the_interval_within_the_margin():
    assert recovery(scores(3.0), scores(4.0), scores(3.002)).not_inferior is True
    assert recovery(scores(3.0), scores(4.0), scores(3.008)).not_inferior is False


def test_without_a_teacher_or_a_dense_prompt_their_measures_are_missing():
    found = recovery(scores(3.0), scores(4.0), scores(3.2))
    assert (found.net_share, found.kl, found.kl_share, found.top1) == (None, None, None, None)
    assert found.told()["kl"] is None


def test_scores_of_other_windows_do_not_mix():
    other = windows(torch.ones(DOCUMENTS, LENGTH, dtype=torch.int64), SCORED, torch.arange(DOCUMENTS))
    with pytest.raises(ValueError, match="different windows"):
        recovery(scores(3.0), scores(4.0), scores(3.2, data=other))
