"""The soft prompt file: safetensors with what is needed to use the prompt written beside the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prompts_store.prompt import Bos, SoftPrompt

ServedDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a served model and its operator allow. None: not checked.

    `dtype` is the dtype that the prompt will be served in: its values must be finite after that cast.
    """

    max_bytes: int = 1 << 30
    max_virtual_tokens: int | None = None
    base: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    dtype: ServedDtype | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a prompt comes from; no part of its identity. `train` is the recipe, JSON of at most 16 KiB."""

    task: str | None = None
    level: str | None = None
    weights: str | None = None
    train: Mapping[str, Any] | None = None
    created: str | None = None


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A prompt with its provenance. `bound`: the file named no base and took the one that it was offered."""

    prompt: SoftPrompt
    provenance: Provenance = Provenance()
    bound: bool = False


def read_prompt(
    source: Path | bytes, limits: Limits = Limits(), *, default_base: str | None = None, bos: Bos | None = None
) -> PromptFile:
    """Raises InvalidArtifact."""
    raise NotImplementedError


def encode_prompt(file: PromptFile) -> bytes:
    """The canonical bytes. Raises ValueError."""
    raise NotImplementedError


def write_prompt(path: Path, file: PromptFile) -> None:
    """Writes `encode_prompt(file)`. Raises ValueError, OSError."""
    raise NotImplementedError
