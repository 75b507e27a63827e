"""The same routes over the real engine with a tiny model: what the fake one is trusted for, once for real."""

import contextlib
import os
import random
import socket
import threading
import time
from collections import Counter

import pytest
import torch
from support import tiny
from support.drive import ask
from support.served import begin, serving, until
from support.uploads import upload

from engine.engine import LocalEngine
from engine.options import EngineOptions
from engine.served import ServedModel
from prompts_store.file import PromptFile, Provenance, encode_prompt
from prompts_store.prompt import SoftPrompt

PROMPT = tiny.rows(17, 64)
LEAVING = 200 if os.environ.get("PROMPTSTITCH_FULL") == "1" else 24
MOMENTS = ("queued", "prefill", "decode")
ASK = {"text": "Once upon a time", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    torch.set_num_threads(1)
    options = EngineOptions(page_size=4, kv_bytes=4 << 20, max_running=32, max_batch_tokens=32, max_virtual_tokens=64)
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


def leave(port: int, seed: int, places: threading.Semaphore) -> None:
    """Ask for something long and hang up: at once, before the first token, in the prefill or in the decode."""
    chance = random.Random(seed)
    moment, stream = MOMENTS[seed % len(MOMENTS)], seed % 2 == 0
    text = "x" * (chance.randrange(1000, 1800) if moment == "prefill" else chance.randrange(1, 60))
    body = {
        "text": text,
        "task": chance.choice(["tale", None]),
        "max_tokens": 200 if moment == "prefill" else 1900,
        "stream": stream,
    }
    waits = {"queued": 0.4, "prefill": 0.5, "decode": 60 if stream else 1.0}[moment]  # few answers come so soon
    with places, contextlib.closing(begin(port, {**body, "temperature": 0, "ignore_eos": True})) as connection:
        connection.settimeout(waits if moment == "decode" and stream else chance.random() * waits)
        with contextlib.suppress(TimeoutError):
            for _ in range(chance.randrange(1, 20)):
                assert connection.recv(512)
        if chance.random() < 0.3:  # a reset, not a goodbye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def metrics(real, name: str) -> float:
    """The sum of a metric over its labels, as monitoring sees it."""
    lines = [line.rsplit(" ", 1) for line in real.client.get("/metrics").text.splitlines() if line[:1] != "#"]
    return sum(float(value) for series, value in lines if series.startswith(f"promptstitch:{name}{{"))


def idle(real) -> bool:
    """Whether nothing waits, runs or holds a page."""
    return not any(
        metrics(real, name) for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
    )


def finished(real) -> float:
    """Requests that came to their end."""
    return metrics(real, "request_success_total")


@pytest.mark.slow
def test_pages_come_back_when_clients_go(real):
    """Whatever phase they were in; who stays gets what they get alone. A prompt's own pages stay, held by nobody."""
    alone = real.client.post("/v1/generate", json={**ASK, "task": "tale"}).json()["text"]
    before, done, got = Counter(real.engine.stats().aborted), finished(real), []
    places = threading.Semaphore(40)
    leaving = [threading.Thread(target=leave, args=(real.port, seed, places)) for seed in range(LEAVING)]

    def stay():
        got.append(real.client.post("/v1/generate", json={**ASK, "task": "tale"}).json()["text"])

    staying = [threading.Thread(target=stay) for _ in range(8)]
    for thread in [*leaving, *staying]:
        thread.start()
    for thread in leaving:
        thread.join()
    gone = time.monotonic()
    for thread in staying:
        thread.join()
    until(lambda: idle(real), max(0.0, gone + 2 - time.monotonic()))
    assert real.engine.stats().pages_used == 0
    assert got == [alone] * 8
    aborted = Counter(real.engine.stats().aborted) - before
    answered = finished(real) - done - 8
    print(f"{LEAVING} hung up: {dict(aborted)}, all back {time.monotonic() - gone:.2f} s after the last")
    # The others were cut off before they came to the engine. It is sure to have those who wait for a first token.
    assert answered >= 0
    assert aborted.total() + answered <= LEAVING
    assert aborted.total() >= LEAVING // 6
    assert {"queued", "decode"} <= set(aborted)  # the prefill of so small a model is quick; see below


@pytest.mark.parametrize("stream", [False, True])
def test_one_hangs_up_in_its_prefill(real, stream):
    """57 steps long, so that one of a few attempts meets it; no attempt finds the pages of another."""
    before = real.engine.stats().aborted.get("prefill", 0)
    for letter in "abcdefghijklmnopqrst":
        text = (letter.upper() if stream else letter) * 1800
        connection = begin(real.port, {"text": text, "max_tokens": 100, "stream": stream, "ignore_eos": True})
        until(lambda: real.engine.stats().running > 0)
        connection.close()
        until(lambda: idle(real), 2)
        if real.engine.stats().aborted.get("prefill", 0) > before:
            return
    raise AssertionError("no attempt met the prefill")


@pytest.mark.parametrize(("times", "status"), [(0.99e4, 201), (1.01e4, 422)])
def test_rows_beyond_all_measure_are_refused(real, times, status):
    """At 10,000 times the largest row of the embedding table, so that no prompt can poison the numbers."""
    table = tiny.reference().get_input_embeddings().weight.detach()
    rows = torch.ones(1, 64) / 8 * float(table.norm(dim=-1).max()) * times
    file = PromptFile(SoftPrompt("rows", tiny.BASE, {"prompt_embeddings": rows}), Provenance(level="dense"))
    answer = upload(real, encode_prompt(file), status)
    if status == 422:
        assert answer.json()["error"]["code"] == "norm_too_large"
        assert "--max-prompt-norm" in answer.json()["error"]["message"]
