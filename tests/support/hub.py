"""Checkpoints of small transformers models, and logits of both sides over the same ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.tiny import reference
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llama.model import CausalAttention, Llama

DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save(model: LlamaForCausalLM, folder: Path, **options: Any) -> Path:
    """`save_pretrained`, and the tokenizer that a checkpoint is known by."""
    model.save_pretrained(folder, **options)
    words = {f"token {i}": i for i in range(model.config.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="token 0")).save(str(folder / "tokenizer.json"))
    return folder


def lively(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A small model in which nothing is left at ones or zeros, so that every tensor shows in the logits."""
    model = reference(seed, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in name:
                parameter.normal_(1, 0.2)
    return model


def token_ids(batch: int, length: int, vocabulary: int = 260, seed: int = 1) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def our_logits(model: Llama, ids: Tensor, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """ids (B, T) → logits (B, T, V) in fp32, behind a kv prefix as CausalAttention takes it."""
    return from_embedded(model, model.embed(ids.flatten()), *ids.shape, prefix=prefix)


def from_embedded(
    model: Llama, x: Tensor, batch: int, length: int, prefix: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """x (B * T, H) → logits (B, T, V) in fp32."""
    start = 0 if prefix is None else prefix[0].shape[2]
    positions = torch.arange(start, start + length).repeat(batch)
    hidden = model(x, positions, CausalAttention(batch, prefix))
    return model.logits(hidden).view(batch, length, -1).float()


def decoder_linears(model: LlamaForCausalLM) -> Iterator[tuple[str, nn.Linear]]:
    """The modules that are quantised, by name."""
    for name, module in model.named_modules():
        if name.rsplit(".")[-1] in DECODER:
            yield name, module


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
