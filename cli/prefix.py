"""The keys of a PEFT prefix, turned for one model: into what its cache holds, and back to what a kv prompt holds.

Knows RoPE; knows no files of prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.load import info
from llama.rope import Rope, Rotation, rotate, unrotate
from prompts_store.prefix_tuning import Turn


def turns(folder: Path) -> tuple[Turn, Turn]:
    """For the model in `folder`: before RoPE → after it, and after → before. Raises ModelError."""
    config = info(folder).config
    return _turn(config, rotate), _turn(config, unrotate)


def _turn(config: LlamaConfig, function: Callable[[Tensor, Rotation], Tensor]) -> Turn:
    rope = Rope(config.rope, config.head_dim, torch.device("cpu"), torch.float32)

    def turn(keys: Tensor) -> Tensor:  # (layers, KV heads, N, D), positions 0..N-1
        by_position = keys.permute(2, 0, 1, 3)  # (N, layers, KV heads, D)
        tables = rope.tables(torch.arange(keys.shape[2]))
        turned = function(by_position.flatten(1, 2), tables).view(by_position.shape)
        return turned.permute(1, 2, 0, 3).contiguous()

    return turn
