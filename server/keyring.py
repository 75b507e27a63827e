"""The store's API keys, as the server asks for them. Knows no routes and no scopes; keeps no secret."""

from __future__ import annotations

import time

from prompts_store.records import ApiKey
from prompts_store.store import PromptStore
from server.registry import Registry

MAX_SECRET = 512
REMEMBERED_SECONDS = 2.0


class KeyRing:
    """Lives on one event loop."""

    def __init__(self, store: PromptStore, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._configured = False
        self._looked = float("-inf")

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
        key = await self._registry.read("key", self._store.keys.lookup, secret)
        return key if key and key.namespace == self._store.namespace else None
