"""The same routes over the real engine with a tiny model: what the fake one is trusted for, once for real."""

import threading
import time

import pytest
import torch
from support import tiny
from support.drive import ask
from support.served import begin, serving, until

from engine.engine import LocalEngine, ServedModel
from engine.options import EngineOptions
from prompts_store.file import PromptFile, Provenance

PROMPT = tiny.rows(17, 64)
ASK = {"text": "Once upon a time", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    torch.set_num_threads(1)
    options = EngineOptions(page_size=4, kv_bytes=1 << 20, max_batch_tokens=32, max_virtual_tokens=64)
    model = ServedModel("tiny", tiny.BASE, "dense", "sha256:" + "c" * 64, 0)
    engine = LocalEngine(tiny.ours(tiny.reference()), tiny.ByteTokenizer(), model, options)

    def prepare(store):
        store.push(PromptFile(PROMPT, Provenance(level="dense")), "tale")

    with serving(tmp_path_factory.mktemp("store"), engine_factory=lambda _: engine, prepare=prepare) as served:
        served.engine = engine
        yield served


@pytest.mark.parametrize("task", [None, "tale"])
def test_text_over_http_is_the_engines_own(real, task):
    body = ASK | ({"task": task} if task else {})
    prompt = PROMPT if task else None
    direct = ask(real.engine, list(ASK["text"].encode()), prompt=prompt, temperature=0, max_tokens=12).wait().text[0]
    whole = real.client.post("/v1/generate", json=body).json()
    assert whole["text"] == direct
    assert whole["usage"]["soft_tokens"] == (17 if task else 0)
    lines = real.client.post("/v1/generate", json={**body, "stream": True}).text
    assert lines.count("data: ") > 3


def test_thirty_two_at_once(real):
    """With a prompt and without, streamed and whole, all in one batch: each gets the text that it gets alone."""
    alone = {
        task: real.client.post("/v1/generate", json={**ASK, "task": task}).json()["text"] for task in ("tale", None)
    }
    got = []

    def one(k):
        task = "tale" if k % 2 else None
        got.append((task, real.client.post("/v1/generate", json={**ASK, "task": task}).json()["text"]))

    threads = [threading.Thread(target=one, args=(k,)) for k in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 32
    assert all(text == alone[task] for task, text in got)


def test_pages_come_back_when_clients_go(real):
    """Whatever phase they were in. The prefix pages of the prompt stay, held by nobody."""
    connections = []
    for k in range(20):
        body = {"text": "x" * 100, "task": "tale", "max_tokens": 150, "stream": bool(k % 2), "ignore_eos": True}
        connections.append(begin(real.port, body))
    until(lambda: real.engine.stats().running > 0)
    time.sleep(0.2)
    for connection in connections:
        connection.close()
    until(lambda: real.engine.stats().running == real.engine.stats().waiting == 0, 2)
    assert real.engine.stats().pages_used == 0
    assert sum(real.engine.stats().aborted.values()) > 0
