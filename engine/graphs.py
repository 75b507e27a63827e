"""Decoding steps as captured CUDA graphs, one for each size of batch: one launch in place of some hundreds.

A batch is filled up to the next size with tokens that write to the blank page and that nobody looks at. What
changes from step to step is copied in one piece to where the graphs read it. Knows a model and its pages; knows no
sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.attention import KVPages, Look, Span, paged_look
from llama.model import Llama

log = logging.getLogger("promptstitch.engine")

SIZES = (1, 2, 4, 8, 16)  # of batches; from there on every multiple of the last
FIELDS = 4  # of a token beside its block table: id, position, slot, how much it sees
PAD = (0, 0, 0, 1)  # a token of the blank page
Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]


class DecodeGraphs:
    """Logits of batches of at most `most` single tokens, each behind a block table of at most `columns` pages.

    `capture` turns a step into one that is replayed, reading and writing the same memory each time. All sizes are
    captured here, so that no request waits for one.
    """

    def __init__(self, model: Llama, kv: KVPages, most: int, columns: int, look: Look, capture: Capture) -> None:
        self._kv = kv
        self._sizes = sizes(most)
        host = np.zeros((self._sizes[-1], FIELDS + columns), np.int32)
        host[:, :FIELDS] = PAD
        self._hosts = [torch.from_numpy(host), torch.from_numpy(host.copy())]  # one is read while the other is written
        if kv.keys.device.type == "cuda":
            self._hosts = [each.pin_memory() for each in self._hosts]
        self._told = self._hosts[0].to(kv.keys.device)
        self._replays = {size: capture(_Step(model, kv, self._told[:size], look)) for size in reversed(self._sizes)}

    def logits(self, ids: Sequence[int], spans: Sequence[Span], chosen: Tensor | None = None) -> Tensor:
        """The token `ids[i]` at the position of `spans[i]` → logits (B, V) in fp32, overwritten by the next call.

        With `chosen` (R,), tokens on the device that the host does not know, the token is `chosen[ids[i]]`. Before the
        next call but one the device must have come to this one.
        """
        size = next(size for size in self._sizes if size >= len(spans))
        self._hosts.reverse()
        rows = self._hosts[0].numpy()[:size]
        rows[:, :FIELDS] = PAD
        rows[:, FIELDS:] = 0
        for row, token, span in zip(rows, ids, spans, strict=False):
            row[:FIELDS] = token, span.start, *self._kv.slots(span), span.end
            pages = span.table[: -(-span.end // self._kv.page_size)]
            row[FIELDS : FIELDS + len(pages)] = pages
        self._told[:size].copy_(self._hosts[0][:size], non_blocking=True)
        if chosen is not None:
            own = self._told[: len(spans), 0]
            own.copy_(chosen.index_select(0, own).clamp_min(0))  # -1: a row that nobody looks at any more
        return self._replays[size]()[: len(spans)]


def sizes(most: int) -> list[int]:
    """Of the batches that are captured; the last one takes `most` tokens."""
    steps = [*SIZES, *range(2 * SIZES[-1], most + SIZES[-1], SIZES[-1])]
    return [*(step for step in steps if step < most), next(step for step in steps if step >= most)]


class _Step:
    """A step over tokens (B, FIELDS + columns) int32 that lie where they lie."""

    def __init__(self, model: Llama, kv: KVPages, told: Tensor, look: Look) -> None:
        self._model, self._kv, self._told, self._look = model, kv, told, look

    def __call__(self) -> Tensor:
        ids, positions, slots = (self._told[:, i].long() for i in range(FIELDS - 1))
        lengths, tables = self._told[:, FIELDS - 1].contiguous(), self._told[:, FIELDS:].contiguous()

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._kv.write(layer, slots, k, v)
            return self._look(q, self._kv.keys[layer], self._kv.values[layer], tables, lengths)

        return self._model.logits(self._model(self._model.embed(ids), positions, attention)).float()


def capturing() -> Capture:
    """Makes CUDA graphs that share their memory: the logits of one are read before the next is replayed."""
    pool = torch.cuda.graph_pool_handle()

    def captured(step: Step) -> Step:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # run before: what is compiled or allocated once is not part of the graph
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The stream that is current stays so, even where the capture fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return captured


@torch.inference_mode()
def decode_graphs(model: Llama, kv: KVPages, most: int, context: int) -> DecodeGraphs | None:
    """On CUDA, where there is Triton and the model's steps can be captured; None elsewhere."""
    look = paged_look(kv)
    if look is None:
        return None
    try:
        columns = -(-context // kv.page_size)
        _warm(look, model, kv, columns)
        return DecodeGraphs(model, kv, most, columns, look, capturing())
    except Exception:  # a layer that waits for the device, no memory left, or a kernel that does not compile
        log.warning("decoding steps cannot be captured; each is launched kernel by kernel", exc_info=True)
        return None


def _warm(look: Look, model: Llama, kv: KVPages, columns: int) -> None:
    """Compile what steps that are not captured look with: a program for each power of two of a table's width."""
    q = kv.keys.new_zeros(1, model.config.num_heads, model.config.head_dim)
    lengths = torch.ones(1, dtype=torch.int32, device=q.device)
    for width in (1 << bit for bit in range(columns.bit_length())):
        look(q, kv.keys[0], kv.values[0], lengths.new_zeros(1, width), lengths)
