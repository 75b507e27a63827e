"""Where a job stands, in one file that is replaced as a whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lab.compress.folder import publish
from lab.compress.solve import DAMPING


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one step of a block. `error` is ‖(W − Ŵ) X‖² / ‖W X‖²; None where no inputs were looked at."""

    block: int
    step: str
    error: float | None
    damping: float

    @property
    def retried(self) -> bool:
        """Whether the second moments needed more damping than usual."""
        return self.damping > DAMPING


@dataclass(frozen=True, slots=True)
class State:
    """Blocks done, what became of them, and the hidden states (W, T, H) behind the last, if tokens go along."""

    done: int
    layers: tuple[LayerReport, ...]
    hidden: Tensor | None

    def save(self, file: Path) -> None:
        """Replace `file`, which is whole at any moment. Raises OSError."""
        story = {"done": str(self.done), "layers": json.dumps([asdict(layer) for layer in self.layers])}
        scratch = file.with_suffix(".part")
        save_file({"hidden": torch.empty(0) if self.hidden is None else self.hidden}, scratch, metadata=story)
        publish(scratch, file)

    @classmethod
    def load(cls, file: Path) -> State | None:
        """The state in `file`, None if there is none."""
        if not file.exists():
            return None
        with safe_open(file, framework="pt") as stored:
            story, hidden = stored.metadata(), stored.get_tensor("hidden").clone()
        layers = tuple(LayerReport(**layer) for layer in json.loads(story["layers"]))
        return cls(int(story["done"]), layers, hidden if hidden.numel() else None)
