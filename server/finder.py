"""From the name in a request to the prompt that is stitched: resolution by the registry, values from memory.

Prompts are kept by digest, least recently used ones go first; what is kept was verified when it was read. Knows no
tokens and no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from engine.api import EngineInfo
from prompts_store.prompt import SoftPrompt
from prompts_store.records import Version
from prompts_store.resolution import Query, Resolution, Served
from prompts_store.store import PromptStore, Resolved
from server.registry import Registry

KNOWN_QUERIES = 4096
SHARED_SECONDS = 1.0  # how long another process's change may go unseen, where the store is a shared database


@dataclass(frozen=True, slots=True)
class Stitch:
    """A prompt found: its value, its version, and how it was found."""

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

    def __init__(self, store: PromptStore, registry: Registry, capacity: int) -> None:
        self._store = store
        self._registry = registry
        self._capacity = capacity  # bytes
        self._held = 0
        self._prompts: OrderedDict[str, SoftPrompt] = OrderedDict()
        self._reading: dict[str, asyncio.Task[SoftPrompt]] = {}
        self._resolved: dict[Query, _Known] = {}

    async def resolve(self, query: Query, info: EngineInfo) -> Resolved:
        """The version that answers, without its rows; from memory while nothing has changed. Raises StoreError."""
        known = self._resolved.get(query)
        if known and known.epoch == self._registry.epoch and (self._registry.alone or time.monotonic() < known.until):
            return known.resolved
        epoch = self._registry.epoch  # before asking: a change that comes meanwhile makes this answer an old one
        resolved = await self._registry.read("resolve", self._store.resolve, query, served(info))
        if len(self._resolved) >= KNOWN_QUERIES:
            self._resolved.clear()
        self._resolved[query] = _Known(resolved, epoch, time.monotonic() + SHARED_SECONDS)
        return resolved

    async def find(self, query: Query, info: EngineInfo) -> Stitch | None:
        """The prompt to stitch; None where the policy goes on without. Raises StoreError."""
        resolved = await self.resolve(query, info)
        if resolved.version is None:
            return None
        return Stitch(await self._prompt(resolved.version.digest), resolved.version, resolved.resolution)

    async def _prompt(self, digest: str) -> SoftPrompt:
        if prompt := self._prompts.get(digest):
            self._prompts.move_to_end(digest)
            return prompt
        reading = self._reading.get(digest)
        if reading is None:  # however many ask at once, it is read once
            reading = self._reading[digest] = asyncio.create_task(self._read(digest))
            reading.add_done_callback(lambda task: self._keep(digest, task))
        return await asyncio.shield(reading)

    async def _read(self, digest: str) -> SoftPrompt:
        return await self._registry.read("load", self._store.load, digest)

    def _keep(self, digest: str, reading: asyncio.Task[SoftPrompt]) -> None:
        del self._reading[digest]
        if reading.cancelled() or reading.exception():
            return
        self._prompts[digest] = reading.result()
        self._held += _bytes(reading.result())
        while self._held > self._capacity:
            self._held -= _bytes(self._prompts.popitem(last=False)[1])


def _bytes(prompt: SoftPrompt) -> int:
    return sum(tensor.nbytes for tensor in prompt.tensors.values())
