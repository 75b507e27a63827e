"""Keys are remembered for a second, by a hash, and never beyond a revocation."""

import pytest

from prompts_store.store import PromptStore
from server import keyring
from server.keyring import KeyRing
from server.metrics import Metrics
from server.registry import Registry


class Counting:
    """The registry, and how often the database was asked for a key."""

    def __init__(self):
        self.registry = Registry(Metrics(), "directory")
        self.looks = 0
        read = self.registry.read

        async def counted(op, *args, **kwargs):
            self.looks += op == "key"
            return await read(op, *args, **kwargs)

        self.registry.read = counted


@pytest.fixture
def clock(monkeypatch):
    """clock.now is the time."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(keyring, "time", made := Clock())
    return made


@pytest.fixture
def ring(tmp_path):
    with PromptStore.open(tmp_path) as store:
        counting = Counting()
        ring = KeyRing(store, counting.registry)
        ring.store, ring.counting = store, counting
        yield ring


async def test_a_busy_client_costs_one_look_a_second(ring, clock):
    key, secret = ring.store.keys.create("app", ["infer"])
    for _ in range(100):
        assert (await ring.lookup(secret)).id == key.id
    assert ring.counting.looks == 1
    clock.now = 1.0
    assert (await ring.lookup(secret)).id == key.id
    assert ring.counting.looks == 2


async def test_a_revocation_here_counts_at_once(ring, clock):
    key, secret = ring.store.keys.create("app", ["infer"])
    assert await ring.lookup(secret)
    await ring.counting.registry.change("revoke_key", None, ring.store.keys.revoke, key.id)
    assert await ring.lookup(secret) is None


async def test_a_revocation_elsewhere_counts_within_a_second(ring, clock):
    key, secret = ring.store.keys.create("app", ["infer"])
    assert await ring.lookup(secret)
    ring.store.keys.revoke(key.id)  # past our registry, as another process does
    clock.now = 0.999
    assert await ring.lookup(secret)
    clock.now = 1.0
    assert await ring.lookup(secret) is None


async def test_a_revocation_during_the_look_counts(ring, clock):
    """What was read before a change must not be remembered beyond it."""
    key, secret = ring.store.keys.create("app", ["infer"])
    counting, read = ring.counting.registry, ring.counting.registry.read

    async def slowly(op, function, *args, **kwargs):
        found = await read(op, function, *args, **kwargs)
        if op == "key":
            await counting.change("revoke_key", None, lambda: None)  # somebody revoked it in between
        return found

    counting.read = slowly
    assert await ring.lookup(secret)
    ring.store.keys.revoke(key.id)
    assert await ring.lookup(secret) is None


async def test_what_is_kept_is_no_secret_and_bounded(ring, clock, monkeypatch):
    monkeypatch.setattr(keyring, "KNOWN_KEYS", 3)
    secrets = [ring.store.keys.create(f"k{i}", ["infer"])[1] for i in range(8)]
    for secret in secrets:
        assert await ring.lookup(secret)
        assert len(ring._known) <= 3
    for i in range(50):
        assert await ring.lookup(f"ps_{i}") is None
    assert len(ring._known) <= 3
    assert not [secret for secret in secrets if secret in repr(ring._known)]
