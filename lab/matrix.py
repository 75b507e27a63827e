"""A table of runs carried out cell by cell: what is finished stays, what failed is told, the rest goes on.

    levels/     compressed checkpoints, each made once
    teacher/    dense models' states, for all levels and seeds
    cells/      a folder for each cell, as `lab.recover` fills it

Knows runs; what a table says is `lab.table`'s business.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from engine.device import select
from lab.data.named import documents
from lab.data.splits import Splits, apart, split
from lab.disk import write_bytes
from lab.errors import RunError
from lab.estimate import Speeds, memory, speeds
from lab.learn.budget import Budget
from lab.learn.compute import choose_compute
from lab.outlook import estimates
from lab.plan import Order, Places, Plan
from lab.progress import Report
from lab.prove import Material, prove
from lab.recover import PROMPT, compress, planned, recover, subject
from lab.run import FIGURES, open_run
from lab.table import DENSE, Cell, Table, TableError
from lab.transfer.samples import parts, sample
from lab.whole import Whole
from llama.config import LlamaConfig
from llama.load import choose_device, choose_dtype
from llama.shards import read_json
from llama.tokenizer import HubTokenizer
from prompts_store.file import read_prompt
from prompts_store.prompt import SoftPrompt

ERROR = "error.txt"  # beside the cell's folder
PROMPTS = ("rows", "kv")  # kinds; others are controls
PASSES = 6  # over the windows of a split, for a prompt of its own; what other cells scored, controls too, is kept


@dataclass(frozen=True)
class Matrix:
    """A table, the dense checkpoint that it names, and the folder that all of it goes into."""

    table: Table
    model: Path
    root: Path
    data_root: Path | None = None

    def folder(self, cell: Cell) -> Path:
        return self.root / "cells" / cell.name

    def finished(self, cell: Cell) -> bool:
        """Whether nothing is left to do for a cell, if it is still the one that was carried out."""
        told = _figures(self.folder(cell)).get("cell")
        asked = self.table.tasks[cell.task].also if cell.kind in PROMPTS else ()
        return told is not None and all(_plain(name) in told for name in asked)

    def cells(self, only: str | None) -> list[Cell]:
        """All, or the one of this name. Raises TableError."""
        found = [cell for cell in self.table.cells if only in (None, cell.name)]
        if not found:
            names = ", ".join(cell.name for cell in self.table.cells)
            raise TableError(f"--only {only}: there is no such cell; cells are {names}")
        return found

    @cached_property
    def config(self) -> LlamaConfig:
        """From config.json alone, so that a table can be estimated without the weights at hand. Raises ModelError."""
        return LlamaConfig.from_hf(read_json(self.model / "config.json"))

    @cached_property
    def device(self) -> torch.device:
        """The table's, which need not be at hand as long as nothing is started."""
        if self.table.device == "auto":
            return choose_device("auto")
        try:
            return torch.device(self.table.device)
        except RuntimeError:
            raise TableError(f"device is {self.table.device!r}; choose auto, cpu, cuda or cuda:N") from None


def estimated(matrix: Matrix, only: str | None, limit: int | None, speed: float | None) -> list[dict[str, Any]]:
    """What each cell will take. `speed`: tokens a second of learning; else what finished cells took, else measured.

    `limit` in bytes: whether the cell fits. Raises TableError, ModelError.
    """
    cells = matrix.cells(only)
    found = Speeds.of_learning(speed or 1.0)
    if speed is None and any(not matrix.finished(cell) for cell in cells):
        if matrix.device.type == "cuda" and not torch.cuda.is_available():
            raise TableError("there is no CUDA device here to measure; say how fast yours learns, --tokens-per-second")
        found = speeds(matrix.config, matrix.device, *_numerics(matrix))
    return [_estimate(matrix, cell, limit, found) for cell in cells]


def _numerics(matrix: Matrix) -> tuple[str, str]:
    """What learning computes in, and what is served."""
    dtype = choose_dtype(matrix.table.dtype, matrix.device)
    return choose_compute(matrix.table.compute, matrix.device), str(dtype).removeprefix("torch.")


def _estimate(matrix: Matrix, cell: Cell, limit: int | None, speed: Speeds) -> dict[str, Any]:
    table, recipe = matrix.table, cell.recipe
    figures = _figures(matrix.folder(cell) / "learn")
    if "tokens_per_second" in figures:
        speed = Speeds.of_learning(figures["tokens_per_second"])
    compute, dtype = _numerics(matrix)
    tokens = figures.get("tokens") or tokens_of(cell.budget, recipe.batch * recipe.window, speed.learning)
    need = memory(matrix.config, cell.plain_level, cell.kind, recipe, compute, dtype, cuda=matrix.device.type == "cuda")
    scored = (table.windows or 400) * recipe.window * PASSES if cell.kind in PROMPTS else 0
    taught = tokens if recipe.distil else 0
    return {
        "cell": cell.name,
        "finished": matrix.finished(cell),
        "tokens": int(tokens),
        "tokens_per_second": round(speed.learning, 1),
        "seconds": round(tokens / speed.learning + (scored + taught) / speed.scoring),
        "memory": need.told(),
        "fits": None if limit is None else need.peak <= limit,
    }


def tokens_of(budget: Budget, step: int, speed: float) -> float:
    """Tokens that a budget comes to, at so many tokens a step and a second."""
    return budget.amount * {"tokens": 1.0, "steps": float(step), "seconds": speed}[budget.unit]


