"""Small learning runs for tests: windows of random tokens, and a loop over a tiny model that can be taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lab.data.windows import Windows, windows
from lab.learn.forms import PromptForm
from lab.learn.loop import Learner, Lesson
from lab.learn.recipe import Kind, Recipe, read_recipe
from lab.run import Run
from llama.model import Llama

SMALL = {"positions": 4, "window": 12, "batch": 3, "distil": 0.0, "selections": 3, "select_windows": 4}


def small_recipe(kind: Kind = "rows", name: str = "default", **changes: Any) -> Recipe:
    """A built-in recipe, small and without a teacher."""
    return read_recipe(name, kind, {**SMALL, **changes})


def random_windows(count: int = 10, length: int = 12, seed: int = 0, vocabulary: int = 250) -> Windows:
    """Windows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (count, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (count, 1), generator=generator)
    real = torch.arange(length) < lengths
    scored = real.clone()
    scored[:, 0] = False
    return windows(ids * real, scored, torch.arange(count))


def start_rows(model: Llama, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows (N, H)."""
    generator = torch.Generator().manual_seed(seed)
    return {"prompt_embeddings": torch.randn(n, model.config.hidden_size, generator=generator) * 0.2}


def learner(model: Llama, recipe: Recipe, steps: int, run: Run, **options: Any) -> Learner:
    """Rows learned from ten random windows, selected on four others."""
    form = PromptForm(model, recipe.positions, recipe.recompute)
    lessons = Lesson(random_windows()), Lesson(random_windows(4, seed=1))
    return Learner(form, model.head, start_rows(model, recipe.positions), *lessons, recipe, steps, run, **options)


def state_of(folder: Path) -> bytes:
    """The state of a run, but for the seconds and the place in the log."""
    from safetensors.torch import load_file, save

    return save(load_file(folder / "state.safetensors"))
