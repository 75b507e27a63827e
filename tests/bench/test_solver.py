"""What the comparison with llm-compressor says of losses: ratios paired by document, and what is held to the bound."""

from __future__ import annotations

import math

import pytest
import torch

from bench.solver import BOUND, verdict
from lab.data.windows import Windows, windows


@pytest.fixture
def three() -> Windows:
    """Two documents, of two windows and of one, with 3 scored tokens each."""
    scored = torch.tensor([[False, True, True, True]] * 3)
    return windows(torch.zeros(3, 4, dtype=torch.int64), scored, torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    ("ours", "more", "ok"),
    [("w4g64.ours", 0.99, True), ("w4g64.ours", 1.02, False), ("w4g64.ours-published", 1.02, True)],
)
def test_only_what_compress_makes_by_itself_is_held_to_the_bound(three, ours, more, ok):
    peer = torch.tensor([[2.0], [1.0], [3.0]]) * three.scored
    found = verdict({ours: peer + math.log(more) * three.scored, "w4g64.peer": peer}, three, ours, "w4g64.peer")
    assert found["ratio"] == pytest.approx(more, rel=1e-6)
    assert found["interval"] == pytest.approx([more, more], rel=1e-6)  # paired: the documents' own losses are gone
    assert (found["units"], found["unit"], found["ok"]) == (2, "document", ok)
    assert found["bound"] == (BOUND if ours == "w4g64.ours" else None)
