"""Where prompts and what was measured of them are kept, as transfer and its report ask it.

`StoreRegistry` is a store in this process; a server's is `cli.measured`. Knows the registry's records; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from prompts_store.prompt import Kind, SoftPrompt
from prompts_store.records import Actor, Measurement, Page
from prompts_store.reference import Reference
from prompts_store.resolution import Query, Resolution, Served
from prompts_store.store import PromptStore

T = TypeVar("T")
RECORDER = Actor("transfer")
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Stored:
    """A live version; what is not told here matters to nobody who measures."""

    task: str
    version: int
    digest: str
    kind: Kind
    base: str
    level: str
    weights: str | None
    train: Mapping[str, Any] | None


class Registry(Protocol):
    """Raises StoreError, or what its connection raises."""

    def tasks(self, base: str | None = None) -> Iterable[str]: ...
    def versions(self, task: str, base: str | None = None) -> Iterable[Stored]: ...
    def load(self, version: Stored) -> SoftPrompt: ...
    def measurements(self, task: str, version: int) -> Iterable[Measurement]:
        """Oldest first."""

    def add(self, task: str, version: int, measurement: Measurement) -> None: ...
    def resolve(self, task: str, on: Served) -> Resolution:
        """What a bare task name means where this is served."""


class StoreRegistry:
    """See `Registry`. The store stays its opener's to close."""

    def __init__(self, store: PromptStore, by: Actor = RECORDER) -> None:
        self._store, self._by = store, by

    def tasks(self, base: str | None = None) -> Iterator[str]:
        return (each.task for each in _every(partial(self._store.versions.tasks, base=base)))

    def versions(self, task: str, base: str | None = None) -> Iterator[Stored]:
        for each in _every(partial(self._store.versions.list, task, base=base)):
            told = (each.digest, each.kind, each.base, each.level, each.weights, each.train)
            yield Stored(each.task, each.version, *told)

    def load(self, version: Stored) -> SoftPrompt:
        return self._store.load(version.digest)

    def measurements(self, task: str, version: int) -> Iterator[Measurement]:
        return (each.measurement for each in _every(partial(self._store.measurements.list, task, version)))

    def add(self, task: str, version: int, measurement: Measurement) -> None:
        self._store.measurements.add(task, version, measurement, by=self._by)

    def resolve(self, task: str, on: Served) -> Resolution:
        return self._store.resolve(Query(Reference(task)), on).resolution


def _every(page_of: Callable[..., Page[T]]) -> Iterator[T]:
    """The items of all pages of a list."""
    after = None
    while True:
        page = page_of(limit=PAGE, after=after)
        yield from page.items
        if (after := page.next) is None:
            return
