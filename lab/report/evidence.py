"""What there is to report on: run folders, documents of `evaluate --json`, and the measurements of a registry.

    a run folder of the commands compress, learn, transfer, evaluate, control, with its figures; others say nothing here
    a JSON document with `nll_sum`: what `evaluate --json` printed, wherever it lies in the folders

Nothing is computed here and nothing is filled in. Knows files and the registry; knows no table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lab.errors import RunError
from lab.evaluate.bootstrap import Estimate
from lab.run import COMMAND, CONFIG, FIGURES, VERSIONS
from lab.transfer.registry import Registry, Stored
from prompts_store.records import Measurement

REPORTED = "report"  # the one split that is shown
WHOLE = "all"  # of a text that was evaluated as it is: what was learned from may be in it, and tables say so
# The figure that is there once a run of the command has come to its end.
LAST = MappingProxyType({"compress": "weights", "learn": "best", "evaluate": "nll_sum", "transfer": "cells"})


@dataclass(frozen=True)
class Record:
    """One run, or one document: what it was asked, with which seed, and what came out."""

    name: str  # folder or file, below the folder that was given
    command: str  # as it was typed; of a document, what it says that it evaluated
    digest: str | None  # of the config
    seed: int | None
    config: Mapping[str, Any]
    figures: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The command, as its config names it."""
        return str(self.config.get("command"))


@dataclass(frozen=True)
class Measured:
    """A measurement of the registry, with the version that it is of."""

    version: Stored
    measurement: Measurement


@dataclass(frozen=True)
class Evidence:
    """All that was found; `unusable` says of runs why nothing of them is shown."""

    records: Sequence[Record]
    measured: Sequence[Measured]
    unusable: Sequence[tuple[str, str]]

    def of(self, *kinds: str) -> list[Record]:
        """The records of these commands, in the order of their names."""
        return sorted((each for each in self.records if each.kind in kinds), key=lambda each: each.name)


def gather(folders: Sequence[Path], registry: Registry | None) -> Evidence:
    """Raises RunError where a folder is not there, StoreError."""
    records: list[Record] = []
    unusable: list[tuple[str, str]] = []
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"there is no folder {folder}; name folders with runs in them")
    whole = [folder.resolve() for folder in folders]
    root = Path(os.path.commonpath(whole)) if whole else Path()  # of two folders, runs of one name stay two
    for folder in whole:
        for file in sorted(folder.rglob("*.json")):
            if (file.parent / "tokenizer.json").exists():
                continue  # a checkpoint
            name = str((file.parent if file.name == CONFIG else file).relative_to(root))
            name = root.name if name == "." else name
            try:
                records += _records(file, name)
            except (ValueError, OSError, RunError) as error:
                unusable.append((name, str(error)))
    return Evidence(records, [] if registry is None else list(_measured(registry)), unusable)


def estimate(told: Any) -> Estimate | None:
    """An estimate as `Estimate.told` writes it; None for anything else."""
    if not isinstance(told, Mapping) or not isinstance(told.get("value"), int | float):
        return None
    low, high = told.get("interval") or (None, None)
    return Estimate(float(told["value"]), low, high, int(told.get("units", 0)), str(told.get("unit", "document")))


def _records(file: Path, name: str) -> Iterator[Record]:
    """Of a run's config the run, of a document of an evaluation itself, of any other file nothing."""
    if file.name in (FIGURES, VERSIONS):
        return
    found = _object(file)
    if file.name == CONFIG and found.keys() >= {"digest", "config", "seed"}:
        yield _run(file.parent, name, found)
    elif found.get("split", WHOLE) in (REPORTED, WHOLE) and {"nll_sum", "weights", "windows"} <= found.keys():
        asked = {"command": "evaluate"}
        yield Record(name, _asked(found), None, None, asked, found, {})


def _run(folder: Path, name: str, config: Mapping[str, Any]) -> Record:
    if not (folder / FIGURES).exists():
        raise RunError("it has no figures yet: start its command again, to its end")
    typed = (folder / COMMAND).read_text(encoding="utf-8").strip() if (folder / COMMAND).exists() else ""
    versions = _object(folder / VERSIONS) if (folder / VERSIONS).exists() else {}
    command = typed or str(config["config"].get("command"))
    figures = _object(folder / FIGURES)
    if LAST.get(str(config["config"].get("command"))) not in {None, *figures}:
        raise RunError("it did not come to its end: start its command again")
    return Record(name, command, config["digest"], config["seed"], config["config"], figures, versions)


def _asked(told: Mapping[str, Any]) -> str:
    """The command of an evaluation by what its document says."""
    parts = ["promptstitch evaluate", told.get("model"), "--level", told.get("level")]
    if told.get("prompt_digest"):
        parts += ["--prompt", told["prompt_digest"][:19]]
    if isinstance(text := told.get("text"), Mapping):
        parts += ["--text", Path(str(text.get("source"))).name]
    return " ".join(map(str, [*parts, "--window", told.get("window")]))


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file.name} is not JSON ({error}); remove it, or write it again") from error
    return value if isinstance(value, dict) else {}


def _measured(registry: Registry) -> Iterator[Measured]:
    for task in registry.tasks():
        for version in registry.versions(task):
            for each in registry.measurements(task, version.version):
                if each.split == REPORTED:
                    yield Measured(version, each)
