"""A measured prompt on its way into the registry: version, measurements, and the alias if the numbers earn it.

Whatever was cut short is taken up: a version, a measurement and an alias that are there already stay one. Knows the
registry and its rule of promotion; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lab.transfer.prompts import record
from lab.transfer.registry import StoreRegistry
from prompts_store.aliases import ANY_REVISION
from prompts_store.errors import NotFound
from prompts_store.file import PromptFile, read_prompt
from prompts_store.records import Actor, Alias, Measurement, Version
from prompts_store.store import PromptStore

RECORDER = Actor("recover")
DEFAULT = "default"


@dataclass(frozen=True)
class Published:
    """`promoted`: whether the alias `default` points to the version now; `why` says by which numbers."""

    version: Version
    new: bool
    promoted: bool
    why: str

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "task": self.version.task,
            "version": self.version.version,
            "digest": self.version.digest,
            "level": self.version.level,
            "weights": self.version.weights,
            "new": self.new,
            "promoted": self.promoted,
            "why": self.why,
        }


def publish(
    store: PromptStore,
    file: PromptFile,
    task: str,
    select: Measurement,
    report: Measurement,
    measure: Callable[[PromptFile], Measurement],
) -> Published:
    """Push the prompt with both measurements; `default` at its level moves to it only if the whole interval of its
    gain on `select` lies above 0, and what it points to now is not better on just these data and weights: where that
    was not measured, `measure` does it, as it did for `select`. What is reported decides nothing, or it would be no
    report.

    Raises StoreError, and what `measure` raises.
    """
    version, new = store.push(file, task, by=RECORDER)
    registry = StoreRegistry(store, RECORDER)
    for each in (select, report):
        record(registry, task, version.version, each)
    now = _alias(store, version)
    if now is not None and now.version == version.version:
        return Published(version, new, True, f"{task}:{DEFAULT} points to it already")
    if select.gain is None or select.gain_low is None or select.gain_low <= 0:
        return Published(version, new, False, f"its gain on select is not more than chance: {_gain(select)}")
    if now is not None and (other := _of_default(store, registry, now, select, measure)) < select.value:
        why = f"{task}@{now.version}, the default, has perplexity {other:.2f} on the same data, this {select.value:.2f}"
        return Published(version, new, False, why)
    expected = None if now is None else ANY_REVISION
    store.aliases.put(task, DEFAULT, version.version, expected=expected, gain_on=select.served_weights, by=RECORDER)
    return Published(version, new, True, f"its gain on select is above 0: {_gain(select)}")


def _alias(store: PromptStore, version: Version) -> Alias | None:
    try:
        return store.aliases.get(version.task, DEFAULT, base=version.base, level=version.level)
    except NotFound:
        return None


def _of_default(
    store: PromptStore,
    registry: StoreRegistry,
    alias: Alias,
    ours: Measurement,
    measure: Callable[[PromptFile], Measurement],
) -> float:
    """The perplexity of the alias's version on the same data and weights."""
    same = ("metric", "dataset", "split", "served_weights")
    known = registry.measurements(alias.task, alias.version)
    found = [each.value for each in known if all(getattr(each, name) == getattr(ours, name) for name in same)]
    if found:
        return found[-1]
    measured = measure(read_prompt(store.content(alias.task, alias.version)))
    record(registry, alias.task, alias.version, measured)
    return measured.value


def _gain(measured: Measurement) -> str:
    if measured.gain is None or measured.gain_low is None or measured.gain_high is None:
        return "no interval, since it is of a single document"
    return f"{measured.gain:+.4f} [{measured.gain_low:+.4f}, {measured.gain_high:+.4f}] nats a token"
