"""Prompts times models times data: one model in memory at a time, every prompt scored while it is there.

What is done stands in the ledger of the run, so a run that was killed goes on with the slice that was under way. Knows
models and prompts; knows no registry (who wants the cells written down is told each when it is whole).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.stitch import mismatch
from lab.evaluate.score import NotFiniteLoss, score
from lab.progress import Report
from lab.run import Run
from lab.transfer.cells import Cell, Place
from lab.transfer.ledger import Ledger
from lab.transfer.prompts import Contender
from lab.transfer.samples import UNPROMPTED, Sample
from llama.errors import ModelError, UnsupportedModel
from llama.identity import Identity, identify
from llama.load import LoadedModel, info, load
from prompts_store.prompt import SoftPrompt

SLICE = 32  # windows scored in one go: what a kill may cost


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk, and the level that it is loaded at (None: as it is stored)."""

    folder: Path
    level: str | None
    identity: Identity


def models_of(folders: Sequence[Path], levels: Sequence[str], base: str | None = None) -> list[Model]:
    """Dense checkpoints at each of the levels (none: as they are), compressed ones as they are; each weights once.

    Raises ModelError where a level cannot be had, or models are of different bases.
    """
    found = []
    for folder in folders:
        stored = identify(folder, base=base)
        for level in levels if levels and stored.level == "dense" else [stored.level]:
            asked = None if level == stored.level else level
            found.append(Model(folder, asked, info(folder, level=asked, base=base).identity))
    if levels and not any(model.identity.level in levels for model in found):
        raise UnsupportedModel(
            f"--level {levels[0]}: no MODEL is dense, so none can be loaded at a level; leave it out"
        )
    first = found[0]
    for model in found:
        if model.identity.base != first.identity.base:
            raise ModelError(
                f"{model.folder} is of base {model.identity.base}, {first.folder} of {first.identity.base}; measure "
                "models of one base at a time, or name the base of a foreign checkpoint (--base)"
            )
    return list({model.identity.weights: model for model in found}.values())


@dataclass(frozen=True)
class Order:
    """What is measured on what. With a `budget` in seconds every prompt gets equally many windows, as many as it
    allows, one slice at least; without one, all of them.
    """

    models: Sequence[Model]
    contenders: Sequence[Contender]
    samples: Sequence[Sample]
    window: int
    dtype: str = "auto"
    device: str = "auto"
    base: str | None = None
    budget: float | None = None
    started: float = field(default_factory=time.monotonic)

    def config(self) -> dict[str, Any]:
        """All that the outcome depends on, for the run; a run may be given more time."""
        return {
            "command": "transfer",
            "models": [{"level": m.identity.level, "weights": m.identity.weights} for m in self.models],
            "prompts": sorted({each.prompt.digest for each in self.contenders}),
            "data": [
                {"data": s.data, "split": s.split, "digest": s.first(len(s))[0].digest, "windows": len(s)}
                for s in self.samples
            ],
            "window": self.window,
            "dtype": self.dtype,
            "device": self.device,
        }


@dataclass(frozen=True)
class Outcome:
    """The cells, and which prompts were left out: (prompt, model's level, why)."""

    cells: Sequence[Cell]
    left_out: Sequence[tuple[str, str, str]]


def transfer(order: Order, run: Run, report: Report, tell: Callable[[Cell], object]) -> Outcome:
    """Measure whatever the run has not yet; `tell` hears of every cell, of those measured before too.

    Raises ModelError, RunError, and what `tell` raises.
    """
    ledger = Ledger(run)
    found: list[Cell] = []
    left_out: list[tuple[str, str, str]] = []
    for model in order.models:
        _measure(order, model, ledger, report)
        place, misfits = ledger.place(model.identity.weights), ledger.misfits(model.identity.weights)
        assert place is not None
        left_out += [
            (each.name, place.level, misfits[each.prompt.digest])
            for each in order.contenders
            if each.prompt.digest in misfits
        ]
        for cell in _cells(order, place, ledger):
            tell(cell)
            found.append(cell)
    return Outcome(found, left_out)


