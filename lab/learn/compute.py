"""The frozen model in the form in which it is multiplied while something is learned.

Learning runs through the weights that are served: as they are packed, or as a plain copy of the same values, which is
faster where there is memory for it. Knows the model's layers; knows no prompt.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lab.learn.recipe import LearnError
from llama.embedding import DenseEmbedding
from llama.linear import DenseLinear, FusedLinear, Linear
from llama.model import Attend, Block, Llama, RMSNorm
from llama.rope import Rotation

Compute = Literal["auto", "packed", "float32", "bfloat16"]


def choose_compute(name: str, device: torch.device) -> str:
    """`auto` is a copy in bf16 on CUDA, and in fp32 on the CPU, which multiplies it no slower. Raises LearnError."""
    if name not in get_args(Compute):
        raise LearnError(f"compute is {name!r}; choose one of {', '.join(get_args(Compute))}")
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return name


def for_learning(model: Llama, compute: str) -> Llama:
    """A model of the same values that multiplies in `compute`; `packed`: itself. Layers of `model` are let go of.

    Of the weights only their storage changes: a value that is served in bf16 is the same value in fp32.
    """
    if compute == "packed":
        return model
    dtype: torch.dtype = getattr(torch, compute)

    def plain(layer: Linear) -> DenseLinear:
        bias = _bias(layer)
        return DenseLinear(layer.dense().detach().to(dtype), None if bias is None else bias.detach().to(dtype))

    def norm(layer: RMSNorm) -> RMSNorm:
        return RMSNorm(layer.weight.to(dtype), layer.eps)

    blocks = []
    for block in blocks_of(model):
        parts = [norm(block.attention_norm), plain(block.qkv), plain(block.o)]
        parts += [norm(block.mlp_norm), plain(block.gate_up), plain(block.down)]
        blocks.append(Block(model.config, block.index, *parts))  # type: ignore[arg-type]
        block.qkv = block.o = block.gate_up = block.down = None  # type: ignore[assignment]
    embedding = model.embedding.dense().detach().to(dtype)
    head = model.head.dense().detach().to(dtype)
    shared = head.shape == embedding.shape and torch.equal(head, embedding)
    table, head_layer = DenseEmbedding(embedding), DenseLinear(embedding if shared else head)
    return Llama(model.config, table, blocks, norm(model.norm), head_layer).eval()


def _bias(layer: Linear) -> Tensor | None:
    """(N,), or None where no part of the layer has one."""
    if not isinstance(layer, FusedLinear):
        bias: Tensor | None = getattr(layer, "bias", None)
        return bias
    parts = [part for part in layer.parts if isinstance(part, Linear)]
    found = [(part, _bias(part)) for part in parts]
    if all(bias is None for _, bias in found):
        return None
    zeros = parts[0].dense().new_zeros
    return torch.cat([zeros(part.out_features) if bias is None else bias for part, bias in found])


def blocks_of(model: Llama) -> list[Block]:
    """The decoder blocks, typed."""
    return [block for block in model.blocks if isinstance(block, Block)]


def recomputing(model: Llama) -> Llama:
    """The same model, whose blocks keep only their input and are computed again on the way back."""
    twin = Llama(model.config, model.embedding, [], model.norm, model.head)
    twin.blocks = nn.ModuleList(_Recomputed(block) for block in blocks_of(model))
    return twin.eval()


class _Recomputed(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        out: Tensor = checkpoint(self.block, x, rotation, attend, use_reentrant=False, preserve_rng_state=False)
        return out
