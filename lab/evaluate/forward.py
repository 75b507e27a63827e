"""The forward pass behind a soft prompt, for scoring and for learning: gradients flow into the prompt's tensors.

As in serving, both kinds of prompt end as one thing, the keys and values of N positions in every layer, computed once
for all sequences of a batch; a text starts at position N. Knows one model and plain tensors; knows no windows, no loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llama.model import CausalAttention, Llama
from llama.rope import rotate, turned, unrotate

Prefix = tuple[Tensor, Tensor]  # keys, rotated for positions 0..N-1, and values; each (layers, KV heads, N, D)


def prefix(model: Llama, tensors: Mapping[str, Tensor]) -> Prefix:
    """The prefix of a prompt given by its tensors, as `SoftPrompt.tensors` names and shapes them, of any dtype."""
    if "keys" in tensors:
        keys, values = (tensors[name].to(model.device, model.dtype) for name in ("keys", "values"))
        layers, heads, n, dim = keys.shape
        rotation = model.rope.tables(torch.arange(n, device=model.device))
        flat = keys.permute(2, 0, 1, 3).reshape(n, layers * heads, dim)
        rotated: Tensor = rotate(flat, rotation).view(n, layers, heads, dim)
        return rotated.permute(1, 2, 0, 3), values
    rows = tensors["prompt_embeddings"].to(model.device, model.dtype)
    kept = _Keeping()
    model(rows, torch.arange(len(rows), device=model.device), kept)
    return torch.stack(kept.keys), torch.stack(kept.values)


def hidden_states(model: Llama, ids: Tensor, before: Prefix | None = None) -> Tensor:
    """ids (B, T) → (B, T, H) after the last norm, behind the prefix. What a shorter sequence is padded with on its
    right changes nothing of it."""
    batch, length = ids.shape
    start = 0 if before is None else before[0].shape[2]
    positions = torch.arange(start, start + length, device=model.device).repeat(batch)
    hidden = model(model.embed(ids.flatten().to(model.device)), positions, CausalAttention(batch, before))
    out: Tensor = hidden.view(batch, length, -1)
    return out


@torch.no_grad()
def own_kv(model: Llama, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the kv prompt that equals this rows prompt: what its rows leave, keys turned back to before RoPE.

    fp32 on the CPU, as `SoftPrompt` wants them.
    """
    keys, values = prefix(model, tensors)  # (layers, KV heads, N, D)
    keys = turned(unrotate, keys, model.rope)
    return {"keys": keys.float().cpu().contiguous(), "values": values.float().cpu().contiguous()}


class _Keeping(CausalAttention):
    """Attention over one sequence that keeps every layer's keys and values, each (KV heads, N, D)."""

    def __init__(self) -> None:
        super().__init__(1)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k.transpose(0, 1))
        self.values.append(v.transpose(0, 1))
        return super().__call__(layer, q, k, v)
