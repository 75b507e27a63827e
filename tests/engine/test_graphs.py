"""Decoding by replayed steps against decoding by what is replayed; captured on the CPU as the step itself."""

from __future__ import annotations

import pytest
import torch
from support import tiny
from support.replayed import recorded

from engine import graphs
from engine.attention import KVPages, PagedAttention, Span, look
from engine.graphs import DecodeGraphs, decode_graphs, sizes

COLUMNS = 8


def graphs_of(model, kv, most=6):
    return DecodeGraphs(model, kv, most, COLUMNS, look, recorded)


@pytest.fixture(scope="module")
def model():
    return tiny.ours(tiny.reference())


def pages(model) -> KVPages:
    kv = KVPages(model.config, 24, 16, model.dtype, model.device)
    generator = torch.Generator().manual_seed(0)
    for store in (kv.keys, kv.values):
        store.copy_(torch.randn(store.shape, generator=generator))
    kv.blank([0])
    return kv


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_batch_that_is_filled_up_gives_what_it_gives_by_itself(model, batch):
    mine, plain = pages(model), pages(model)
    replayed = graphs_of(model, mine)
    for round_ in range(2):  # the second finds what the first has left
        spans = [Span([1 + 3 * i, 2 + 3 * i, 3 + 3 * i], 17 + 2 * i + round_, 1) for i in range(batch)]
        ids = [5 + i for i in range(batch)]
        positions = torch.tensor([span.start for span in spans])
        hidden = model(model.embed(torch.tensor(ids)), positions, PagedAttention(plain, spans))
        torch.testing.assert_close(replayed.logits(ids, spans), model.logits(hidden).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.keys[:, 1:], plain.keys[:, 1:], rtol=1e-5, atol=1e-5)
    assert mine.keys[:, 0].isfinite().all()  # the blank page, where tokens go that nobody asked for


def test_sizes_reach_the_largest_batch():
    assert sizes(1) == [1]
    assert sizes(3) == [1, 2, 4]
    assert sizes(16) == [1, 2, 4, 8, 16]
    assert sizes(40) == [1, 2, 4, 8, 16, 32, 48]


def test_there_are_none_without_cuda(model):
    assert decode_graphs(model, pages(model), 4, 64) is None


def test_a_step_that_cannot_be_captured_is_launched(model, monkeypatch):
    def refuse():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "paged_look", lambda kv: look)
    monkeypatch.setattr(graphs, "capturing", lambda: lambda step: refuse())
    assert decode_graphs(model, pages(model), 4, 64) is None


@torch.inference_mode()
def test_tokens_that_only_the_device_knows_give_what_known_ones_give(model):
    """Rows of the step before in another order; one of them had no token."""
    mine, plain = pages(model), pages(model)
    spans = [Span([1 + 2 * i, 2 + 2 * i], 17 + i, 1) for i in range(3)]
    chosen = torch.tensor([9, -1, 30, 4])
    told = graphs_of(model, mine).logits([3, 0, 1], spans, chosen)
    torch.testing.assert_close(told[:2], graphs_of(model, plain).logits([4, 9, 0], spans)[:2], rtol=0, atol=0)
