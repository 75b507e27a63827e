"""From the name in a request to the prompt that is stitched: resolution by the registry, values from memory.

Prompts are kept by digest, least recently used ones go first; what is kept was verified when it was read, and has
passed the self-test of its version. Knows no tokens and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from engine.api import Engine, EngineInfo
from prompts_store.errors import Gone
from prompts_store.golden import Golden
from prompts_store.prompt import SoftPrompt
from prompts_store.records import Version
from prompts_store.resolution import Query, Resolution, Served
from prompts_store.store import PromptStore, Resolved
from server.golden import GoldenTests
from server.registry import Registry

KNOWN_QUERIES = 4096
SHARED_SECONDS = 1.0  # how long another process's change may go unseen, where the store is a shared database


@dataclass(frozen=True, slots=True)
class Stitch:
    """A prompt found: its value or the first positions of it, its version, and how it was found."""

    prompt: SoftPrompt
    version: Version
    resolution: Resolution

    def told(self, info: EngineInfo) -> dict[str, Any]:
        """The `prompt` field of an answer."""
        told: dict[str, Any] = {
            "task": self.version.task,
            "version": self.version.version,
            "digest": self.version.digest,
            "level": self.version.level,
            "resolution": self.resolution.how,
            "same_weights": self.resolution.same_weights,
            "same_chat_template": self.prompt.chat_template == info.chat_template,
        }
        if self.resolution.measured is not None:
            told["measured"] = self.resolution.measured
        return told


@dataclass(frozen=True, slots=True)
class _Held:
    """What is kept: a prompt whose self-test, `golden` on `weights`, was not in its way; or the `first` of one."""

    digest: str
    weights: str | None = None
    golden: Golden | None = None
    first: int | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """An answer of the registry, and how long it holds: its epoch, and a moment where others change the store, too."""

    resolved: Resolved
    epoch: int
    until: float


def served(info: EngineInfo) -> Served:
    """What runs, as the registry wants to know it."""
    return Served(base=info.base, level=info.level, weights=info.weights)


class PromptFinder:
    """Lives on one event loop."""

    def __init__(self, store: PromptStore, registry: Registry, golden: GoldenTests, capacity: int) -> None:
        self._store = store
        self._registry = registry
        self._golden = golden
        self._capacity = capacity  # bytes
        self._held = 0
        self._prompts: OrderedDict[_Held, SoftPrompt] = OrderedDict()
        self._reading: dict[_Held, asyncio.Task[SoftPrompt]] = {}
        self._resolved: dict[Query, _Known] = {}

    async def resolve(self, query: Query, info: EngineInfo) -> Resolved:
        """The version that answers, without its rows; from memory while nothing has changed. Raises StoreError."""
        known, epoch = self._resolved.get(query), self._registry.epoch(query.reference.task)
        if known and known.epoch == epoch and (self._registry.alone or time.monotonic() < known.until):
            return known.resolved
        # The epoch is of before asking: a change that comes meanwhile makes this answer an old one.
        resolved = await self._registry.read("resolve", self._store.resolve, query, served(info))
        if len(self._resolved) >= KNOWN_QUERIES:
            self._resolved.clear()
        self._resolved[query] = _Known(resolved, epoch, time.monotonic() + SHARED_SECONDS)
        return resolved

    async def find(self, query: Query, engine: Engine) -> Stitch | None:
        """The prompt to stitch; None where the policy goes on without.

        The first time that a version is loaded its self-test is run. Raises StoreError, EngineError, ScoringFailed.
        """
        try:
            return await self._find(query, engine)
        except Gone:  # between finding and reading it; there may be another by now
            self._resolved.pop(query, None)
            return await self._find(query, engine)

    async def _find(self, query: Query, engine: Engine) -> Stitch | None:
        resolved = await self.resolve(query, engine.info)
        if resolved.version is None:
            return None
        return Stitch(await self._prompt(resolved.version, engine), resolved.version, resolved.resolution)

    def shorten(self, stitch: Stitch, n: int) -> Stitch:
        """The same with the first `n` positions alone, whose digest is computed once. Raises ValueError."""
        if n == stitch.prompt.num_virtual_tokens:
            return stitch
        held = _Held(stitch.version.digest, first=n)
        cut = self._recall(held)
        if cut is None:
            cut = stitch.prompt.first(n)
            self._keep(held, cut)
        return replace(stitch, prompt=cut)

    async def _prompt(self, version: Version, engine: Engine) -> SoftPrompt:
        held = _Held(version.digest, version.weights if version.golden else None, version.golden)
        if prompt := self._recall(held):
            return prompt
        reading = self._reading.get(held)
        if reading is None:  # however many ask at once, it is read once
            reading = self._reading[held] = asyncio.create_task(self._read(version, engine))
            reading.add_done_callback(lambda task: self._have_read(held, task))
        return await asyncio.shield(reading)

    async def _read(self, version: Version, engine: Engine) -> SoftPrompt:
        prompt = await self._registry.read("load", self._store.load, version.digest)
        if version.golden is not None:
            await self._registry.wait(partial(self._golden.check, engine, prompt, version))
        return prompt

    def _have_read(self, held: _Held, reading: asyncio.Task[SoftPrompt]) -> None:
        del self._reading[held]
        if not reading.cancelled() and not reading.exception():
            self._keep(held, reading.result())

    def _recall(self, held: _Held) -> SoftPrompt | None:
        if prompt := self._prompts.get(held):
            self._prompts.move_to_end(held)
        return prompt

    def _keep(self, held: _Held, prompt: SoftPrompt) -> None:
        self._prompts[held] = prompt
        self._held += _bytes(prompt)
        while self._held > self._capacity:
            self._held -= _bytes(self._prompts.popitem(last=False)[1])


def _bytes(prompt: SoftPrompt) -> int:
    return sum(tensor.nbytes for tensor in prompt.tensors.values())