def _measure(order: Order, model: Model, ledger: Ledger, report: Report) -> None:
    """Bring the ledger to the end of what it holds of one model; it is loaded only if something is missing."""
    weights = model.identity.weights
    loaded: LoadedModel | None = None
    if ledger.place(weights) is None:
        loaded = _load(order, model, report)
        ledger.put_place(_place(loaded), _misfits(order, loaded))
    fitting = [p for p in _prompts(order.contenders) if p.digest not in ledger.misfits(weights)]
    conditions: list[SoftPrompt | None] = [None, *fitting]
    for sample in order.samples:
        for prompt, start in _missing(order, weights, sample, conditions, ledger):
            loaded = loaded or _load(order, model, report)
            windows = sample.rows(start, start + SLICE, UNPROMPTED if prompt is None else prompt.bos)
            try:
                ledger.add(weights, sample, prompt, score(loaded.model, windows, prompt).nll.double().sum(1))
            except NotFiniteLoss as error:
                if prompt is None:
                    raise ModelError(f"{model.folder} at {model.identity.level}: {error}") from error
                ledger.put_misfit(weights, prompt.digest, str(error))
                conditions.remove(prompt)
            report(f"transfer, {model.identity.level} on {sample.data}/{sample.split}", *_far(order, ledger))


def _far(order: Order, ledger: Ledger) -> tuple[int, int]:
    """Windows done and in all; under a budget that ends it before, seconds."""
    rows = sum(map(len, order.samples)) * len(order.models) * (len(_prompts(order.contenders)) + 1)
    gone = time.monotonic() - order.started
    if order.budget and gone * rows > order.budget * ledger.windows:
        return min(int(gone), int(order.budget)), int(order.budget)
    return ledger.windows, rows


def _missing(
    order: Order, weights: str, sample: Sample, prompts: Sequence[SoftPrompt | None], ledger: Ledger
) -> Iterator[tuple[SoftPrompt | None, int]]:
    """What is to be scored next: always the prompt that is furthest behind, with the number of windows that it has."""
    while True:
        have = [len(ledger.sums(weights, sample, prompt)) for prompt in prompts]
        least = min(have)
        if least == len(sample) or (least and order.budget and time.monotonic() - order.started >= order.budget):
            return
        yield prompts[have.index(least)], least


def _cells(order: Order, place: Place, ledger: Ledger) -> Iterator[Cell]:
    misfits = ledger.misfits(place.weights)
    contenders = [each for each in order.contenders if each.prompt.digest not in misfits]
    for sample in order.samples:
        sums = [ledger.sums(place.weights, sample, prompt) for prompt in [None, *(c.prompt for c in contenders)]]
        windows, places = sample.first(min(map(len, sums)))
        without, *behind = (each[places] for each in sums)
        for contender, losses in zip(contenders, behind, strict=True):
            yield Cell(place, contender, sample.data, sample.split, windows, without, losses)


def _prompts(contenders: Sequence[Contender]) -> list[SoftPrompt]:
    """Each once, whatever names it has."""
    return list({each.prompt.digest: each.prompt for each in contenders}.values())


def _load(order: Order, model: Model, report: Report) -> LoadedModel:
    return load(
        model.folder, level=model.level, dtype=order.dtype, device=order.device, base=order.base, progress=report
    )


def _place(loaded: LoadedModel) -> Place:
    who = loaded.identity
    return Place(who.name, who.level, who.weights, loaded.disk_bytes, loaded.resident_bytes)


def _misfits(order: Order, loaded: LoadedModel) -> dict[str, str]:
    """Why prompts cannot stand in front of a window here, by digest."""
    room = loaded.model.config.max_len - order.window
    found = {}
    for prompt in _prompts(order.contenders):
        if (n := prompt.num_virtual_tokens) > room:
            found[prompt.digest] = f"{n} positions and a window of {order.window} tokens exceed the model's context"
        elif why := mismatch(prompt, loaded.model, loaded.identity.base, n, math.inf):
            found[prompt.digest] = why[1]
    return found
