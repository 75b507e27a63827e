"""Scores of one model, each condition computed once: those without the prompt at hand are the same for all prompts.

Knows a loaded model and a folder; a file there belongs to weights, numerics, device, windows, prompt and teacher.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lab.data.windows import Windows
from lab.disk import saving, write_file
from lab.evaluate.score import Progress, Scores, Teacher, score
from llama.load import LoadedModel
from prompts_store.prompt import SoftPrompt


@dataclass(frozen=True)
class Scorer:
    """A loaded model that scores; with `cache`, scores are taken from there and put there."""

    loaded: LoadedModel
    cache: Path | None = None

    def __call__(
        self, windows: Windows, prompt: SoftPrompt | None, progress: Progress, teacher: Teacher | None = None
    ) -> Scores:
        """As `score`. Raises NotFiniteLoss, RunError."""
        model = self.loaded.model
        place = self.cache and self.cache / f"{self._key(windows, prompt, teacher)}.scores"
        if place and (kept := _read(place, windows)):
            return kept
        found = score(model, windows, prompt, teacher=teacher, progress=progress)
        if place:
            with saving(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_file(place, lambda part: save_file(_tensors(found), part))
        return found

    def _key(self, windows: Windows, prompt: SoftPrompt | None, teacher: Teacher | None) -> str:
        model, who = self.loaded.model, self.loaded.identity
        parts = {
            "version": version("promptstitch"),
            "weights": who.weights,
            "dense": teacher and teacher.weights,
            "numerics": [self.loaded.compute, str(model.device)],
            "windows": windows.digest,
            "prompt": prompt and prompt.digest,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tensors(scores: Scores) -> dict[str, torch.Tensor]:
    found = {"nll": scores.nll, "hits": scores.hits, "kl": scores.kl, "agrees": scores.agrees}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _read(place: Path, windows: Windows) -> Scores | None:
    """None where there is nothing that can be read; it is then made anew."""
    try:
        return Scores(windows, **load_file(place)) if place.is_file() else None
    except (OSError, SafetensorError):
        return None
