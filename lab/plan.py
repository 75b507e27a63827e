"""A recovery before it is carried out: what is wanted, where it goes, and what both come to.

Made by `lab.recover.planned`. Knows what the steps need; carries nothing out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.data.splits import Splits
from lab.learn.budget import Budget
from lab.learn.order import Plan as LearnPlan
from lab.learn.recipe import Kind, Recipe
from lab.prove import Material
from lab.transfer.samples import Split
from prompts_store.prompt import Bos, SoftPrompt


@dataclass(frozen=True)
class Order:
    """What is wanted. `level` is None for a model that is compressed already, whose `dense` checkpoint is then named.

    `method` None: levels that can be made while loading are, others come from the solver, which calibrates on so many
    `calibration` tokens; `windows` are scored of each split at most, drawn by lot; `equal` is a prompt learned on the
    dense model at equal cost, `every` asks for all controls.
    """

    model: Path
    level: str | None
    task: str | None
    kind: Kind
    recipe: Recipe
    budget: Budget
    method: str | None = None
    dense: Path | None = None
    calibration: int = 32768
    windows: int | None = 96
    bos: Bos = "tokenizer"
    dtype: str = "auto"
    device: str = "auto"
    compute: str = "auto"
    seed: int = 0
    equal: SoftPrompt | None = None
    every: bool = False
    base: str | None = None  # of a foreign compressed model, as `llama.identity.identify` takes it
    embedding: str = "keep"  # of the checkpoint that the solver writes
    allocation: str = "uniform"  # likewise


@dataclass(frozen=True)
class Places:
    """Folders: of the runs of the steps, of the packed checkpoint if one is made, of dense models' states."""

    run: Path
    checkpoint: Path
    cache: Path


@dataclass(frozen=True)
class Plan:
    """An order that holds. `solve`: a checkpoint is written first; `learning` is of the model that this leaves.

    A checkpoint that runs of several tasks and seeds share is calibrated on what is `shared`, drawn by seed 0.
    """

    order: Order
    places: Places
    splits: Splits
    materials: Mapping[Split, Material]
    solve: bool
    base: str
    source: str  # weights of the model that was named
    shared: Splits | None = None
    learning: LearnPlan | None = None  # None until the checkpoint is there

    @property
    def served(self) -> tuple[Path, str | None]:
        """What is learned through and served: a folder, and the level that it is loaded at."""
        return (self.places.checkpoint, None) if self.solve else (self.order.model, self.order.level)

    @property
    def dense(self) -> Path | None:
        """The dense checkpoint, where the model that is served is not that itself."""
        order = self.order
        return order.dense or (order.model if order.level not in (None, "dense") else None)

    def record(self) -> dict[str, Any]:
        """All that the outcome depends on, for the run folder of the whole."""
        order = self.order
        return {
            "command": "recover",
            "base": self.base,
            "source": self.source,
            "level": order.level,
            "method": order.method,
            "task": order.task,
            "kind": order.kind,
            "recipe": order.recipe.told(),
            "budget": {"amount": order.budget.amount, "unit": order.budget.unit},
            "calibration": order.calibration if self.solve else None,
            **({"embedding": order.embedding} if self.solve and order.embedding != "keep" else {}),
            **({"allocation": order.allocation} if self.solve and order.allocation != "uniform" else {}),
            "windows": order.windows,
            "data": self.splits.data,
            "bos": order.bos,
            "dtype": order.dtype,
            "compute": order.compute,
        }
