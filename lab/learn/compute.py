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
from llama import native
from llama.embedding import DenseEmbedding
from llama.integers import IntegerLinear, fits
from llama.linear import DenseLinear, FusedLinear, Linear
from llama.model import Attend, Block, Llama, RMSNorm
from llama.rope import Rotation

Compute = Literal["auto", "packed", "float32", "bfloat16", "int8"]


def choose_compute(name: str, device: torch.device) -> str:
    """`auto` is what multiplies fastest: a copy in bf16 on CUDA, in int8 where a CPU has kernels for it, else in fp32.

    Raises LearnError.
    """
    if name not in get_args(Compute):
        raise LearnError(f"compute is {name!r}; choose one of {', '.join(get_args(Compute))}")
    if name == "auto" and device.type == "cuda":
        return "bfloat16"
    if name in ("auto", "int8"):
        if device.type == "cpu" and (kernels := native.kernels()) and kernels.multiplies_integers:
            return "int8"
        if name == "int8":
            raise LearnError("compute is 'int8', which needs AVX-512 VNNI or AVX2, and the kernels; choose float32")
        return "float32"
    return name


def for_learning(model: Llama, compute: str) -> Llama:
    """A model of the same values that multiplies in `compute`; `packed`: itself. Layers of `model` are let go of.

    In fp32 only their storage changes: a value that is served in bf16 is the same value. In int8 linear layers are
    `IntegerLinear` where their shape allows it, and all else is fp32.
    """
    if compute == "packed":
        return model
    kernels = native.kernels() if compute == "int8" else None
    dtype: torch.dtype = torch.float32 if compute == "int8" else getattr(torch, compute)

    def plain(layer: Linear) -> Linear:
        weight, bias = layer.dense().detach(), _bias(layer)
        bias = None if bias is None else bias.detach().to(dtype)
        if kernels is not None and fits(weight):
            return IntegerLinear(kernels, weight, bias)
        return DenseLinear(weight.to(dtype), bias)

    def norm(layer: RMSNorm) -> RMSNorm:
        return RMSNorm(layer.weight.to(dtype), layer.eps)

    blocks = []
    for block in blocks_of(model):
        parts = [norm(block.attention_norm), plain(block.qkv), plain(block.o)]
        parts += [norm(block.mlp_norm), plain(block.gate_up), plain(block.down)]
        blocks.append(Block(model.config, block.index, *parts))  # type: ignore[arg-type]
        block.qkv = block.o = block.gate_up = block.down = None  # type: ignore[assignment]
    embedding, head = model.embedding.dense().detach().to(dtype), plain(model.head)
    if isinstance(head, DenseLinear) and head.weight is not None and torch.equal(head.weight, embedding):
        head = DenseLinear(embedding)
    return Llama(model.config, DenseEmbedding(embedding), blocks, norm(model.norm), head)


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
    return twin


class _Recomputed(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        out: Tensor = checkpoint(self.block, x, rotation, attend, use_reentrant=False, preserve_rng_state=False)
        return out
