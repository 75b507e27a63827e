"""Which prompts are measured: those of a registry and those in files, with what is known of how they were learned.

Knows the registry and its files; knows no model beyond its base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.transfer.registry import Registry, Stored
from prompts_store.errors import InvalidArtifact, NotFound
from prompts_store.file import read_prompt
from prompts_store.prompt import SoftPrompt
from prompts_store.records import Measurement
from prompts_store.resolution import Served


@dataclass(frozen=True)
class Contender:
    """A prompt on trial. `level` and `weights` are those it was learned at and through, `version` is None for one that
    is in no registry; `parents`: the digests of the prompts that it was learned from, `data` that of the documents that
    were dealt out for it, None where nobody told.
    """

    prompt: SoftPrompt
    name: str
    task: str | None = None
    version: int | None = None
    level: str | None = None
    weights: str | None = None
    parents: tuple[str, ...] | None = None
    data: str | None = None

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "prompt": self.name,
            "digest": self.prompt.digest,
            "kind": self.prompt.kind,
            "positions": self.prompt.num_virtual_tokens,
            "task": self.task,
            "learned_level": self.level,
            "learned_weights": self.weights,
            "parents": None if self.parents is None else list(self.parents),
        }


def stored(registry: Registry, base: str, tasks: Collection[str] = ()) -> list[Contender]:
    """Every live version of this base, or of these tasks. Raises NotFound for a task without one, StoreError."""
    names = list(registry.tasks(base))
    if missing := sorted(set(tasks) - set(names)):
        had = ", ".join(names) or "none"
        raise NotFound("task", f"the store holds no prompt of task {missing[0]} for base {base}; tasks it has: {had}")
    return [
        _of_version(version, registry.load(version))
        for task in names
        if not tasks or task in tasks
        for version in registry.versions(task, base)
    ]


def from_file(path: Path, base: str) -> Contender:
    """The prompt in a file that is of this base or names none. Raises InvalidArtifact, OSError."""
    try:
        file = read_prompt(path, default_base=base)
    except InvalidArtifact as error:
        raise InvalidArtifact(error.code, f"{path}: {error.message}", error.field) from error
    if file.prompt.base != base:
        message = f"{path} belongs to base {file.prompt.base}, the models are of {base}; leave it out"
        raise InvalidArtifact("base_model_mismatch", message, "base")
    origin = file.provenance
    learned = _parents(origin.train), _data(origin.train)
    return Contender(file.prompt, path.name, origin.task, None, origin.level, origin.weights, *learned)


def together(of_store: Sequence[Contender], of_files: Sequence[Contender]) -> list[Contender]:
    """Both; a file that the store holds too is left out."""
    known = {each.prompt.digest for each in of_store}
    return [*of_store, *(each for each in of_files if each.prompt.digest not in known)]


def record(registry: Registry, task: str, version: int, measurement: Measurement) -> None:
    """Write a measurement of a version down, unless it stands there already. Raises StoreError."""
    if measurement not in registry.measurements(task, version):
        registry.add(task, version, measurement)


def served(registry: Registry, task: str, on: Served) -> dict[str, Any]:
    """What a server of this model takes for the task now, and by which rule, as JSON. Raises StoreError."""
    how = registry.resolve(task, on)  # by the policy `transfer`: nothing would have been an error
    version = next(each for each in registry.versions(task) if each.version == how.version)
    why = "it was learned at this level, or an alias says so" if how.how == "exact" else "it was measured best"
    return {"prompt": f"{task}@{version.version}", "digest": version.digest, "resolution": how.how, "why": why}


def _of_version(version: Stored, prompt: SoftPrompt) -> Contender:
    name = f"{version.task}@{version.version}"
    learned = _parents(version.train), _data(version.train)
    return Contender(prompt, name, version.task, version.version, version.level, version.weights, *learned)


def _parents(train: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    told = (train or {}).get("parents")
    return tuple(map(str, told)) if isinstance(told, list) else None


def _data(train: Mapping[str, Any] | None) -> str | None:
    told = (train or {}).get("data")
    return told if isinstance(told, str) else None
