"""Clients that hang up: the engine is told within two seconds, whatever the request was doing."""

import os
import random
import socket
import threading

import pytest
from support.fake_engine import FakeEngine
from support.served import JSON, begin, serving, stock, until

FULL = os.environ.get("PROMPTSTITCH_FULL") == "1"
ROUNDS = 200 if FULL else 20


def idle(served) -> bool:
    stats = served.engine.stats()
    return stats.waiting == 0 and stats.running == 0 and served.server.config.app.state.host.running == 0


@pytest.fixture
def slow(tmp_path):
    with serving(tmp_path, prepare=stock) as served:
        served.engine.step_seconds = 0.02
        yield served


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "running"])
def test_one_client_hangs_up(slow, stream, phase):
    if phase == "queued":
        slow.engine.held.set()
    connection = begin(slow.port, {"text": "hi", "task": "haiku", "stream": stream})
    until(lambda: slow.engine.stats().waiting + slow.engine.stats().running == 1)
    until(lambda: phase == "queued" or slow.engine.stats().running == 1)
    connection.close()
    until(lambda: idle(slow), 2)
    assert sum(slow.engine.stats().aborted.values()) == 1
    assert slow.client.get("/readyz").status_code == 200


@pytest.mark.parametrize("texts", [1, 5])
def test_all_texts_of_a_request_go(slow, texts):
    slow.engine.held.set()
    body = {"model": "haiku", "prompt": ["a"] * texts, "n": 2}
    connection = begin(slow.port, body, "/v1/completions")
    until(lambda: slow.engine.stats().waiting == texts)
    connection.close()
    until(lambda: idle(slow), 2)
    assert slow.engine.stats().aborted == {"queued": texts}


def test_many_hang_up_at_random_moments(slow):
    """Others are served meanwhile, and in the end every place is free."""
    chance = random.Random(7)
    path = {True: "/v1/chat/completions", False: "/v1/completions"}

    def one(seed):
        mine = random.Random(seed)
        chat = mine.random() < 0.5
        body = {"model": mine.choice(["tiny", "haiku"]), "stream": mine.random() < 0.5, "max_tokens": 100}
        body |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
        connection = begin(slow.port, body, path[chat])
        connection.settimeout(mine.random() * 0.3)
        try:
            while connection.recv(4096):
                pass
        except TimeoutError:
            pass
        if mine.random() < 0.3:  # a reset, not a goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()

    threads = [threading.Thread(target=one, args=(chance.random(),)) for _ in range(ROUNDS)]
    for thread in threads:
        thread.start()
    assert slow.client.post("/v1/generate", json={"text": "hi", "max_tokens": 3}).status_code == 200
    for thread in threads:
        thread.join()
    until(lambda: idle(slow), 2)


def test_half_a_body_and_gone(slow):
    connection = socket.create_connection(("127.0.0.1", slow.port))
    head = f"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: 99\r\n\r\n"
    connection.sendall(head.encode() + b"{")
    connection.close()
    gone = 'http_requests_total{handler="/v1/generate",method="POST",status="4xx"} 1.0'  # 499
    until(lambda: gone in slow.client.get("/metrics").text, 2)
    assert slow.client.post("/v1/generate", json={"text": "hi", "max_tokens": 1}).status_code == 200


def test_an_overload_is_refused_fast_and_leaves_nothing(tmp_path):
    with serving(tmp_path, engine=FakeEngine(max_waiting=3)) as served:
        served.engine.held.set()
        body = {"model": "tiny", "prompt": ["a", "b", "c", "d"]}
        refused = served.client.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
        assert refused.headers["retry-after"] == "2"
        assert "x-should-retry" not in refused.headers
        assert refused.elapsed.total_seconds() < 0.5
        assert idle(served)  # the three that had a place gave it back
        metrics = served.client.get("/metrics").text
        assert 'promptstitch:requests_rejected_total{reason="queue_full"} 1.0' in metrics
