"""Tiny LLaMA checkpoints on disk, and their logits in transformers and in ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.tiny import reference
from transformers import LlamaForCausalLM

from llama.manifest import Manifest
from llama.model import CausalAttention, Llama

DIGEST = "sha256:" + "0" * 64
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Widths that every kernel takes: multiples of 64 all of them.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


def model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, GQA, with the biases and norms of a trained model: not zeros and ones."""
    made = reference(seed, **{**SHAPE, **changes})
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.1
                parameter[...] = parameter.to(torch.bfloat16)  # so that casting them loses nothing
    return made


def save(folder: Path, model: LlamaForCausalLM, level: str = "dense", **options: Any) -> Path:
    """As transformers writes it, with a manifest."""
    model.save_pretrained(folder, **options)
    return seal(folder, level)


def seal(folder: Path, level: str = "dense") -> Path:
    Manifest(DIGEST, level, DIGEST, "tiny", "test").write(folder)
    return folder


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], level: str = "dense") -> Path:
    """A checkpoint of just these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return seal(folder, level)


Pack = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def packed(folder: Path, model: LlamaForCausalLM, quantisation: Mapping[str, Any], level: str, pack: Pack) -> Path:
    """`model` with every linear of its blocks packed by `pack`, and `model` itself left with what the tensors mean."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[-1] == "weight" and parts[-2] in LINEARS:
            stored, meant = pack(name.removesuffix(".weight"), tensor)
            tensors |= stored
            tensor.copy_(meant)
        else:
            tensors[name] = tensor
    config = model.config.to_dict() | {"quantization_config": dict(quantisation)}
    return write(folder, config, tensors, level)


def logits(model: LlamaForCausalLM | Llama, ids: torch.Tensor) -> torch.Tensor:
    """ids (T,) → (T, V), fp32."""
    with torch.inference_mode():
        if isinstance(model, Llama):
            hidden = model(model.embed(ids), torch.arange(len(ids)), CausalAttention(1))
            return model.logits(hidden).float()
        return model(ids[None]).logits[0].float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())
