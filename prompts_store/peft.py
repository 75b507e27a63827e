"""PEFT adapters in and out: PROMPT_TUNING and P_TUNING as rows. The config is read as data, PEFT is never called."""

from __future__ import annotations

from pathlib import Path

from prompts_store.file import Limits, PromptFile
from prompts_store.prompt import Bos

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def read_peft(
    config: bytes,
    weights: Path | bytes,
    limits: Limits = Limits(),
    *,
    default_base: str | None = None,
    bos: Bos | None = None,
) -> PromptFile:
    """Raises InvalidArtifact."""
    raise NotImplementedError


def read_peft_directory(
    directory: Path, limits: Limits = Limits(), *, default_base: str | None = None, bos: Bos | None = None
) -> PromptFile:
    """Raises InvalidArtifact."""
    raise NotImplementedError


def write_peft(directory: Path, file: PromptFile, *, base_model: str) -> None:
    """Raises ValueError for a kind that PEFT has no place for, OSError."""
    raise NotImplementedError
