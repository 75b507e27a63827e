"""Many who write at once: dense numbers, one winner, no bytes lost."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prompts_store.blobs import LocalBlobs
from prompts_store.errors import Gone, PreconditionFailed
from prompts_store.file import PromptFile


def test_many_threads_get_dense_numbers(store, rows):
    """16 threads, 96 prompts of which a third is pushed three times: every number once, no lock shown to anybody."""
    seeds = [*range(96), *range(0, 96, 3), *range(0, 96, 3)]
    jobs = [(seed, f"task-{seed % 3}") for seed in seeds]
    barrier = threading.Barrier(16)

    def work(index: int) -> list[tuple[str, int, bool]]:
        barrier.wait()
        done = []
        for seed, task in jobs[index::16]:
            version, created = store.push(PromptFile(rows(seed)), task, "s50")
            assert store.load(version.digest) == rows(seed)
            done.append((task, version.version, created))
        return done

    with ThreadPoolExecutor(16) as pool:
        made = [item for items in pool.map(work, range(16)) for item in items]
    for task in ("task-0", "task-1", "task-2"):
        assert sorted(number for name, number, created in made if name == task and created) == list(range(1, 33))
        assert [version.version for version in store.versions.list(task).items] == list(range(1, 33))
    assert len(made) == len(jobs)


def test_two_who_move_an_alias_at_once(store, rows):
    for seed in range(9):
        store.push(PromptFile(rows(seed)), "general", "s50")
    alias, _ = store.aliases.put("general", "default", 1)
    barrier = threading.Barrier(8)

    def move(version: int) -> bool:
        barrier.wait()
        try:
            store.aliases.put("general", "default", version, expected=alias.revision)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(move, range(2, 10))) == 1


def test_pushes_and_deletes_at_once_lose_no_bytes(store, rows, blob_files):
    """One prompt under two tasks, deleted and pushed against each other: a live version's bytes are always there."""

    def churn(task: str) -> None:
        for _ in range(15):
            version, _ = store.push(PromptFile(rows(1)), task, "s50")
            assert store.load(version.digest) == rows(1)
            store.delete(task, version.version)
        store.push(PromptFile(rows(1)), task, "s50")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, ["a", "b", "c", "d"]))
    assert store.load(rows(1).digest) == rows(1)
    assert len(blob_files()) == 1
    assert [task.latest for task in store.versions.tasks().items] == [16] * 4


def test_a_delete_between_finding_and_reading_is_no_damage(store, rows, monkeypatch):
    """It was told as stored bytes that are missing, and counted as a failure of integrity."""
    version, _ = store.push(PromptFile(rows(1)), "haiku", "w4g64")
    get = LocalBlobs.get

    def late(self, digest):
        store.delete("haiku", version.version)
        return get(self, digest)

    monkeypatch.setattr(LocalBlobs, "get", late)
    with pytest.raises(Gone):
        store.load(version.digest)
    assert store.stats().integrity_failures == 0
