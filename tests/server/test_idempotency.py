"""Idempotency-Key: a request that is sent twice is done once."""

import threading

import pytest
from support.fake_engine import LEVEL
from support.served import prompt_bytes
from support.uploads import RAW, refused, upload


def test_sent_twice_done_once(fresh):
    key = {"Idempotency-Key": "retry-1"}
    first = upload(fresh, prompt_bytes(20), headers=key)
    again = upload(fresh, prompt_bytes(20), headers=key)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert fresh.client.get("/v1/prompts/new").json()["data"][-1]["version"] == 1


def test_a_key_belongs_to_one_request(fresh):
    key = {"Idempotency-Key": "retry-2"}
    upload(fresh, prompt_bytes(20), headers=key)
    assert refused(fresh, prompt_bytes(21), headers=key) == "idempotency_key_reused"
    assert refused(fresh, prompt_bytes(20), headers=key, level=LEVEL) == "idempotency_key_reused"
    upload(fresh, prompt_bytes(21), headers=key, task="another")


def test_a_failure_is_not_remembered(fresh):
    key = {"Idempotency-Key": "retry-3"}
    assert refused(fresh, b"bad", headers=key) == "truncated"
    upload(fresh, prompt_bytes(20), headers=key)


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ü".encode("latin-1")])
def test_keys_that_are_none(served, key):
    assert refused(served, prompt_bytes(1), 400, headers={"Idempotency-Key": key}) == "invalid_value"


def test_both_at_once(fresh, monkeypatch):
    """The second is told to try again, and then gets the first one's answer."""
    going, go = threading.Event(), threading.Event()
    push = fresh.store.push

    def slow(*args, **kwargs):
        going.set()
        assert go.wait(10)
        return push(*args, **kwargs)

    monkeypatch.setattr(fresh.store, "push", slow)
    key = {"Idempotency-Key": "retry-4"}
    answers = []
    first = threading.Thread(target=lambda: answers.append(upload(fresh, prompt_bytes(22), headers=key)))
    first.start()
    assert going.wait(10)
    second = upload(fresh, prompt_bytes(22), 409, headers=key)
    assert second.json()["error"]["code"] == "idempotency_in_progress"
    assert (second.headers["x-should-retry"], second.headers["retry-after"]) == ("true", "1")
    go.set()
    first.join()
    assert upload(fresh, prompt_bytes(22), headers=key).json() == answers[0].json()


def test_many_retries_at_once_make_one_version_each(fresh):
    """Doubled posts of ten prompts from eight threads: ten versions."""

    def post(seed):
        headers = {**RAW, "Idempotency-Key": f"k{seed}"}
        while (
            fresh.client.post("/v1/prompts/many/versions", content=prompt_bytes(seed), headers=headers).status_code
            == 409
        ):
            pass

    threads = [threading.Thread(target=post, args=(100 + k % 10,)) for k in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [version["version"] for version in fresh.client.get("/v1/prompts/many").json()["data"]]
    assert numbers == list(range(1, 11))
