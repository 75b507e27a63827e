"""Uploads over HTTP to `promptstitch serve`, killed with -9 at random moments: nothing acknowledged is lost or torn.

The model is random and tiny, the process, its store and its wire are the real ones.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch
from support.hub import CONFIG, write_checkpoint

from llama.identity import identify
from llama.manifest import Manifest
from prompts_store.file import PromptFile, Provenance, encode_prompt, read_prompt
from prompts_store.prompt import SoftPrompt

KILLS = 200 if os.environ.get("PROMPTSTITCH_FULL") == "1" else 6
CLIENTS, TASKS = 4, ("one", "two", "three")
ZYGOTE = Path(__file__).parents[1] / "support" / "zygote.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
Version = tuple[str, int, str]  # task, number, digest


class Restarted:
    """One store, and a server over it that is started and killed again and again."""

    def __init__(self, folder: Path) -> None:
        self.store, self.temporary, self.log = folder / "store", folder / "tmp", folder / "log"
        self.temporary.mkdir()
        self.model = write_checkpoint(folder / "model")
        found = identify(self.model)
        Manifest(found.base, found.level, found.weights, "tiny", "test").write(self.model)
        self.base, self.url, self.pid = found.base, "", 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMPTSTITCH_")}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join(str(Path(__file__).parents[levels]) for levels in (2, 1))
        environment |= {"TMPDIR": str(self.temporary), "PYTHONPATH": path}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.zygote = subprocess.Popen([sys.executable, str(ZYGOTE)], env=environment, **pipes)

    def start(self) -> None:
        self.log.write_text("")
        arguments = [str(self.model), "--store", str(self.store), "--port", "0", "--dtype", "float32"]
        self.zygote.stdin.write(json.dumps([str(self.log), *arguments, "--kv-memory", "8MiB"]) + "\n")
        self.zygote.stdin.flush()
        self.pid = int(self.zygote.stdout.readline())

    def ready(self) -> None:
        end = time.monotonic() + 120
        while not (found := re.search(r"^ready +(\S+)", self.log.read_text(), re.MULTILINE)):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)
        self.url = found[1]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert int(self.zygote.stdout.readline()) == -signal.SIGKILL, self.log.read_text()
        self.pid = 0

    def close(self) -> None:
        if self.pid:
            self.kill()
        self.zygote.stdin.close()
        assert self.zygote.wait(30) == 0
        self.zygote.stdout.close()


@pytest.fixture
def server(tmp_path):
    restarted = Restarted(tmp_path)
    yield restarted
    restarted.close()


def rows(base: str, seed: int) -> SoftPrompt:
    """Up to 64 KiB, so that writing takes its time."""
    values = torch.randn(1 + seed * 37 % 500, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(seed))
    return SoftPrompt("rows", base, {"prompt_embeddings": values})


def push(client: httpx.Client, base: str, seed: int) -> Version:
    """One upload: most as a file, some as an adapter, some under an idempotency key."""
    prompt, task = rows(base, seed), TASKS[seed % len(TASKS)]
    content = encode_prompt(PromptFile(prompt, Provenance(level="w4g128")))
    url, headers = f"/v1/prompts/{task}/versions", {"Idempotency-Key": f"upload-{seed}"} if seed % 2 else {}
    if seed % 4 == 0:
        config = json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": prompt.num_virtual_tokens})
        parts = {"adapter_config.json": config.encode(), "adapter_model.safetensors": content}
        files = {name: (name, data, "application/octet-stream") for name, data in parts.items()}
        answer = client.post(url, files=files, headers=headers)
    else:
        answer = client.post(url, content=content, headers={**headers, "Content-Type": "application/octet-stream"})
    assert answer.status_code in (200, 201), answer.text
    told = answer.json()
    assert told["digest"] == prompt.digest
    return told["task"], told["version"], told["digest"]


def uploader(server: Restarted, first: int, acknowledged: list[Version], begun: threading.Event) -> None:
    """Push until nobody answers; every third prompt twice."""
    with contextlib.suppress(httpx.TransportError), httpx.Client(base_url=server.url, timeout=60) as client:
        for number in range(100_000):
            seed = first + number - (number % 3 == 2)
            acknowledged.append(push(client, server.base, seed))
            begun.set()


def listed(client: httpx.Client) -> set[Version]:
    """Every version that the server shows."""
    found: set[Version] = set()
    tasks = client.get("/v1/prompts").json()["data"]
    for task in (item["task"] for item in tasks):
        after = None
        while True:
            page = client.get(
                f"/v1/prompts/{task}", params={"limit": 1000, **({"after": after} if after else {})}
            ).json()
            found |= {(version["task"], version["version"], version["digest"]) for version in page["data"]}
            after = page["next"]
            if after is None:
                break
    return found


def intact(client: httpx.Client, version: Version) -> bool:
    """Whether it downloads, as what it says it is."""
    task, number, digest = version
    answer = client.get(f"/v1/prompts/{task}/versions/{number}/content")
    whole = answer.status_code == 200 and answer.headers["x-prompt-digest"] == digest
    return whole and read_prompt(answer.content).prompt.digest == digest


def look(
    server: Restarted, known: set[Version], verified: set[Version], counts: Counter, sample: random.Random
) -> None:
    """Compare what the restarted server shows with what was acknowledged; everything new is downloaded."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        visible = listed(client)
        counts["lost"] += len(known - visible)
        for task in {task for task, _, _ in visible}:
            numbers = sorted(number for name, number, _ in visible if name == task)
            counts["gaps"] += numbers != list(range(1, len(numbers) + 1))
        again = sample.sample(sorted(verified), min(5, len(verified)))
        counts["torn"] += sum(not intact(client, version) for version in [*(visible - verified), *again])
        blobs = list((server.store / "blobs" / "sha256").glob("*/*"))
        counts["orphans"] += len(blobs) - len({digest for _, _, digest in visible})
        names = [path.name for path in server.temporary.iterdir()]
        counts["temporary"] += sum(not name.startswith("torchinductor") for name in names)  # torch's own folder stays
        swept = re.search(r"^promptstitch:blob_orphans_removed_total (\S+)", client.get("/metrics").text, re.MULTILINE)
        counts["swept"] += int(float(swept[1]))
    verified |= visible


