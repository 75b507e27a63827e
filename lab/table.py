"""A table of runs as it is written down: levels x kinds x recipes x tasks x seeds, in TOML.

    model = "smollm2-135m"        # dense checkpoint
    calibrate = "general"         # the task on whose data the solver calibrates; else the first
    tokens = 300_000              # of every run that says nothing else; also `steps`, `budget`
    windows = 400                 # scored of each split; 0: all
    controls = true               # every control beside every prompt, else the untrained one

    [tasks.general]
    data = "c4"
    also = ["wikitext2:report"]   # to report on besides

    [recipes.plain]               # a recipe of one's own: another one, changed
    from = "default"
    distil = 0.0

    [[runs]]
    levels = ["dense", "w4g64-s50", "w3g64@gptq"]   # LEVEL or LEVEL@METHOD; without one, at load where that can be
    kinds = ["rows", "kv"]
    allocations = ["uniform"]     # or "sensitivity", of what the solver makes
    embeddings = ["keep"]         # or "q8", likewise
    recipes = ["default"]
    tasks = ["general"]
    seeds = [0, 1, 2]

At the level `dense` every recipe learns from the text alone, since the divergence from itself is nothing to learn; such
a cell is the equal-budget control of the cells that differ from it in the level alone. Knows no data and no model.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from lab.compress.allocation import ALLOCATIONS
from lab.compress.compress import EMBEDDINGS
from lab.errors import RunError
from lab.learn.budget import Budget, parse_budget
from lab.learn.recipe import KINDS, Kind, Recipe, read_recipe
from prompts_store.prompt import Bos

DENSE = "dense"
TOP = {"model", "calibrate", "tokens", "steps", "budget", "windows", "controls", "device", "dtype", "compute", "bos"}
TOP |= {"calibration_tokens", "tasks", "recipes", "runs"}
RUN = {"levels", "allocations", "embeddings", "kinds", "recipes", "tasks", "seeds", "tokens", "steps", "budget"}


class TableError(RunError):
    """A table that does not hold. The message names the field and says what to do."""


@dataclass(frozen=True)
class Task:
    """A data set to learn, select and report on, and others that are reported on besides."""

    name: str
    data: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run. `level` with the method behind `@`, if one was named; how the solver allocates and what the embedding is
    stored as are the usual at `dense`."""

    level: str
    kind: Kind
    recipe_name: str
    task: str
    seed: int
    recipe: Recipe
    budget: Budget
    allocation: str = ALLOCATIONS[0]
    embedding: str = EMBEDDINGS[0]

    @property
    def made(self) -> str:
        """Names the compressed model: its level, and what is unusual about how it was made."""
        how = ((self.allocation, ALLOCATIONS), (self.embedding, EMBEDDINGS))
        return "+".join([self.level, *(each for each, (usual, *_) in how if each != usual)])

    @property
    def name(self) -> str:
        """Names its folder."""
        return f"{self.made}.{self.kind}.{self.recipe_name}.{self.task}.{self.seed}"

    @property
    def method(self) -> str | None:
        return self.level.partition("@")[2] or None

    @property
    def plain_level(self) -> str:
        return self.level.partition("@")[0]

    @property
    def twin(self) -> str:
        """The name of the cell on the dense model."""
        return replace(self, level=DENSE, allocation=ALLOCATIONS[0], embedding=EMBEDDINGS[0]).name


@dataclass(frozen=True)
class Table:
    """Cells in the order in which they are run: the table's, each dense twin before the first that needs it."""

    model: str
    calibrate: str
    tasks: Mapping[str, Task]
    cells: tuple[Cell, ...]
    windows: int | None
    controls: bool
    calibration: int
    device: str
    dtype: str
    compute: str
    bos: Bos


def read_table(path: Path) -> Table:
    """Raises TableError, LearnError."""
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be read as TOML: {error}") from error
    _known(told, TOP, str(path))
    tasks = {name: _task(name, value) for name, value in _table(told, "tasks").items()}
    runs = told.get("runs")
    if not tasks or not isinstance(runs, list) or not runs or not isinstance(told.get("model"), str):
        raise TableError(f"{path} must hold model, at least one [tasks.NAME] and at least one [[runs]]")
    calibrate = told.get("calibrate", next(iter(tasks)))
    cells = {cell.name: cell for each in runs for cell in _cells(each, told)}
    for cell in cells.values():
        if cell.task not in tasks:
            raise TableError(f"{path}: task {cell.task} of [[runs]] has no [tasks.{cell.task}]")
    if calibrate not in tasks:
        raise TableError(f"{path}: calibrate is {calibrate!r}; it is one of {', '.join(tasks)}")
    return Table(
        model=told["model"],
        calibrate=calibrate,
        tasks=tasks,
        cells=_in_order(cells),
        windows=_typed(told, "windows", int, 400) or None,
        controls=_typed(told, "controls", bool, False),
        calibration=_typed(told, "calibration_tokens", int, 32768),
        device=_typed(told, "device", str, "auto"),
        dtype=_typed(told, "dtype", str, "auto"),
        compute=_typed(told, "compute", str, "auto"),
        bos=_one(told, "bos", get_args(Bos), "tokenizer"),
    )


