"""Upload, kill -9, open, look: a program that prints as JSON what was lost. `test_kill.py` runs it.

It forks instead of starting programs, so that a round takes milliseconds; it must therefore have no threads of its own.
With `--control` the blobs are written in place, without temporary file and rename: then damage must show, or the test
sees nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import time
from collections import Counter
from pathlib import Path

import torch

from prompts_store import store as registry
from prompts_store.blobs import LocalBlobs
from prompts_store.errors import CorruptBlob, StoreError
from prompts_store.file import PromptFile
from prompts_store.prompt import SoftPrompt

BASE = "sha256:" + "ba" * 32
TASKS = ("one", "two")


class InPlace(LocalBlobs):
    """What a store without the protocol would do, slowly enough for the kill to meet it."""

    def put(self, data: bytes) -> str:
        digest = super().put(data)
        with self._path(digest).open("wb") as stream:
            for start in range(0, len(data), len(data) // 8):
                stream.write(data[start : start + len(data) // 8])
                stream.flush()
                time.sleep(0.01)
        return digest


def prompt(seed: int) -> SoftPrompt:
    rows = torch.randn(1 + seed % 64, 576, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt("rows", BASE, {"prompt_embeddings": rows})


def upload(folder: Path, first: int, acknowledge: int, repeats: int) -> None:
    """Push for ever, each prompt `repeats` times; tell each version once its push has returned."""
    with registry.PromptStore.open(folder) as store:
        for number in range(10_000 * repeats):
            seed = first + number // repeats
            version, _ = store.push(PromptFile(prompt(seed)), TASKS[seed % 2], "s50")
            os.write(acknowledge, json.dumps([version.task, version.version, version.digest]).encode() + b"\n")


def killed_upload(folder: Path, first: int, repeats: int, start: bool, seconds: float) -> list[tuple[str, int, str]]:
    """What one uploader was told before it was killed, `seconds` after its start or else after its first upload."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        upload(folder, first, writing, repeats)
        os._exit(1)
    os.close(writing)
    if not start:
        select.select([reading], [], [], 60)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as stream:
        return [tuple(json.loads(line)) for line in stream]


def look(folder: Path, acknowledged: set[tuple[str, int, str]], counts: Counter[str]) -> None:
    """Open the store as the next process would, and count what is wrong with it."""
    with registry.PromptStore.open(folder) as store:
        counts["orphans"] += store.stats().orphans_removed
        visible = set()
        for task in store.versions.tasks().items:
            after = None
            while True:
                page = store.versions.list(task.task, limit=1000, after=after)
                visible |= {(version.task, version.version, version.digest) for version in page.items}
                after = page.next
                if after is None:
                    break
            numbers = sorted(number for name, number, _ in visible if name == task.task)
            counts["gaps"] += numbers != list(range(1, len(numbers) + 1))
        counts["lost"] += len(acknowledged - visible)
        counts["unacknowledged"] += len(visible - acknowledged)
        for _, _, digest in visible:
            try:
                store.load(digest)
            except CorruptBlob:
                counts["torn"] += 1
            except StoreError:
                counts["unreadable"] += 1
        left = [path.name for path in (folder / "blobs" / "sha256").glob("*/*")]
        counts["leftovers"] += len(left) - len({digest for _, _, digest in visible}) if not counts["torn"] else 0
        acknowledged |= visible


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", action="store_true")
    options = parser.parse_args()
    repeats = 2
    if options.control:
        registry.LocalBlobs, repeats = InPlace, 4
    torch.set_num_threads(1)
    chance, counts = random.Random(options.seed), Counter(lost=0, torn=0, gaps=0, unreadable=0, leftovers=0, orphans=0)
    acknowledged: set[tuple[str, int, str]] = set()
    for round_number in range(options.kills):
        early = round_number % 4 == 0
        told = killed_upload(options.folder, round_number * 10_000, repeats, early, chance.uniform(0.0, 0.3))
        counts["kills"] += 1
        counts["acknowledged"] += len(told)
        acknowledged |= set(told)
        look(options.folder, acknowledged, counts)
    print(json.dumps({**counts, "versions": len(acknowledged)}))


if __name__ == "__main__":
    main()
