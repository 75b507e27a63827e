"""What is told of a table of transfer: its cells, how much stays between levels, and which prompt is best where.

Knows cells and what a registry resolves to; knows no model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from lab.transfer.cells import Cell, verdict
from lab.transfer.prompts import served
from lab.transfer.ratio import transfer_ratio
from lab.transfer.registry import Registry
from lab.transfer.transfer import Outcome
from prompts_store.resolution import Served

K = TypeVar("K", bound=Hashable)


def told(outcome: Outcome, registry: Registry | None, *, choose: bool) -> dict[str, Any]:
    """As JSON, for the run's figures. `choose`: of one model and data set, tell the best prompt of each task.

    Raises StoreError.
    """
    by_data = _grouped(((cell.data, cell.split), cell) for cell in outcome.cells)
    figures: dict[str, Any] = {
        "cells": [cell.told() for cell in outcome.cells],
        "left_out": [dict(zip(("prompt", "level", "why"), each, strict=True)) for each in outcome.left_out],
        "transfer": [
            {"data": data, "split": split, **transfer_ratio(cells).told()} for (data, split), cells in by_data.items()
        ],
    }
    if choose:
        by_task = _grouped((cell.contender.task, cell) for cell in outcome.cells)
        figures["best"] = [_best(cells, registry) for cells in by_task.values()]
    return figures


def _best(cells: Sequence[Cell], registry: Registry | None) -> dict[str, Any]:
    """The verdict on a task, and what a server of this model takes now."""
    found = verdict(cells)
    task, place = found.best.contender.task, found.best.place
    on = Served(found.best.contender.prompt.base, place.level, place.weights)
    taken = None if registry is None or task is None else served(registry, task, on)
    return {**found.told(), "level": place.level, "weights": place.weights, "served": taken}


def _grouped(pairs: Iterable[tuple[K, Cell]]) -> Mapping[K, list[Cell]]:
    groups: dict[K, list[Cell]] = defaultdict(list)
    for key, cell in pairs:
        groups[key].append(cell)
    return groups