def run(matrix: Matrix, only: str | None, report: Report) -> Iterator[dict[str, Any]]:
    """What came of each cell, as it is done; `error` where it failed. Raises TableError, ModelError."""
    expected = {each["cell"]: each for each in estimated(matrix, only, None, None)}
    whole = Whole({name: 0.0 if each["finished"] else each["seconds"] for name, each in expected.items()}, report)
    data = _Data(matrix)
    select(matrix.device)
    for cell in matrix.cells(only):
        _forget()
        try:
            if matrix.finished(cell):
                told = _told_before(matrix, cell, data)
                yield {"cell": cell.name, "state": "finished before", **told}
                continue
            with whole.step(cell.name) as step:
                told = _carry_out(matrix, cell, data, step)
            yield {"cell": cell.name, "state": "finished", "seconds": whole.seconds[cell.name], **told}
        except Exception as error:  # whatever it is, the other cells do not depend on it
            write_bytes(matrix.root / "cells" / f"{cell.name}.{ERROR}", traceback.format_exc().encode())
            yield {"cell": cell.name, "state": "failed", "error": f"{error}" or type(error).__name__}


class _Data:
    """Splits of the tasks, each read once."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._found: dict[str, Splits] = {}

    def __getitem__(self, task: str) -> Splits:
        if task not in self._found:
            self._found[task] = split(documents(self._matrix.table.tasks[task].data, self._matrix.data_root))
        return self._found[task]


def _told_before(matrix: Matrix, cell: Cell, data: _Data) -> Mapping[str, Any]:
    """Raises RunError, which names what differs, where the table asks for something else by now."""
    plan = _planned(matrix, cell, data, None)
    with open_run(matrix.folder(cell), plan.record(), cell.seed) as kept:
        told: Mapping[str, Any] = kept.figures["cell"]
        return told


def _carry_out(matrix: Matrix, cell: Cell, data: _Data, report: Report) -> Mapping[str, Any]:
    plan = _planned(matrix, cell, data, _twin(matrix, cell))
    if plan.solve:
        compress(plan, report)  # before the cell's folder says what it holds: it may be made otherwise
    with open_run(matrix.folder(cell), plan.record(), cell.seed) as kept:
        outcome = recover(plan, Whole(estimates(plan), report, ends=False))
        told: dict[str, Any] = {"loss": outcome.learned["best"]["loss"], "tokens": outcome.learned["tokens"]}
        if outcome.report is not None:
            told |= _summary(outcome.report)
        if outcome.file is not None:
            about = replace(subject(plan, outcome.file), every=None)  # controls are held against on the task's own data
            for name in matrix.table.tasks[cell.task].also:
                folder = matrix.folder(cell) / f"report-{_plain(name)}"
                material = _also(matrix, cell, name, plan.splits)
                found = prove(about, material, folder, plan.places.cache, report)
                told[_plain(name)] = _summary(found)
        kept.tell(cell=told)
    return told


def _twin(matrix: Matrix, cell: Cell) -> SoftPrompt | None:
    """What the same budget gave the dense model. Raises RunError where the table has it and it is not there yet."""
    if cell.level == DENSE or all(each.name != cell.twin for each in matrix.table.cells):
        return None
    place = matrix.root / "cells" / cell.twin / "learn" / PROMPT
    if cell.kind in PROMPTS and not place.exists():
        raise RunError(f"it is held against the cell {cell.twin}, which has not finished: run that first (--only)")
    return read_prompt(place).prompt if place.exists() else None


def _planned(matrix: Matrix, cell: Cell, data: _Data, equal: SoftPrompt | None) -> Plan:
    table, root = matrix.table, matrix.root
    order = Order(
        model=matrix.model,
        level=cell.plain_level,
        task=cell.task,
        kind=cell.kind,
        recipe=cell.recipe,
        budget=cell.budget,
        method=cell.method,
        embedding=cell.embedding,
        allocation=cell.allocation,
        calibration=table.calibration,
        windows=table.windows,
        bos=table.bos,
        dtype=table.dtype,
        device=table.device,
        compute=table.compute,
        seed=cell.seed,
        equal=equal,
        every=table.controls,
    )
    places = Places(matrix.folder(cell), root / "levels" / cell.made, root / "teacher")
    return planned(order, data[cell.task], places, table.tasks[cell.task].data, data[table.calibrate])


def _also(matrix: Matrix, cell: Cell, name: str, learned: Splits) -> Material:
    found = apart(parts(name, matrix.data_root, {learned.data})["report"], learned.parts["learn"])
    if not found:
        raise RunError(
            f"also: each document of {name} shares words in a row with what is learned from; report on other data"
        )
    window, bos = cell.recipe.window, matrix.table.bos
    tokenizer = HubTokenizer(matrix.model)
    drawn = sample(_plain(name), "report", found, tokenizer, window, [bos], most=matrix.table.windows)
    return Material(drawn, found, window)


def _plain(name: str) -> str:
    """What a data set is called in a folder's name."""
    given = name.removesuffix(":report")
    return Path(given).name if Path(given).exists() else given.replace("/", "-")


def _summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a table shows of an evaluation."""
    recovery = figures.get("recovery") or {}
    shares = {name: (recovery.get(name) or {}).get("value") for name in ("share", "net_share", "kl_share")}
    return {
        "perplexity": figures["perplexity"],
        "without": figures["conditions"]["without_prompt"]["perplexity"],
        "dense": figures.get("dense_perplexity"),
        "gain": figures["gain"]["value"],
        **shares,
    }


def _figures(folder: Path) -> dict[str, Any]:
    file = folder / FIGURES
    return read_json(file) if file.exists() else {}


def _forget() -> None:
    """Give back what the cell before left, and count its peak no longer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
