"""How a prompt is learned, as plain configuration: `paper`, `default`, or a TOML or JSON file like theirs.

Any value may be a table by kind (`lr = {rows = 1e-2, kv = 2e-2}`). Knows no model and no windows.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from lab.data.documents import Document, form
from lab.errors import RunError

Kind = Literal["rows", "kv", "lora", "norms"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BUILT_IN = ("default", "paper")
DECAYS = ("linear", "cosine", "none")


class LearnError(RunError):
    """Nothing can be learned like this. The message names the field and says what to do."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that is free in learning one kind. Raises LearnError where a value is out of bounds.

    `positions` N of the prompt, of LoRA the rank; `init` see `lab.learn.start`; `window` text tokens; `batch` windows a
    step, of which `micro` are computed at once (0: all); `warmup` and `nested` shares of the steps; `clip` the largest
    norm of a gradient (0: any); `distil` the share of KL(dense ‖ model) in the loss, `distil_tasks` the same where data
    is prompts and completions (None: as `distil`): what the dense model does not know either it cannot teach; `ema` the
    decay of the average that is selected and kept (0: the last step itself); `tokens` the length of a run that is given
    no budget; `recompute` trades a third more time for the memory of activations.
    """

    positions: int
    init: str
    window: int
    batch: int
    lr: float
    warmup: float
    decay: str
    clip: float
    distil: float
    nested: float
    ema: float
    tokens: int
    selections: int
    select_windows: int
    distil_tasks: float | None = None
    micro: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    recompute: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = field.type.removesuffix(" | None")
            if value is None and kind != field.type:
                continue
            if kind == "float" and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value).__name__ != kind:
                raise LearnError(f"recipe: {field.name} must be {field.type}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise LearnError(f"recipe: {field.name} must be finite, got {value}")
        for name, low, high in _BOUNDS:
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise LearnError(f"recipe: {name} must be from {low:g} to {high:g}, got {value}")
        if self.decay not in DECAYS:
            raise LearnError(f"recipe: decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")

    def factor(self, step: int, steps: int) -> float:
        """On the learning rate of step 0..steps-1: a linear warm-up, then the decay, which would end after the last."""
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        gone = (step - warm) / max(1, steps - warm)
        return {"linear": 1 - gone, "cosine": 0.5 * (1 + math.cos(math.pi * gone)), "none": 1.0}[self.decay]

    def over(self, documents: Sequence[Document]) -> Recipe:
        """For this data: `distil` is the one that holds for it, and `distil_tasks` has been heard."""
        share = self.distil_tasks
        if share is None or form(documents) != "completion":
            share = self.distil
        return replace(self, distil=share, distil_tasks=None)

    def told(self) -> dict[str, Any]:
        """As JSON; what says nothing is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("positions", 0, 8192),
    ("window", 2, 1 << 20),
    ("batch", 1, 65536),
    ("micro", 0, 65536),
    ("lr", 0, 1e3),
    ("warmup", 0, 1),
    ("clip", 0, 1e9),
    ("distil", 0, 1),
    ("distil_tasks", 0, 1),
    ("nested", 0, 1),
    ("ema", 0, 0.99999),
    ("tokens", 1, 1e15),
    ("selections", 1, 10000),
    ("select_windows", 1, 1e9),
    ("beta1", 0, 0.99999),
    ("beta2", 0, 0.9999999),
    ("weight_decay", 0, 10),
)


def read_recipe(name: str, kind: Kind, changes: Mapping[str, Any]) -> Recipe:
    """The built-in recipe of this name, or the one in this file, for one kind, with some values changed. A `distil`
    among the changes holds for all data.

    Raises LearnError naming the field.
    """
    if name in BUILT_IN:
        text = files("lab.learn").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")
        values = tomllib.loads(text)
    else:
        values = _from_file(Path(name).expanduser())
    values = {field: _of_kind(name, field, value, kind) for field, value in values.items()}
    values |= ({"distil_tasks": None} if "distil" in changes else {}) | dict(changes)
    known = {field.name: field.default is MISSING for field in fields(Recipe)}
    if odd := sorted(values.keys() - known.keys()):
        raise LearnError(f"recipe {name}: {odd[0]} is not known; known are {', '.join(known)}")
    if missing := [field for field, needed in known.items() if needed and field not in values]:
        raise LearnError(f"recipe {name}: {missing[0]} is missing; `default` has all fields, take a copy of it")
    return Recipe(**values)


def parse_change(text: str) -> tuple[str, Any]:
    """`lr=0.01` → ("lr", 0.01); what is no JSON is a text. Raises LearnError."""
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise LearnError(f"--set takes FIELD=VALUE, got {text!r}")
    try:
        return field.strip(), json.loads(value)
    except ValueError:
        return field.strip(), value.strip()


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LearnError(f"--recipe {path} is neither a file nor one of {', '.join(BUILT_IN)}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise LearnError(f"{path} cannot be read as {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from error
    if not isinstance(values, dict):
        raise LearnError(f"{path} must hold a table of fields")
    return values


def _of_kind(name: str, field: str, value: Any, kind: Kind) -> Any:
    if not isinstance(value, dict):
        return value
    if kind not in value:
        raise LearnError(f"recipe {name}: {field} says nothing of kind {kind}; give a value, or one for {kind}")
    return value[kind]
