"""Below the routes: heads and bodies that are too large, too slow or half, and what stands in every answer."""

import contextlib
import socket
import threading
import time

import pytest
from support.served import prompt_bytes, serving, until

from prompts_store.store import PromptStore
from server.http import BoundedProtocol

HEAD = b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server of small limits and little patience."""
    with serving(tmp_path_factory.mktemp("store"), max_body=2048, receipt_timeout=0.4) as served:
        yield served


def speak(served, data: bytes, wait: float = 5.0) -> bytes:
    """Send, then read until the server closes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=wait) as connection:
        connection.sendall(data)
        return drain(connection)


def drain(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except (TimeoutError, ConnectionResetError):
        pass
    return received


def test_what_every_answer_carries(served):
    for path in ("/livez", "/v1/models", "/nope", "/metrics"):
        headers = served.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert len(headers["x-request-id"]) == 32
        assert "server" not in headers


def test_a_body_at_the_cap_and_beyond(strict):
    def post(size):
        body = b'{"text": "a", "max_tokens": 1}'
        content = body + b" " * (size - len(body))
        return strict.client.post("/v1/generate", content=content, headers={"Content-Type": "application/json"})

    assert post(2048).status_code == 200
    refused = post(2049)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "file_too_large")
    assert post(2048).status_code == 200


def test_a_body_without_end_is_answered_and_cut_off(strict):
    """The client goes on sending; it must see the 413, not a reset that swallows it."""
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        started = time.monotonic()
        answer = b""
        connection.setblocking(False)
        try:
            while time.monotonic() < started + 8:
                try:
                    connection.send(b"400\r\n" + b"x" * 1024 + b"\r\n")
                except BlockingIOError:
                    time.sleep(0.01)
                try:
                    piece = connection.recv(65536)
                    answer += piece
                    if not piece:
                        break
                except BlockingIOError:
                    pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in answer
        assert b'"file_too_large"' in answer
        assert time.monotonic() - started < 6


def test_a_large_body_leaves_a_usable_answer(strict):
    for _ in range(5):
        refused = strict.client.post(
            "/v1/generate", content=b"x" * 5_000_000, headers={"Content-Type": "application/json"}
        )
        assert refused.status_code == 413


@pytest.mark.parametrize("length", [b"-1", b"abc", b"1e3", b"1, 2", b"99999999999999999999999999"])
def test_lengths_that_lie(strict, length):
    answer = speak(strict, HEAD + b"Content-Length: " + length + b"\r\n\r\n{}")
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413")


def test_a_body_shorter_than_it_says_times_out(strict):
    answer = speak(strict, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"request_timeout"' in answer


def test_a_dripping_body_times_out(strict):
    """Each byte in time, the whole never: the deadline is the body's, not the byte's."""
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
        started, answer = time.monotonic(), threading.Event()
        for _ in range(50):
            try:
                connection.sendall(b" ")
            except OSError:
                break
            time.sleep(0.05)
            if time.monotonic() - started > 1 and answer.is_set():
                break
        assert drain(connection).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("begun", [b"", b"GET /livez HTTP/1.1\r\nHost: local"])
def test_a_head_that_does_not_come_is_cut_off(strict, begun):
    started = time.monotonic()
    assert speak(strict, begun) == b""
    assert 0.3 < time.monotonic() - started < 3


def test_a_second_head_on_a_connection_has_its_deadline_too(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"live"}'):
            answer += connection.recv(65536)
        connection.sendall(b"GET /liv")
        started = time.monotonic()
        assert drain(connection) == b""
        assert time.monotonic() - started < 3


def test_a_request_that_takes_longer_than_its_head_may(strict):
    """The deadline of the head must not cut off the answer."""
    strict.engine.step_seconds = 0.1
    try:
        assert strict.client.post("/v1/generate", json={"text": "hi", "max_tokens": 10}).status_code == 200
    finally:
        strict.engine.step_seconds = 0


STREAM = b'{"text": "hi", "max_tokens": 10, "stream": true}'
STREAMED = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(STREAM), STREAM)


