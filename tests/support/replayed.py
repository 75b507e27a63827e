"""Decoding steps that are replayed, on the CPU: a graph is the step itself."""

from __future__ import annotations

from engine.attention import KVPages, look
from engine.graphs import DecodeGraphs, Step
from llama.model import Llama


def recorded(step: Step) -> Step:
    """As a graph: what comes out lies where it lay the last time."""
    out = step()
    return lambda: out.copy_(step())


def replaying(model: Llama, kv: KVPages, most: int, context: int) -> DecodeGraphs:
    """In place of `decode_graphs`, which makes none without CUDA."""
    return DecodeGraphs(model, kv, most, -(-context // kv.page_size), look, recorded)
