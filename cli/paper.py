"""A prompt that the paper's own code saved: a pickle, of which nothing is run.

Its `best.pth` holds a state dict with `soft_prompt.weight`, its `save_soft_prompt` a whole `torch.nn.Embedding`; that
class and tensors are all that is let in. Knows no registry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cli.local import limits_of
from cli.output import CommandError
from prompts_store.file import PromptFile, Provenance, encode_prompt, read_prompt
from prompts_store.prompt import Bos, SoftPrompt

WEIGHT = "soft_prompt.weight"


def paper_prompt(path: Path, model: str, task: str | None, level: str, bos: Bos) -> PromptFile:
    """The rows (N, H) as a prompt of the model's base. Raises CommandError, ModelError, InvalidArtifact."""
    limits = limits_of(model)
    assert limits.base is not None
    prompt = SoftPrompt("rows", limits.base, {"prompt_embeddings": _rows(path).detach().float().contiguous()}, bos)
    origin = Provenance(task, level, None, {"method": "import-paper", "file": path.name})
    return read_prompt(encode_prompt(PromptFile(prompt, origin)), limits)


def _rows(path: Path) -> Tensor:
    try:
        with torch.serialization.safe_globals([nn.Embedding]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file can do to a reader of archives and pickles
        message = (
            f"{path} is no file of torch.save, or holds more than tensors and nn.Embedding: nothing else is let in"
        )
        raise CommandError(message) from error
    state: Any = vars(held).get("_parameters") if isinstance(held, nn.Embedding) else held
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    found = []
    if isinstance(state, dict):
        found = [value for name, value in state.items() if name == "weight" or f".{name}".endswith(f".{WEIGHT}")]
    if len(found) != 1 or not _is_matrix(found[0]):
        raise CommandError(f"{path} holds no {WEIGHT} of N rows; import-paper takes what the paper's code saved")
    rows: Tensor = found[0]
    return rows


def _is_matrix(value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and value.ndim == 2 and value.is_floating_point()
