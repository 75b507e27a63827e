"""The LLaMA forward pass (Touvron et al. 2023), one for serving, scoring and differentiating.

It works on flat tokens: T may be one sequence, or prefill chunks and decode steps of many, side by side. What a token
may look at is the business of `Attend`, which the caller passes in; the model knows no cache, no batch and no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from llama.config import LlamaConfig
from llama.embedding import Embedding
from llama.linear import Linear
from llama.pointwise import norm, swiglu
from llama.rope import Rope, Rotation, rotate
from llama.sdpa import attention


class Attend(Protocol):
    """Attention of one layer over whatever the caller keeps."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, heads, D), k and v (T, KV heads, D), q and k rotated → (T, heads * D)."""


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019), in fp32 inside."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.eps)


class Block(nn.Module):
    """One decoder layer: attention and SwiGLU, each behind a norm and beside a residual."""

    def __init__(
        self,
        config: LlamaConfig,
        index: int,
        attention_norm: RMSNorm,
        qkv: Linear,
        o: Linear,
        mlp_norm: RMSNorm,
        gate_up: Linear,
        down: Linear,
    ) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.attention_norm, self.qkv, self.o = attention_norm, qkv, o
        self.mlp_norm, self.gate_up, self.down = mlp_norm, gate_up, down

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:  # (T, H) -> (T, H)
        heads = self.qkv(self.attention_norm(x)).view(x.shape[0], -1, self.head_dim)
        qk, v = torch.split(heads, [self.heads + self.kv_heads, self.kv_heads], 1)
        q, k = torch.split(rotate(qk, rotation), [self.heads, self.kv_heads], 1)
        x = x + self.o(attend(self.index, q, k, v))
        return x + self.down(swiglu(self.gate_up(self.mlp_norm(x))))


class Llama(nn.Module):
    """Embedding, decoder blocks, norm and head."""

    def __init__(
        self, config: LlamaConfig, embedding: Embedding, blocks: Sequence[Block], norm: RMSNorm, head: Linear
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head
        self.rope = Rope(config.rope, config.head_dim, embedding.device, embedding.dtype)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.embedding.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """ids (T,) → (T, H)."""
        return self.embedding(ids)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """x (T, H) embedded tokens or soft rows, positions (T,) → hidden states (T, H) after the last norm."""
        rotation = self.rope.tables(positions)
        for block in self.blocks:
            x = block(x, rotation, attend)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (T, H) → (T, V), for just the rows that are needed."""
        return self.head(hidden)


class CausalAttention:
    """Plain causal attention inside B sequences of T tokens each, laid flat: for scoring and learning.

    `prefix` is a kv prompt's (keys, values) of every layer, each (layers, KV heads, N, D), keys already rotated for
    positions 0..N-1. Holds no state; gradients flow.
    """

    def __init__(self, batch: int, prefix: tuple[Tensor, Tensor] | None = None) -> None:
        self._batch = batch
        self._prefix = prefix

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.view(self._batch, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
        mask = None
        if self._prefix is not None:
            k, v = (
                torch.cat((p[layer].expand(self._batch, -1, -1, -1).to(t.dtype), t), 2)
                for p, t in zip(self._prefix, (k, v), strict=True)
            )
            # SDPA's is_causal aligns top-left when lengths differ; a prefix needs the lower-right triangle.
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        return attention(q, k, v, mask).transpose(1, 2).flatten(2).flatten(0, 1)
