"""One registry, wherever it is: what the commands ask of it, and which version a reference means there.

Answers are the JSON objects of the HTTP API, from a local store too, so that `--json` prints the same for both. Knows
no HTTP and no database; the two that do are `remote.py` and `local.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cli.output import CommandError
from prompts_store.reference import Reference, parse_reference

Answer = dict[str, Any]
DEFAULT_ALIAS = "default"


@dataclass(frozen=True, slots=True)
class Source:
    """A prompt on its way in: a prompt file, or a PEFT adapter's tensors with its `config` beside them."""

    weights: Path
    config: Path | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """All that stands under a task: versions oldest first, and aliases."""

    versions: Sequence[Answer]
    aliases: Sequence[Answer]


class Registry(Protocol):
    """Raises CommandError or StoreError."""

    def tasks(self, level: str | None, base: str | None) -> list[Answer]: ...
    def task(self, task: str, level: str | None, base: str | None) -> Task: ...
    def push(self, source: Source, task: str, level: str | None, bos: str | None) -> Answer:
        """`level` and `bos` count where the source does not say. `new` in the answer: it was no version before."""

    def content(self, task: str, version: int) -> bytes:
        """The prompt file."""

    def delete(self, task: str, version: int) -> None: ...
    def put_alias(self, task: str, alias: str, version: int, gain: bool = False) -> Answer:
        """Wherever it pointed before: whoever types the command has decided. `gain`: only if one was measured."""

    def delete_alias(self, alias: Answer) -> None:
        """`alias` as it was listed."""

    def measurements(self, task: str, version: int) -> list[Answer]:
        """Oldest first."""

    def create_key(self, name: str, scopes: Sequence[str]) -> Answer:
        """With the `secret`, which is told this once."""

    def keys(self) -> list[Answer]: ...
    def revoke_key(self, key_id: str) -> None: ...
    def served_level(self) -> str | None:
        """The level of the model that is served from this registry; None where none is."""


@contextmanager
def open_registry(
    url: str | None, key: str | None, store: str | None, config: Path | None, model: str | None = None
) -> Iterator[Registry]:
    """That of a server if there is a `url`, else a local one, held until the context is left.

    `model` binds prompts that name no base to a local model; a server binds them to its own. Raises CommandError,
    SettingsError, StoreError, ModelError.
    """
    check_one(url, store)
    if url is not None:
        from cli.remote import RemoteRegistry, client

        with client(url, key) as http:
            yield RemoteRegistry(http)
        return
    from cli.local import LocalRegistry, open_store
    from server.settings import load_settings

    settings = load_settings(config, store=store)
    with open_store(settings) as opened:
        yield LocalRegistry(opened, model)


def check_one(url: str | None, store: str | None) -> None:
    """Raises CommandError where two registries are named."""
    if url is not None and store is not None:
        raise CommandError("--store and --url (or PROMPTSTITCH_URL) name two registries; give one", usage=True)


def pick(registry: Registry, text: str, level: str | None, base: str | None) -> Answer:
    """The version that a reference means here. Raises CommandError, BadReference."""
    reference = parse_reference(text)
    found = registry.task(reference.task, level, base)
    if reference.explicit:
        versions = [v for v in found.versions if reference.version == v["version"] or reference.digest == v["digest"]]
        return _only(versions[-1:], reference, found)
    targets = {a["version"] for a in found.aliases if a["alias"] == (reference.alias or DEFAULT_ALIAS)}
    if len(targets) > 1:
        raise CommandError(f"{reference} stands for {len(targets)} versions; say which with --level or --base")
    if targets or reference.alias:
        return _only([v for v in found.versions if v["version"] in targets], reference, found)
    return _only(found.versions[-1:], reference, found)


def pick_alias(registry: Registry, reference: Reference, level: str | None, base: str | None) -> Answer:
    """The alias `task:alias`. Raises CommandError."""
    found = [a for a in registry.task(reference.task, level, base).aliases if a["alias"] == reference.alias]
    if len(found) > 1:
        levels = ", ".join(sorted({str(a["level"]) for a in found}))
        raise CommandError(f"{reference} exists at {levels}; say which with --level or --base")
    if not found:
        raise CommandError(f"there is no alias {reference}; `promptstitch prompts list {reference.task}` shows them")
    return found[0]


def _only(versions: Sequence[Answer], reference: Reference, found: Task) -> Answer:
    if versions:
        return versions[0]
    there = ", ".join(f"@{v['version']}" for v in found.versions) or "none"
    names = ", ".join(sorted({f":{a['alias']}" for a in found.aliases})) or "none"
    raise CommandError(f"there is no {reference}; versions: {there}; aliases: {names}")
