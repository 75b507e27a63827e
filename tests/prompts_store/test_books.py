"""API keys and idempotent requests."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prompts_store.errors import BadKey, NotFound
from prompts_store.records import SCOPES
from prompts_store.store import PromptStore


def test_a_key_is_known_by_its_secret_alone(store):
    key, secret = store.keys.create("ci", ["infer", "prompts:read"])
    assert secret.startswith("ps_")
    assert len(secret) >= 3 + 43
    assert store.keys.lookup(secret) == key
    assert (key.name, key.scopes, key.namespace, key.revoked_at) == ("ci", {"infer", "prompts:read"}, "default", None)
    for wrong in (
        "",
        "ps_",
        secret[:-1],
        secret + "x",
        secret.lower(),
        key.id,
        secret.swapcase(),
        "\ud800",
        "' OR 1=1 --",
    ):
        assert store.keys.lookup(wrong) is None
    assert store.keys.list().items == (key,)


def test_a_dump_of_the_store_holds_no_secret(tmp_path: Path):
    with PromptStore.open(tmp_path) as store:
        secrets = [store.keys.create(f"key {n}", SCOPES)[1] for n in range(3)]
    dump = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert dump
    assert not [secret for secret in secrets if secret.encode() in dump or secret[3:].encode() in dump]


def test_a_revoked_key_is_nothing(store):
    assert not store.keys.any()
    key, secret = store.keys.create("ci", ["admin"])
    other, _ = store.keys.create("ci", ["infer"])
    assert store.keys.any()
    store.keys.revoke(key.id)
    assert store.keys.lookup(secret) is None
    for wrong in (key.id, "key_0000000000000000"):
        with pytest.raises(NotFound):
            store.keys.revoke(wrong)
    assert [item.revoked_at is None for item in store.keys.list().items] == [False, True]
    store.keys.revoke(other.id)
    assert store.keys.any()  # a server that is started now stays closed


@pytest.mark.parametrize(
    ("name", "scopes", "field"),
    [("x", ["root"], "scopes"), ("x", [], "scopes"), ("", ["infer"], "name"), ("x" * 65, ["infer"], "name"),
     ("a\nb", ["infer"], "name")],
)  # fmt: skip
def test_keys_are_bounded(store, name, scopes, field):
    with pytest.raises(BadKey) as refused:
        store.keys.create(name, scopes)
    assert refused.value.field == field


def test_a_request_sent_twice_gets_one_answer(store):
    requests = store.idempotency
    assert requests.begin("k", "body").state == "new"
    assert requests.begin("k", "body").state == "in_progress"
    assert requests.begin("k", "another body").state == "mismatch"
    assert requests.begin("k2", "body").state == "new"
    requests.complete("k", 201, '{"version": 1}')
    again = requests.begin("k", "body")
    assert (again.state, again.status, again.body) == ("replay", 201, '{"version": 1}')
    assert requests.begin("k", "another body").state == "mismatch"
    requests.forget("k2")
    assert requests.begin("k2", "another body").state == "new"


def test_one_of_many_at_once_is_new(store):
    with ThreadPoolExecutor(8) as pool:
        states = [begun.state for begun in pool.map(lambda _n: store.idempotency.begin("k", "body"), range(24))]
    assert sorted(states) == ["in_progress"] * 23 + ["new"]


def test_answers_are_remembered_for_a_day(tmp_path):
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    with PromptStore.open(tmp_path, clock=lambda: now) as store:
        store.idempotency.begin("k", "body")
        store.idempotency.complete("k", 201, "{}")
        now += timedelta(hours=24)
        assert store.idempotency.begin("k", "body").state == "replay"
        now += timedelta(seconds=1)
        assert store.idempotency.begin("k", "another body").state == "new"


def test_times_are_utc_whatever_the_clock_says(tmp_path):
    zone = datetime.fromisoformat("2026-11-24T05:22:00.5+05:30")
    with PromptStore.open(tmp_path, clock=lambda: zone) as store:
        assert store.keys.create("x", ["infer"])[0].created_at == "2026-11-23T23:52:00.500000Z"