def _cells(run: Any, told: Mapping[str, Any]) -> list[Cell]:
    if not isinstance(run, dict):
        raise TableError("runs must be tables, [[runs]]")
    _known(run, RUN, "[[runs]]")
    found = []
    axes = (
        _list(run, "levels", str, None),
        _choices(run, "allocations", ALLOCATIONS),
        _choices(run, "embeddings", EMBEDDINGS),
        _choices(run, "kinds", KINDS),
        _list(run, "recipes", str, ["default"]),
        _list(run, "tasks", str, None),
        _list(run, "seeds", int, [0]),
    )
    for level, allocation, embedding, kind, name, task, seed in product(*axes):
        recipe = _recipe(name, kind, _table(told, "recipes"))
        how = (allocation, embedding)
        if level == DENSE:
            recipe, how = replace(recipe, distil=0.0, distil_tasks=None), (ALLOCATIONS[0], EMBEDDINGS[0])
        found.append(Cell(level, kind, name, task, seed, recipe, _budget(run, told, recipe), *how))
    return found


def _recipe(name: str, kind: Kind, own: Mapping[str, Any]) -> Recipe:
    if name not in own:
        return read_recipe(name, kind, {})
    if not isinstance(own[name], dict):
        raise TableError(f'recipes.{name} must be a table: [recipes.{name}], with from = "default" and what differs')
    changes = dict(own[name])
    return read_recipe(str(changes.pop("from", "default")), kind, changes)


def _budget(run: Mapping[str, Any], told: Mapping[str, Any], recipe: Recipe) -> Budget:
    units = ("budget", "tokens", "steps")
    source = run if any(unit in run for unit in units) else told
    budget, tokens, steps = (source.get(unit) for unit in units)
    for name, value, kind in (("budget", budget, str), ("tokens", tokens, int), ("steps", steps, int)):
        if value is not None and type(value) is not kind:
            raise TableError(f"{name} must be {kind.__name__}, got {value!r}")
    return parse_budget(budget, tokens, steps, recipe)


def _in_order(cells: Mapping[str, Cell]) -> tuple[Cell, ...]:
    placed: dict[str, Cell] = {}
    for cell in cells.values():
        if cell.twin in cells:
            placed.setdefault(cell.twin, cells[cell.twin])
        placed.setdefault(cell.name, cell)
    return tuple(placed.values())


def _task(name: str, told: Any) -> Task:
    if not isinstance(told, dict) or not isinstance(told.get("data"), str):
        raise TableError(f"[tasks.{name}] must hold data: a file, a folder or a name")
    _known(told, {"data", "also"}, f"[tasks.{name}]")
    also = _list(told, "also", str, [])
    if odd := [each for each in also if each.endswith(":select")]:
        raise TableError(f"[tasks.{name}]: also is reported on, and {odd[0]} is all to select by; write :report")
    return Task(name, told["data"], tuple(also))


def _known(told: Mapping[str, Any], names: set[str], where: str) -> None:
    if odd := sorted(told.keys() - names):
        raise TableError(f"{where}: {odd[0]} is not known; known are {', '.join(sorted(names))}")


def _table(told: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = told.get(name, {})
    if not isinstance(value, dict):
        raise TableError(f"{name} must be tables, [{name}.NAME]")
    return value


def _list(told: Mapping[str, Any], name: str, kind: type, default: list[Any] | None) -> list[Any]:
    value = told.get(name, default)
    if not isinstance(value, list) or not all(type(item) is kind for item in value) or (default is None and not value):
        raise TableError(f"{name} must be a list of {kind.__name__}, got {value!r}")
    return value


def _choices(told: Mapping[str, Any], name: str, known: Sequence[str]) -> list[Any]:
    """Some of the known, the first by default."""
    found = _list(told, name, str, list(known[:1]))
    if odd := [each for each in found if each not in known]:
        raise TableError(f"{name}: {odd[0]!r} is none of {', '.join(known)}")
    return found


def _one(told: Mapping[str, Any], name: str, known: Sequence[str], default: str) -> Any:
    if (value := _typed(told, name, str, default)) not in known:
        raise TableError(f"{name}: {value!r} is none of {', '.join(known)}")
    return value


def _typed(told: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = told.get(name, default)
    if type(value) is not kind:
        raise TableError(f"{name} must be {kind.__name__}, got {value!r}")
    return value
