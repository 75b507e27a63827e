"""Attention of single tokens over pages in Triton, for CUDA (PagedAttention, Kwon et al. 2023).

The positions that a token sees are cut into stretches at fixed places, each of which is a program of its own, and
joined afterwards (Flash-Decoding, Dao et al. 2023): what comes out for a token does not depend on its batch. Triton
comes with torch's CUDA builds; TRITON_INTERPRET=1 runs the same programs on the CPU. Knows no sequences.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention import STRETCH

TILE = 64  # positions at once
LEAST = 16  # rows and widths of a product on tensor cores


@triton.jit(do_not_specialize=["columns"])  # else a batch of another width would wait for a compiler
def _stretch(
    q, keys, values, tables, lengths, sums, tops, totals, q_stride, columns, scale,
    SHARED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """Of one stretch, for a token's query heads that share a KV head: weighted values, largest score, weights."""
    token, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, begin = tl.load(lengths + token), part * STRETCH
    if begin >= length:
        return
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIM)
    there = row < SHARED
    query = tl.load(q + token * q_stride + (head * SHARED + row)[:, None] * DIM + dim, mask=there[:, None], other=0.0)
    most = tl.full((ROWS,), -math.inf, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(begin, tl.minimum(begin + STRETCH, length), TILE):
        at = start + tl.arange(0, TILE)
        seen = at < length
        page = tl.load(tables + token * columns + at // PAGE, mask=seen, other=0).to(tl.int64)
        place = (((page * PAGE + at % PAGE) * HEADS + head) * DIM)[:, None] + dim
        key = tl.load(keys + place, mask=seen[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -math.inf)
        now = tl.maximum(most, tl.max(score, 1))
        weight, factor = tl.exp2(score - now[:, None]), tl.exp2(most - now)
        value = tl.load(values + place, mask=seen[:, None], other=0.0)
        found = found * factor[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * factor + tl.sum(weight, 1)
        most = now
    out = ((token * HEADS + head) * SHARED + row) * tl.num_programs(2) + part
    tl.store(sums + out[:, None] * DIM + dim, found, mask=there[:, None])
    tl.store(tops + out, most, mask=there)
    tl.store(totals + out, total, mask=there)


@triton.jit(do_not_specialize=["parts"])
def _join(sums, tops, totals, lengths, out, parts, DIM: tl.constexpr, PARTS: tl.constexpr, STRETCH: tl.constexpr):
    """The stretches of one head of one token, weighed by their largest scores."""
    token, head = tl.program_id(0), tl.program_id(1)
    row = token * tl.num_programs(1) + head
    part, dim = tl.arange(0, PARTS), tl.arange(0, DIM)
    there = part * STRETCH < tl.load(lengths + token)
    top = tl.load(tops + row * parts + part, mask=there, other=-math.inf)
    factor = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(factor * tl.load(totals + row * parts + part, mask=there, other=0.0), 0)
    place = (row * parts + part)[:, None] * DIM + dim
    found = tl.sum(factor[:, None] * tl.load(sums + place, mask=there[:, None], other=0.0), 0)
    tl.store(out + row * DIM + dim, (found / total).to(out.dtype.element_ty))


def takes(head_dim: int) -> bool:
    """Whether heads are of a width that the programs take."""
    return head_dim >= LEAST and head_dim & (head_dim - 1) == 0


def look(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """q (T, heads, D), keys and values (pages, page size, KV heads, D), of one dtype → (T, heads * D).

    Token t sees the first lengths[t] >= 1 positions of its block table tables[t]; tables (T, columns) and lengths (T,)
    are int32.
    """
    (tokens, heads, dim), (_, page, kv_heads, _), columns = q.shape, keys.shape, tables.shape[1]
    q = q if q.stride()[1:] == (dim, 1) else q.contiguous()
    parts, shared = -(-columns * page // STRETCH), heads // kv_heads
    sums = q.new_empty(tokens, heads, parts, dim, dtype=torch.float32)
    tops, totals = sums.new_empty(tokens, heads, parts), sums.new_empty(tokens, heads, parts)  # both aligned
    out = q.new_empty(tokens, heads * dim)
    scale = math.log2(math.e) * dim**-0.5
    rows = max(LEAST, triton.next_power_of_2(shared))
    at = (q, keys, values, tables, lengths, sums, tops, totals, q.stride(0), columns, scale)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # Triton launches on the current one
        _stretch[tokens, kv_heads, parts](*at, shared, kv_heads, dim, page, rows, TILE, STRETCH)
        _join[tokens, heads](sums, tops, totals, lengths, out, parts, dim, triton.next_power_of_2(parts), STRETCH)
    return out
