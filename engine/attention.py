"""Attention over pages.

`KVPages` holds the keys and values of every layer. `attend` gives one step's `Attend`, which writes the step's keys and
values into their pages and lets every token look at its own sequence: by our kernels, or in plain torch, which they are
tested against. Tensors in, tensors out: knows no requests.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.device import sent
from engine.pages import BLANK_PAGE
from llama.config import LlamaConfig
from llama.jit import compiles
from llama.model import Attend
from llama.native import LANES, Kernels, kernels
from llama.sdpa import attention
from llama.step import Pages

STRETCH = 256  # positions that one program of `engine.paged` looks at

# (q, keys, values, tables, lengths) -> out, of single tokens: see `look`.
Look = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence in the flat batch: `length` of them, the first at position `start`."""

    table: Sequence[int]
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class KVPages:
    """keys and values, each (layers, pages, page size, KV heads, D).

    Memory is reserved, not touched: a page becomes resident when it is blanked, which must come before its first use.
    """

    def __init__(
        self, config: LlamaConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
        self.page_size = page_size
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.blank([BLANK_PAGE])

    @staticmethod
    def bytes_per_page(config: LlamaConfig, page_size: int, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize  # 2: k and v

    def blank(self, pages: Sequence[int]) -> None:
        """Zero pages: masked positions still enter a product, and what an earlier owner left might not be finite."""
        index = sent(torch.tensor(pages), self.keys.device)
        self.keys.index_fill_(1, index, 0)
        self.values.index_fill_(1, index, 0)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to) each."""
        source, target = torch.tensor(pairs, device=self.keys.device).unbind(1)
        for store in (self.keys, self.values):
            store.index_copy_(1, target, store.index_select(1, source))

    @property
    def page_bytes(self) -> int:
        return 2 * self.keys[:, BLANK_PAGE].nbytes

    def dump(self, pages: Sequence[int]) -> memoryview:
        """What whole pages hold, as bytes of their own."""
        index = torch.tensor(pages, device=self.keys.device)
        held = torch.stack([store.index_select(1, index) for store in (self.keys, self.values)])
        return held.cpu().view(torch.uint8).flatten().numpy().data

    def load(self, pages: Sequence[int], dumped: memoryview) -> None:
        """Make whole pages hold what others held when they were dumped."""
        index = torch.tensor(pages, device=self.keys.device)
        held = torch.frombuffer(dumped, dtype=self.keys.dtype).view(2, len(self.keys), len(pages), *self.keys.shape[2:])
        for store, part in zip((self.keys, self.values), held.to(self.keys.device), strict=True):
            store.index_copy_(1, index, part)

    def slots(self, span: Span) -> Sequence[int]:
        """Where the tokens of a span lie: page * page size + offset."""
        size = self.page_size
        return [span.table[at // size] * size + at % size for at in range(span.start, span.end)]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v (T, KV heads, D) into slots (T,) = page * page size + offset."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, v)

    def read(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """tables (B, pages) → keys, values (B, KV heads, pages * page size, D)."""
        return _gathered(self.keys[layer], self.values[layer], tables)


def attend(kv: KVPages, spans: Sequence[Span]) -> Attend:
    """The `Attend` of one step over `spans`, those of one token first; the fastest that the device has."""
    keys = kv.keys
    fits = keys.dtype in (torch.bfloat16, torch.float32) and kv.page_size % LANES == 0 and keys.shape[-1] % LANES == 0
    if keys.device.type == "cpu" and fits and (ours := kernels()):
        return NativeAttention(kv, spans, ours)
    return PagedAttention(kv, spans)


class NativeAttention:
    """Every token by our kernel, which reads pages where they lie."""

    def __init__(self, kv: KVPages, spans: Sequence[Span], ours: Kernels) -> None:
        self._kv, self._kernels = kv, ours
        width = max(len(span.table) for span in spans)
        tables = [[*span.table, *[BLANK_PAGE] * (width - len(span.table))] for span in spans]
        tokens = [(row, at) for row, span in enumerate(spans) for at in range(span.start, span.end)]
        # By numpy, which reads lists three times as fast as torch does: the tables are read anew in each step.
        self._tables = torch.from_numpy(np.array(tables, np.int32))
        self._rows = torch.from_numpy(np.array([row for row, _ in tokens], np.int32))
        self._lengths = torch.from_numpy(np.array([at + 1 for _, at in tokens], np.int32))
        self._slots = torch.from_numpy(np.array([slot for span in spans for slot in kv.slots(span)], np.int64))

    @property
    def pages(self) -> Pages:
        return Pages(self._kv.keys, self._kv.values, self._slots, self._tables, self._rows, self._lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        self._kernels.write(k, v, self._slots, keys, values)
        return self._kernels.attention(q, keys, values, self._tables, self._rows, self._lengths)


def look(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, mask: Tensor | None = None
) -> Tensor:
    """q (T, heads, D), keys and values (pages, page size, KV heads, D) → (T, heads * D).

    Token t sees the first lengths[t] positions of its block table tables[t]; tables (T, columns), lengths (T,), int32.
    The heads that share a KV head are its queries, so that no key is repeated. `mask` is what `unseen` made of the
    lengths, if somebody has it already.
    """
    k, v = _gathered(keys, values, tables)
    mask = unseen(lengths, k.shape[2], q.dtype) if mask is None else mask
    out = attention(q.view(q.shape[0], k.shape[1], -1, q.shape[2]), k, v, mask)
    return out.flatten(1)


def unseen(lengths: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """lengths (T,) → (T, 1, 1, positions), to be added to scores: -inf where a token does not see."""
    hidden = torch.arange(positions, device=lengths.device) >= lengths[:, None]
    return _additive(hidden, dtype)[:, None, None]


def paged_look(kv: KVPages) -> Look | None:
    """`look` as a kernel of ours on CUDA; None where it does not run, or heads are of another width than it takes."""
    if kv.keys.device.type != "cuda" or not compiles():
        return None
    paged = importlib.import_module("engine.paged")  # not before: whoever has no CUDA may have no Triton
    ours: Look = paged.look
    return ours if paged.takes(kv.keys.shape[-1]) else None


class PagedAttention:
    """On any device, prefill in plain torch. Spans of one token are computed as one padded batch."""

    def __init__(self, kv: KVPages, spans: Sequence[Span]) -> None:
        self._kv = kv
        self._device, self._dtype = kv.keys.device, kv.keys.dtype
        self._slots = self._tensor([slot for span in spans for slot in kv.slots(span)])
        self._singles = sum(1 for span in spans if span.length == 1)
        assert all(span.length == 1 for span in spans[: self._singles])
        self._chunks = [self._chunk(span) for span in spans[self._singles :]]
        if self._singles:
            self._tables, self._lengths = self._pad(spans[: self._singles])
            self._look = paged_look(kv) or partial(look, mask=self._unseen())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._kv.write(layer, self._slots, k, v)
        outs = [self._decode(layer, q[: self._singles])] if self._singles else []
        at = self._singles
        for table, mask, length in self._chunks:
            outs.append(
                self._prefill(layer, q[at : at + length], k[at : at + length], v[at : at + length], table, mask)
            )
            at += length
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _decode(self, layer: int, q: Tensor) -> Tensor:
        return self._look(q, self._kv.keys[layer], self._kv.values[layer], self._tables, self._lengths)

    def _prefill(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        if table is None:
            keys, values = k[None].transpose(1, 2), v[None].transpose(1, 2)
        else:
            keys, values = self._kv.read(layer, table)
        return attention(q[None].transpose(1, 2), keys, values, mask)[0].transpose(0, 1).flatten(1)

    def _chunk(self, span: Span) -> tuple[Tensor | None, Tensor | None, int]:
        """A chunk with nothing before it needs no pages and no mask."""
        if span.start == 0:
            return None, None, span.length
        pages = -(-span.end // self._kv.page_size)
        last = torch.arange(span.start, span.end, device=self._device)[:, None]
        hidden = torch.arange(pages * self._kv.page_size, device=self._device) > last
        return self._tensor([span.table[:pages]]), _additive(hidden, self._dtype)[None, None], span.length

    def _pad(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Block tables of equal length, and how much each row sees."""
        width = max(-(-span.end // self._kv.page_size) for span in spans)
        tables = [[*span.table[:width], *[BLANK_PAGE] * (width - len(span.table))] for span in spans]
        return self._tensor(tables, torch.int32), self._tensor([span.end for span in spans], torch.int32)

    def _unseen(self) -> Tensor:
        return unseen(self._lengths, self._tables.shape[1] * self._kv.page_size, self._dtype)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _gathered(keys: Tensor, values: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    flat, shape = tables.flatten(), (tables.shape[0], -1, *keys.shape[2:])
    k, v = keys.index_select(0, flat), values.index_select(0, flat)
    return k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)
