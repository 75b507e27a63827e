"""The store's API keys, as the server asks for them. Knows no routes and no scopes; keeps no secret.

A key that was found is remembered by the hash of its secret, for a second and until something changes here: a busy
client costs one look into the database a second, and a key that another process revokes is worthless within one.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from prompts_store.records import ApiKey
from prompts_store.store import PromptStore
from server.registry import Registry

MAX_SECRET = 512
REMEMBERED_SECONDS = 2.0  # that there is no key at all
KNOWN_SECONDS = 1.0  # that this key lives
KNOWN_KEYS = 1024


@dataclass(frozen=True, slots=True)
class _Known:
    """A live key, and how long that holds: its epoch, and a moment."""

    key: ApiKey
    epoch: int
    until: float


class KeyRing:
    """Lives on one event loop."""

    def __init__(self, store: PromptStore, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._configured = False
        self._looked = float("-inf")
        self._known: dict[bytes, _Known] = {}

    async def configured(self) -> bool:
        """Whether there is a key, or ever was while we run: revoking the last one must not open the doors.

        A "no" is remembered for a moment, since another process may make the first.
        """
        if not self._configured and time.monotonic() - self._looked > REMEMBERED_SECONDS:
            self._configured = await self._registry.read("any_key", self._store.keys.any)
            self._looked = time.monotonic()
        return self._configured

    def created(self) -> None:
        """A key was made here."""
        self._configured = True

    async def lookup(self, secret: str) -> ApiKey | None:
        """The live key of this secret in the served namespace."""
        if not secret or len(secret) > MAX_SECRET or "\0" in secret:
            return None
        name = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(name)
        if known and known.epoch == self._registry.epoch(None) and time.monotonic() < known.until:
            return known.key
        epoch, asked = self._registry.epoch(None), time.monotonic()  # before asking: a revocation may come meanwhile
        key = await self._registry.read("key", self._store.keys.lookup, secret)
        if key is None or key.namespace != self._store.namespace:
            self._known.pop(name, None)
            return None  # not remembered: whoever guesses would fill the memory
        if len(self._known) >= KNOWN_KEYS:
            self._known.clear()
        self._known[name] = _Known(key, epoch, asked + KNOWN_SECONDS)
        return key