def test_what_was_acknowledged_over_http_survives_kill_9(server, record_property):
    chance, counts = random.Random(7), Counter(lost=0, torn=0, gaps=0, orphans=0, temporary=0)
    known: set[Version] = set()
    verified: set[Version] = set()
    for kill in range(KILLS):
        server.start()
        if kill % 8 == 5:  # one that dies while it starts
            time.sleep(chance.uniform(0.0, 0.5))
            server.kill()
            continue
        server.ready()
        look(server, known, verified, counts, chance)
        told: list[list[Version]] = [[] for _ in range(CLIENTS)]
        begun = threading.Event()
        threads = [
            threading.Thread(target=uploader, args=(server, kill * 100_000 + 10_000 * k, told[k], begun))
            for k in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        if kill % 4:  # else it dies in the very first upload
            assert begun.wait(60)
        time.sleep(chance.uniform(0.0, 0.3))
        server.kill()
        for thread in threads:
            thread.join()
        counts["acknowledged"] += sum(map(len, told))
        known |= {version for one in told for version in one}
    server.start()
    server.ready()
    look(server, known, set(), counts, chance)  # all of them once more
    counts["versions"] = len(known)
    print(f"{KILLS} kills: {dict(counts)}")
    record_property("counts", dict(counts))
    assert counts["acknowledged"] >= KILLS // 2
    assert {name: counts[name] for name in ("lost", "torn", "gaps", "orphans", "temporary")} == {
        "lost": 0, "torn": 0, "gaps": 0, "orphans": 0, "temporary": 0
    }  # fmt: skip
    if KILLS >= 100:
        assert counts["swept"] > 0  # the kills did meet uploads half way
