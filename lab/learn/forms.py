"""What is learned, as functions of its tensors: a prompt of either kind, and the controls LoRA and norms.

A form says which tensors there are and how the hidden states of a text follow from them. Knows one model; knows no
loss and no schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.evaluate.forward import hidden_states, prefix
from lab.learn.compute import blocks_of, recomputing
from llama.linear import Linear
from llama.model import Block, Llama, RMSNorm

LORA_SCALE = 2.0  # alpha / rank, as most who tune q and v have it

Tensors = Mapping[str, Tensor]


class Form(Protocol):
    """A way to change what a frozen model makes of a text."""

    positions: int  # before the text; 0 for what changes the model itself: an `AdaptedForm`

    def hidden(self, tensors: Tensors, ids: Tensor, n: int) -> Tensor:
        """ids (B, T) → (B, T, H) after the last norm, with the first n positions in front; differentiable."""


class PromptForm:
    """A prompt of kind `rows` or `kv`. Its prefix is computed once for all texts of a batch, as it is in serving."""

    def __init__(self, model: Llama, positions: int, recompute: bool = False) -> None:
        self.positions = positions
        self._model = model
        self._texts = recomputing(model) if recompute else model

    def hidden(self, tensors: Tensors, ids: Tensor, n: int) -> Tensor:
        return hidden_states(self._texts, ids, prefix(self._model, first(tensors, n)))


def first(tensors: Tensors, n: int) -> dict[str, Tensor]:
    """The first n positions."""
    return {name: t.narrow(0 if name == "prompt_embeddings" else 2, 0, n) for name, t in tensors.items()}


class AdaptedForm:
    """What changes the model itself: a twin of it that reads the tensors at hand."""

    positions = 0

    def __init__(self, twin: Llama, now: dict[str, Tensor], recompute: bool) -> None:
        self._now = now
        self._model = recomputing(twin) if recompute else twin

    def hidden(self, tensors: Tensors, ids: Tensor, n: int) -> Tensor:
        return hidden_states(self.adapted(tensors), ids)

    def adapted(self, tensors: Tensors) -> Llama:
        """The model so changed, until the next call."""
        self._now.update(tensors)
        return self._model


class LoraForm(AdaptedForm):
    """Low-rank changes of q and v in every block (Hu et al. 2021): W + LORA_SCALE · up · down."""

    def __init__(self, model: Llama, recompute: bool = False) -> None:
        now: dict[str, Tensor] = {}
        changed = [
            Block(model.config, b.index, b.attention_norm, _Adapted(b, now), b.o, b.mlp_norm, b.gate_up, b.down)
            for b in blocks_of(model)
        ]
        super().__init__(Llama(model.config, model.embedding, changed, model.norm, model.head), now, recompute)

    @staticmethod
    def start(model: Llama, rank: int, seed: int) -> dict[str, Tensor]:
        """`q_down`, `v_down` (layers, r, H) random, `q_up`, `v_up` (layers, out, r) zero: the model unchanged."""
        c, generator = model.config, torch.Generator().manual_seed(seed)
        out = {"q": c.num_heads * c.head_dim, "v": c.num_kv_heads * c.head_dim}
        bound = 1 / math.sqrt(c.hidden_size)
        tensors = {}
        for name, width in out.items():
            down = torch.rand(c.num_layers, rank, c.hidden_size, generator=generator)
            tensors[f"{name}_down"] = (2 * down - 1) * bound
            tensors[f"{name}_up"] = torch.zeros(c.num_layers, width, rank)
        return tensors


class _Adapted(Linear):
    """q, k and v of one block with LoRA on q and v."""

    def __init__(self, block: Block, now: Tensors) -> None:
        super().__init__()
        self.inner, self.index = block.qkv, block.index
        self.in_features, self.out_features = block.qkv.in_features, block.qkv.out_features
        self._keys = block.kv_heads * block.head_dim
        self._now = now

    def forward(self, x: Tensor) -> Tensor:
        q, v = (self._change(name, x) for name in ("q", "v"))
        k = x.new_zeros(len(x), self._keys)
        return self.inner(x) + torch.cat((q, k, v), -1)

    def _change(self, name: str, x: Tensor) -> Tensor:
        down, up = (self._now[f"{name}_{part}"][self.index].to(x) for part in ("down", "up"))
        return LORA_SCALE * F.linear(F.linear(x, down), up)


class NormForm(AdaptedForm):
    """The weights of all norms."""

    def __init__(self, model: Llama, recompute: bool = False) -> None:
        now: dict[str, Tensor] = {}
        blocks = blocks_of(model)
        changed = []
        for at, b in enumerate(blocks):
            attention, mlp = _Learned(b.attention_norm, now, 2 * at), _Learned(b.mlp_norm, now, 2 * at + 1)
            changed.append(Block(model.config, b.index, attention, b.qkv, b.o, mlp, b.gate_up, b.down))
        norm = _Learned(model.norm, now, 2 * len(blocks))
        super().__init__(Llama(model.config, model.embedding, changed, norm, model.head), now, recompute)

    @staticmethod
    def start(model: Llama) -> dict[str, Tensor]:
        """`norms` (2 layers + 1, H), as the model has them."""
        blocks = blocks_of(model)
        each = [norm.weight for block in blocks for norm in (block.attention_norm, block.mlp_norm)]
        return {"norms": torch.stack([*each, model.norm.weight]).detach().float().cpu()}


class _Learned(RMSNorm):
    def __init__(self, norm: RMSNorm, now: Tensors, at: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps
        self._now, self._at = now, at

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self._now["norms"][self._at].to(x), self.eps)


ADAPTED: Mapping[str, type[LoraForm] | type[NormForm]] = MappingProxyType({"lora": LoraForm, "norms": NormForm})
