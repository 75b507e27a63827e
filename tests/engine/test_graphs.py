"""Decoding by replayed steps against decoding by what is replayed; captured on the CPU as the step itself."""

from __future__ import annotations

import pytest
import torch
from support import tiny
from support.drive import ask

from engine import engine as module
from engine import graphs
from engine.attention import KVPages, PagedAttention, Span, look
from engine.engine import LocalEngine
from engine.graphs import DecodeGraphs, decode_graphs, sizes

COLUMNS = 8


def recorded(step):
    """As a graph: what comes out lies where it lay the last time."""
    out = step()
    return lambda: out.copy_(step())


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


def test_an_engine_that_replays_says_what_one_says_that_does_not(reference, make_engine, monkeypatch):
    """With a prompt and without; only steps that do nothing but decode are replayed."""
    calls = []

    class Counting(DecodeGraphs):
        def logits(self, ids, spans):
            calls.append(len(ids))
            return super().logits(ids, spans)

    def made(model, kv, most, context):
        return Counting(model, kv, most, -(-context // kv.page_size), look, recorded)

    def answers(engine: LocalEngine):
        prompts = [None, tiny.rows(5, reference.config.hidden_size), None]
        asked = [ask(engine, [7 + i, 3, 9] * (1 + 4 * i), prompt, max_tokens=6 + i) for i, prompt in enumerate(prompts)]
        return [each.wait().tokens for each in asked]

    plain = answers(make_engine())
    monkeypatch.setattr(module, "decode_graphs", made)
    assert answers(make_engine()) == plain
    assert calls
