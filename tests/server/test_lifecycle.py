"""From start to exit: loading, probes, draining, signals, exit codes. Real processes where a process is meant."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.served import serving, stock, until

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS / "support" / "serve_fake.py"
ASK = {"text": "hi", "max_tokens": 50}


@contextmanager
def process(store, *options):
    """A server of its own; `url` comes from its log, before it is ready."""
    command = [sys.executable, str(SCRIPT), str(store), *options]
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    server.log = []
    reader = threading.Thread(target=lambda: server.log.extend(iter(server.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        yield server
    finally:
        server.kill()
        server.wait()
        reader.join()
        server.stdout.close()
        server.stderr.close()


def url_of(server) -> str:
    def found():
        assert server.poll() is None, "".join(server.log)
        return re.search(r"http://[0-9.]+:[0-9]+", "".join(server.log))

    until(lambda: found() is not None, 60)
    return found()[0]


def ready(server) -> httpx.Client:
    assert server.stdout.readline().startswith("ready http://127.0.0.1:")
    return httpx.Client(base_url=url_of(server), timeout=30)


def test_probes_while_the_model_is_loaded(tmp_path):
    gate = threading.Event()

    def factory(settings):
        assert gate.wait(10)
        return FakeEngine()

    with serving(tmp_path, engine_factory=factory, wait=False) as served:
        client = served.client
        assert client.get("/livez").json() == {"status": "live"}
        for probe in ("/readyz", "/startupz", "/health"):
            assert (client.get(probe).status_code, client.get(probe).json()) == (503, {"status": "loading"})
        for method, path, body in (
            ("POST", "/v1/generate", ASK),
            ("POST", "/v1/completions", {"model": "tiny", "prompt": "a"}),
            ("GET", "/v1/models", None),
        ):
            refused = client.request(method, path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_loading")
            assert refused.headers["retry-after"] == "5"
        assert client.get("/v1/prompts").status_code == 200  # the registry needs no model
        assert client.get("/metrics").status_code == 200
        gate.set()
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/health").json() == {"status": "ready"}
        assert client.get("/startupz").json() == {"status": "started"}


def test_ready_only_after_a_first_token(tmp_path):
    engine = FakeEngine()
    engine.held.set()
    with serving(tmp_path, engine=engine, wait=False) as served:
        until(lambda: [request.request_id for request in engine.submitted] == ["warm-up"])
        assert served.client.get("/readyz").status_code == 503
        engine.held.clear()
        until(lambda: served.client.get("/readyz").status_code == 200)


def test_a_loop_that_stands_still_is_not_live(tmp_path):
    with serving(tmp_path, liveness_timeout=0.3) as served:
        assert served.client.get("/livez").status_code == 200
        served.engine.wedged.set()
        until(lambda: served.client.get("/livez").status_code == 503)
        assert served.client.get("/livez").json() == {"status": "stalled"}
        served.engine.wedged.clear()
        until(lambda: served.client.get("/livez").status_code == 200)


def test_an_engine_that_does_not_answer_is_not_live(tmp_path, monkeypatch):
    """Asking it must not hang the probe, nor the server."""
    monkeypatch.setattr("server.host.STATS_SECONDS", 0.2)
    with serving(tmp_path) as served:
        gate = threading.Event()
        monkeypatch.setattr(served.engine, "stats", lambda: gate.wait(20))
        started = time.monotonic()
        assert served.client.get("/livez").status_code == 503
        assert time.monotonic() - started < 2
        gate.set()


def test_a_registry_that_does_not_answer_is_not_ready(tmp_path, monkeypatch):
    from prompts_store.errors import StoreError

    with serving(tmp_path) as served:

        def fail():
            raise StoreError("gone")

        monkeypatch.setattr(served.store, "check", fail)
        assert served.client.get("/readyz").json() == {"status": "registry_unavailable"}
        assert served.client.get("/livez").status_code == 200


def test_sigterm_drains(tmp_path):
    """Not ready, closed to new requests, what is under way is answered whole, exit 0."""
    with process(tmp_path, "step=0.02") as server, ready(server) as client:
        answers, stream = [], []

        def listen():
            with httpx.stream(
                "POST", f"{client.base_url}/v1/generate", json={**ASK, "stream": True}, timeout=30
            ) as got:
                stream.extend(got.iter_lines())

        threads = [threading.Thread(target=lambda: answers.append(client.post("/v1/generate", json=ASK)))]
        threads.append(threading.Thread(target=listen))
        for thread in threads:
            thread.start()
        until(lambda: stream)
        server.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/readyz").json() == {"status": "draining"}
        refused = client.post("/v1/generate", json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_draining")
        assert client.get("/livez").status_code == 200
        for thread in threads:
            thread.join()
        assert (answers[0].status_code, len(answers[0].json()["text"])) == (200, 50)
        assert [line for line in stream if line][-1] == "data: [DONE]"
        assert "error" not in "".join(stream)
        assert server.wait(10) == 0


def test_what_is_not_done_in_time_is_told_so(tmp_path):
    with process(tmp_path, "step=0.2", "drain=0.3") as server, ready(server) as client:
        answers, stream = [], []

        def listen():
            with httpx.stream(
                "POST", f"{client.base_url}/v1/generate", json={**ASK, "stream": True}, timeout=30
            ) as got:
                stream.extend(line for line in got.iter_lines() if line)

        threads = [threading.Thread(target=lambda: answers.append(client.post("/v1/generate", json=ASK)))]
        threads.append(threading.Thread(target=listen))
        for thread in threads:
            thread.start()
        until(lambda: stream)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "server_is_draining")
        *_, error, done = stream
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "server_is_draining"
        assert done == "data: [DONE]"
        assert server.wait(10) == 0


def test_requests_that_had_not_heard_are_still_taken(tmp_path):
    with process(tmp_path, "drain_delay=1.5") as server, ready(server) as client:
        server.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").json() == {"status": "leaving"})
        assert client.post("/v1/generate", json=ASK).status_code == 200
        until(lambda: server.poll() is not None, 10)
        assert server.returncode == 0


def test_the_second_signal_ends_at_once(tmp_path):
    with process(tmp_path, "step=0.5") as server, ready(server) as client:
        asking = threading.Thread(target=lambda: _swallow(client))
        asking.start()
        until(lambda: re.search(r"num_requests_running\{.*\} 1\.0", client.get("/metrics").text))
        server.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        server.wait(10)
        assert time.monotonic() - started < 2.5
        asking.join()


def _swallow(client) -> None:
    with suppress(httpx.HTTPError):
        client.post("/v1/generate", json=ASK)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_while_loading(tmp_path, number):
    with process(tmp_path, "load=60") as server:
        url = url_of(server)
        assert httpx.get(url + "/readyz").json() == {"status": "loading"}
        server.send_signal(number)
        assert server.wait(10) == 0


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path):
    with process(tmp_path, "broken=1") as server:
        assert server.wait(30) == 1
        until(lambda: "no such checkpoint" in "".join(server.log))


def test_a_port_that_is_taken(tmp_path):
    with process(tmp_path / "a") as first:
        port = url_of(first).rpartition(":")[2]
        with process(tmp_path / "b", f"port={port}") as second:
            assert second.wait(30) == 1
            until(lambda: "address already in use" in "".join(second.log).lower())
            until(lambda: f"port: cannot listen on 127.0.0.1:{port}" in "".join(second.log))


def test_an_open_host_without_a_key_is_refused(tmp_path):
    with process(tmp_path, "host=0.0.0.0") as server:
        assert server.wait(30) == 2
        until(lambda: "no API key exists" in "".join(server.log))


def test_a_restart_finds_everything(tmp_path):
    with serving(tmp_path, prepare=stock):
        pass
    with serving(tmp_path) as served:
        told = served.client.post("/v1/generate", json={**ASK, "prompt": "haiku:best"}).json()
        assert told["prompt"]["version"] == 1
