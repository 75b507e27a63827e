"""A registry in this process. Knows the store's calls; knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from sqlalchemy.exc import SQLAlchemyError

from cli.model import find_model
from cli.output import CommandError
from cli.prefix import turns
from cli.registry import Answer, Source, Task
from llama.load import info
from prompts_store.aliases import ANY_REVISION
from prompts_store.errors import StoreLocked
from prompts_store.file import Limits, read_prompt
from prompts_store.peft import read_peft
from prompts_store.prompt import Bos
from prompts_store.records import Page, Scope, Version
from prompts_store.store import PromptStore
from server.golden import GoldenTests
from server.schemas.registry import show_alias, show_key, show_measurement, show_task, show_version
from server.settings import Settings

PAGE = 1000


def open_store(settings: Settings) -> PromptStore:
    """The store of the settings. Raises CommandError, StoreError."""
    if "://" in settings.store and settings.blobs is None:
        message = "--store is a URL: say where the prompts' bytes lie: --blobs, PROMPTSTITCH_BLOBS"
        raise CommandError(message, usage=True)
    try:
        return PromptStore.open(settings.store, blobs=settings.blobs)
    except StoreLocked as error:
        hint = "`promptstitch prompts pull REF --url URL` gets a prompt from it as a file"
        raise CommandError(f"{error.message}; {hint}") from error
    except SQLAlchemyError as error:
        raise CommandError(f"--store: {str(error).splitlines()[0]}") from error


class LocalRegistry:
    """See `registry.Registry`. Holds an open store, which stays its opener's to close."""

    def __init__(self, store: PromptStore, model: str | None = None) -> None:
        """`model`: the base of prompts that name none, and what all of them are held against."""
        self._store = store
        self._model = model

    def tasks(self, level: str | None, base: str | None) -> list[Answer]:
        return [show_task(item) for item in _all(self._store.versions.tasks, level=level, base=base)]

    def task(self, task: str, level: str | None, base: str | None) -> Task:
        versions = [_shown(item) for item in _all(self._store.versions.list, task, level=level, base=base)]
        aliases = [show_alias(item) for item in _all(self._store.aliases.list, task, level=level, base=base)]
        return Task(versions, aliases)

    def push(self, source: Source, task: str, level: str | None, bos: str | None) -> Answer:
        limits, place = limits_of(self._model), cast(Bos | None, bos)
        if source.config is None:
            file = read_prompt(source.weights, limits, default_base=limits.base, bos=place)
        else:
            config = source.config.read_bytes()
            unrotate = None if self._model is None else turns(find_model(self._model))[1]
            file = read_peft(config, source.weights, limits, default_base=limits.base, bos=place, unrotate=unrotate)
        version, new = self._store.push(file, task, level)
        return {**_shown(version), "base_bound": file.bound, "new": new}

    def content(self, task: str, version: int) -> bytes:
        return self._store.content(task, version)

    def delete(self, task: str, version: int) -> None:
        self._store.delete(task, version)

    def put_alias(self, task: str, alias: str, version: int, gain: bool = False) -> Answer:
        if gain:
            message = "--require-gain asks which weights are served, and a local store serves none: say --url"
            raise CommandError(message, usage=True)
        target = self._store.versions.get(task, version)
        known = _all(self._store.aliases.list, task, base=target.base, level=target.level)
        expected = ANY_REVISION if any(item.name == alias for item in known) else None
        put, new = self._store.aliases.put(task, alias, version, expected=expected)
        return {**show_alias(put), "new": new}

    def delete_alias(self, alias: Answer) -> None:
        self._store.aliases.delete(alias["task"], alias["alias"], base=alias["base"], level=alias["level"])

    def measurements(self, task: str, version: int) -> list[Answer]:
        return [show_measurement(item) for item in _all(self._store.measurements.list, task, version)]

    def create_key(self, name: str, scopes: Sequence[str]) -> Answer:
        key, secret = self._store.keys.create(name, cast(Sequence[Scope], scopes))
        return {**show_key(key), "secret": secret}

    def keys(self) -> list[Answer]:
        return [show_key(item) for item in _all(self._store.keys.list)]

    def revoke_key(self, key_id: str) -> None:
        self._store.keys.revoke(key_id)

    def served_level(self) -> None:
        return None


def limits_of(model: str | None) -> Limits:
    """What this model can serve; nothing but well-formedness where there is none. Raises CommandError, ModelError."""
    if model is None:
        return Limits()
    told = info(find_model(model))
    return Limits(
        base=told.identity.base,
        hidden_size=told.config.hidden_size,
        num_layers=told.config.num_layers,
        num_kv_heads=told.config.num_kv_heads,
        head_dim=told.config.head_dim,
    )


def _shown(version: Version) -> Answer:
    """Its self-test is not run: there is no engine beside a local store."""
    return show_version(version, GoldenTests().told(version, None))


def _all(page_of: Callable[..., Page[Any]], *args: Any, **query: Any) -> Iterator[Any]:
    """The items of all pages."""
    after = None
    while True:
        page = page_of(*args, limit=PAGE, after=after, **query)
        yield from page.items
        if (after := page.next) is None:
            return
