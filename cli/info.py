"""`promptstitch info`: what a checkpoint is, and what it would be at a level, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import AsJson, tell

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a name that was pulled.")]
Level = Annotated[str | None, typer.Option("--level", help="Level to quantise to while loading.")]
Base = Annotated[
    str | None, typer.Option("--base", help="Dense folder or digest, for a checkpoint without a manifest.")
]


def info(model: Model, level: Level = None, base: Base = None, as_json: AsJson = False) -> None:
    """Show a model's fingerprint, level and shape."""
    from cli.model import find_model

    tell(describe(find_model(model), level, base), as_json)


def describe(folder: Path, level: str | None = None, base: str | None = None) -> dict[str, Any]:
    """The fields that are shown. Lengths in tokens, sizes in bytes. Raises ModelError."""
    from llama.load import expected_bytes
    from llama.load import info as look

    told = look(folder, level=level, base=base)
    identity, config = told.identity, told.config
    return {
        "name": identity.name,
        "folder": str(folder),
        "base": identity.base,
        "level": identity.level,
        "weights": identity.weights,
        "parameters": told.parameters,
        "disk_bytes": told.disk_bytes,
        "resident_bytes": expected_bytes(folder, identity, compute="auto"),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_len,
        "notes": list(identity.notes),
    }
