"""Soft prompts for measuring: as many rows as asked, taken at random from the embedding table of the model.

What the rows say does not matter to the clock; that they are real vectors of the model keeps its numbers finite.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from bench.forms import embedding_table


def write_prompts(checkpoint: Path, folder: Path, count: int = 8, rows: int = 64) -> tuple[str, ...]:
    """Write `{name}.safetensors` for `count` prompts of `rows` rows, the same each time, and return their names.

    The files name no base: a server binds them, at upload, to the model that it serves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = embedding_table(checkpoint).float()  # (V, H)
    noise = torch.Generator().manual_seed(0)
    names = tuple(f"bench{i}" for i in range(count))
    for name in names:
        ids = torch.randint(len(table), (rows,), generator=noise)
        save_file({"prompt_embeddings": table[ids].contiguous()}, folder / f"{name}.safetensors")
    return names


def upload(url: str, folder: Path, names: tuple[str, ...], level: str = "dense") -> None:
    """Put the prompts into the registry of a promptstitch server. Raises httpx.HTTPStatusError if it refuses one."""
    for name in names:
        httpx.post(
            f"{url}/v1/prompts/{name}/versions",
            params={"level": level},
            content=(folder / f"{name}.safetensors").read_bytes(),
            headers={"content-type": "application/octet-stream"},
            trust_env=False,
        ).raise_for_status()
