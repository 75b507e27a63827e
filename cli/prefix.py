"""The keys of a PEFT prefix, turned for one model: into what its cache holds, and back to what a kv prompt holds.

Knows RoPE; knows no files of prompts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from llama.load import info
from llama.rope import Rope, rotate, turned, unrotate
from prompts_store.prefix_tuning import Turn


def turns(folder: Path) -> tuple[Turn, Turn]:
    """For the model in `folder`: before RoPE → after it, and after → before. Raises ModelError."""
    config = info(folder).config
    rope = Rope(config.rope, config.head_dim, torch.device("cpu"), torch.float32)
    return partial(turned, rotate, rope=rope), partial(turned, unrotate, rope=rope)