@pytest.mark.parametrize("more", [b"\r\n", b"GET /livez HT"])
def test_what_follows_a_request_does_not_cut_its_answer_off(strict, more):
    """The next head's deadline began with its first byte, whatever was still being answered."""
    strict.engine.step_seconds = 0.1
    try:
        with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
            connection.sendall(STREAMED)
            time.sleep(0.1)
            connection.sendall(more)
            answer = b""
            while not answer.endswith(b"0\r\n\r\n") and (piece := connection.recv(65536)):
                answer += piece
        assert answer.count(b"[DONE]") == 1
    finally:
        strict.engine.step_seconds = 0


def test_a_head_behind_an_answer_under_way_is_bounded(strict):
    strict.engine.step_seconds = 0.1
    try:
        with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
            connection.sendall(STREAMED)
            started, sent = time.monotonic(), 0
            with contextlib.suppress(OSError):
                while sent < 64_000_000 and time.monotonic() < started + 5:
                    sent += connection.send(b"GET / HTTP/1.1\r\nX: " if sent == 0 else b"a" * 1024)
        assert sent < 64_000_000
    finally:
        strict.engine.step_seconds = 0


def test_slow_clients_are_many_and_do_not_matter(strict):
    """A hundred that never finish their head; a live request is answered as ever."""
    idle = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(100)]
    for connection in idle:
        connection.sendall(b"POST /v1/generate HTTP/1.1\r\nX: ")
    assert strict.client.get("/livez").elapsed.total_seconds() < 0.5
    until(lambda: len(strict.server.server_state.connections) < 10)
    for connection in idle:
        connection.close()


@pytest.mark.parametrize("head", [b"X: " + b"a" * 100_000, b"".join(b"X%d: a\r\n" % k for k in range(20_000))])
def test_heads_are_bounded(strict, head):
    answer = speak(strict, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + head + b"\r\n\r\n")
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")
    assert strict.client.get("/livez").status_code == 200


def test_a_head_that_comes_at_once_is_bounded_too(served):
    """The protocol counts only what it waits for: a head of 100 KB in one piece got through."""
    refused = served.client.get("/livez", headers={"X": "a" * 40_000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (431, "headers_too_large")


def test_a_body_where_none_belongs(strict):
    """A GET with a body is answered, and the connection is not confused by what follows."""
    answer = speak(
        strict,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    assert answer.count(b"HTTP/1.1 200") in (1, 2)
    assert b"HTTP/1.1 4" not in answer


def test_errors_that_nobody_foresaw(served, monkeypatch):
    """A bug is a 500 in the envelope, with an id that the log has, and nothing of the bug itself."""

    def bug(*_, **__):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(type(served.store.versions), "tasks", bug)
    answer = served.client.get("/v1/prompts")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_who_takes_nothing_of_an_answer_is_cut_off(tmp_path, monkeypatch):
    """Downloads that nobody read were held in memory, and their sockets open, until the client went."""
    monkeypatch.setattr(BoundedProtocol, "stall_seconds", 0.3)
    large = bytes(range(256)) * 100_000
    monkeypatch.setattr(PromptStore, "content", lambda *_: large)
    with serving(tmp_path) as served:
        assert served.client.post("/v1/prompts/large/versions", content=prompt_bytes()).status_code == 201
        path = "/v1/prompts/large/versions/1/content"
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            until(lambda: len(served.server.server_state.connections) > 1)
            until(lambda: len(served.server.server_state.connections) == 1, 10)  # the other client's
        slow = bytearray()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            began = time.monotonic()
            while chunk := connection.recv(1 << 16):
                slow += chunk
                time.sleep(0.003)
        assert time.monotonic() - began > 1  # longer than anyone may take nothing
        assert slow.endswith(large[-4096:])


def test_more_texts_than_may_wait_are_refused_for_good(tmp_path):
    """On an idle server it was told to try again in a second, again and again."""
    with serving(tmp_path, max_queue=3) as small:
        answer = small.client.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 4})
        assert answer.status_code == 400
        assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("too_many_texts", "/prompt")
        assert small.client.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 3}).status_code == 200
