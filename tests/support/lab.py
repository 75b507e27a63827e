"""A tiny checkpoint with a tokenizer, and the options that make learning on it small."""

from __future__ import annotations

from pathlib import Path

from support.checkpoints import model
from support.hub import write_checkpoint

from llama.fingerprint import weights_digest
from llama.manifest import Manifest

BASE = "sha256:" + "1" * 64
RECIPE = {"positions": 4, "window": 32, "select_windows": 8, "distil": 0.0, "init": "random"}
SMALL: list[object] = [part for name, value in RECIPE.items() for part in ("--set", f"{name}={value}")]
SMALL += ["--device", "cpu", "--dtype", "float32", "--windows", 24]


def write_model(folder: Path, seed: int = 0, base: str = BASE) -> Path:
    """Dense, all widths multiples of 64, a context of 2,048, with its manifest."""
    made = model(seed, vocab_size=300, tie_word_embeddings=True)
    state = {name: tensor for name, tensor in made.state_dict().items() if name != "lm_head.weight"}
    write_checkpoint(folder, config={**made.config.to_dict(), "vocab_size": 300}, state=state)
    Manifest(base, "dense", weights_digest(folder), "tiny", "test").write(folder)
    return folder
