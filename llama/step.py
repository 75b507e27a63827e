"""All blocks of a model in one call of our kernels, on the CPU in bf16: the same bits as block by block, sooner.

A step of one token takes a few milliseconds; going through Python for each product and each norm takes as long again.
Knows a model's layers and the pages of `Pages`; knows no sequence.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.model import Block, Llama
from llama.native import FLOAT, LANES, LONG, POINTER, Kernels, Product, kernels
from llama.rope import Rotation


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values (layers, pages, page size, KV heads, D), and as in `Kernels.write` and `.attention` where the
    tokens of a step go, slots (T,) int64, and what they see: tables, rows (T,), lengths (T,) int32."""

    keys: Tensor
    values: Tensor
    slots: Tensor
    tables: Tensor
    rows: Tensor
    lengths: Tensor


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", POINTER),
        ("mlp_norm", POINTER),
        *((name, Product) for name in ("qkv", "o", "gate_up", "down")),
    ]


class _Pages(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("keys", "values", "slots", "tables", "rows", "lengths")),
        *((name, LONG) for name in ("columns", "page", "layer_bytes")),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, LONG) for name in ("layers", "tokens", "hidden", "kv_heads", "shared", "dim", "inner", "attention")),
        ("eps", FLOAT),
        ("scale", FLOAT),
    ]


class Step:
    """The blocks of a model whose every product is one of ours: see `of`."""

    def __init__(self, model: Llama, ours: Kernels, layers: ctypes.Array[_Layer]) -> None:
        self._model, self._kernels, self._layers = model, ours, layers
        config = model.config
        self._widest = max((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, 2 * config.intermediate_size)

    @classmethod
    def of(cls, model: Llama) -> Step | None:
        """None where a layer is multiplied by other means, or a width is no multiple of what the kernels take."""
        ours = kernels()
        if ours is None or (model.device.type, model.dtype) != ("cpu", torch.bfloat16):
            return None
        layers = [_layer(block) for block in model.blocks if isinstance(block, Block)]
        found = [layer for layer in layers if layer is not None]
        if len(found) < len(model.blocks) or model.config.head_dim % (2 * LANES):
            return None
        return cls(model, ours, (_Layer * len(found))(*found))

    def __call__(self, x: Tensor, rotation: Rotation, pages: Pages) -> Tensor:
        """x (T, H), which is overwritten → what the last block makes of it."""
        config, tokens = self._model.config, len(x)
        shape = _Shape(
            config.num_layers,
            tokens,
            config.hidden_size,
            config.num_kv_heads,
            config.num_heads // config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            self._kernels.attention_kind(config.head_dim),
            config.rms_norm_eps,
            config.head_dim**-0.5,
        )
        of_layer = pages.keys[0].numel() * pages.keys.dtype.itemsize
        where = (pages.keys, pages.values, pages.slots, pages.tables, pages.rows, pages.lengths)
        told = _Pages(*(t.data_ptr() for t in where), pages.tables.shape[1], pages.keys.shape[2], of_layer)
        scratch = x.new_empty(tokens * (config.hidden_size + 2 * self._widest))
        self._kernels.step(self._layers, shape, told, rotation.cos, rotation.sin, x, scratch)
        return x


def _layer(block: Block) -> _Layer | None:
    products = [layer.native() for layer in (block.qkv, block.o, block.gate_up, block.down)]
    if None in products:
        return None
    norms = (block.attention_norm.weight.data_ptr(), block.mlp_norm.weight.data_ptr())
    return _Layer(*norms, *products)
