"""The registry that `transfer` measures and `report` shows: a store here, or a server's over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from cli.output import CommandError
from cli.registry import check_one
from cli.remote import RemoteRegistry, client
from lab.transfer.registry import Registry, Stored, StoreRegistry
from prompts_store.errors import StoreLocked
from prompts_store.file import read_prompt
from prompts_store.prompt import SoftPrompt
from prompts_store.records import Measurement
from prompts_store.reference import Reference
from prompts_store.resolution import METRIC, SPLIT, AliasTarget, Candidate, Query, Resolution, Score, Served, resolve


class ServersRegistry:
    """See `lab.transfer.registry.Registry`. Raises CommandError."""

    def __init__(self, remote: RemoteRegistry) -> None:
        self._remote = remote

    def tasks(self, base: str | None = None) -> list[str]:
        return [each["task"] for each in self._remote.tasks(None, base)]

    def versions(self, task: str, base: str | None = None) -> list[Stored]:
        names = [field.name for field in fields(Stored)]
        return [Stored(**{name: row[name] for name in names}) for row in self._remote.task(task, None, base).versions]

    def load(self, version: Stored) -> SoftPrompt:
        prompt = read_prompt(self._remote.content(version.task, version.version)).prompt
        if prompt.digest != version.digest:
            raise CommandError(f"{version.task}@{version.version} came as {prompt.digest}, not as {version.digest}")
        return prompt

    def measurements(self, task: str, version: int) -> list[Measurement]:
        names = [field.name for field in fields(Measurement)]
        return [Measurement(**{name: row[name] for name in names}) for row in self._remote.measurements(task, version)]

    def add(self, task: str, version: int, measurement: Measurement) -> None:
        self._remote.measure(task, version, asdict(measurement))

    def resolve(self, task: str, on: Served) -> Resolution:
        """By the rules of the store, from what the server lists."""
        aliases = self._remote.task(task, None, None).aliases
        versions = self.versions(task)
        return resolve(
            Query(Reference(task)),
            on,
            [Candidate(v.version, v.digest, v.base, v.level, v.weights, v.kind, live=True) for v in versions],
            [AliasTarget(each["alias"], each["base"], each["level"], each["version"]) for each in aliases],
            [
                Score(version.version, row["value"], row["dataset"], row["served_weights"], row["id"])
                for version in versions
                for row in self._remote.measurements(task, version.version)
                if (row["metric"], row["split"], row["served_level"]) == (METRIC, SPLIT, on.level)
            ],
        )


@contextmanager
def opened(
    url: str | None, key: str | None, store: str | None, config: Path | None, *, needed: bool
) -> Iterator[Registry | None]:
    """That of a server if there is a `url`, else the local store, held until the context is left; None where that is
    not needed. Raises CommandError."""
    check_one(url, store)
    if url is not None:
        with client(url, key) as http:
            yield ServersRegistry(RemoteRegistry(http))
        return
    if not needed:
        yield None
        return
    from cli.local import open_store
    from server.settings import load_settings

    try:
        local = open_store(load_settings(config, store=store))
    except CommandError as error:
        if isinstance(error.__cause__, StoreLocked):
            hint = "stop that one while this command has the store, or name it if it is a server: --url URL"
            raise CommandError(f"{error.__cause__.message}; {hint}") from error
        raise
    with local:
        yield StoreRegistry(local)
