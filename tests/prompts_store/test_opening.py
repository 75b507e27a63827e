"""Restarts, crashes, damage and full disks: what is there afterwards is what was acknowledged."""

import errno
import os
import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import event, text

from prompts_store.errors import CorruptBlob, StorageFull, StoreLocked
from prompts_store.file import PromptFile, Provenance
from prompts_store.store import PromptStore

W = "sha256:" + "77" * 32
ORIGIN = Provenance("elsewhere", "w3g64", W, {"steps": 100, "lr": 0.3}, "2026-11-24T05:22:00Z")


def test_a_restart_finds_everything(rows, tmp_path):
    with PromptStore.open(tmp_path / "store") as store:
        version, _ = store.push(PromptFile(rows(1), ORIGIN), "general")
        alias, _ = store.aliases.put("general", "default", 1)
        _, secret = store.keys.create("ci", ["infer"])
        store.push(PromptFile(rows(2)), "general", "s50")
        store.delete("general", 2)
        entries = store.audit.list().items
    with PromptStore.open(tmp_path / "store") as store:
        assert store.versions.get("general", 1) == version
        assert store.load(version.digest) == rows(1)
        assert store.aliases.list().items == (alias,)
        assert store.keys.lookup(secret).name == "ci"
        assert store.audit.list().items == entries
        assert store.push(PromptFile(rows(3)), "general", "s50")[0].version == 3
        assert store.stats().orphans_removed == 0


def test_what_a_crash_left_is_removed_at_the_next_start(rows, tmp_path, blob_files):
    with PromptStore.open(tmp_path / "store") as store:
        version, _ = store.push(PromptFile(rows(1)), "general", "s50")
        orphan = store._blobs.put(b"written, but its row never was")
        store.idempotency.begin("k", "f")
    with PromptStore.open(tmp_path / "store") as store:
        assert store.stats().orphans_removed == 1
        assert len(blob_files()) == 1
        assert orphan[7:] not in blob_files()
        assert store.load(version.digest) == rows(1)
        assert store.idempotency.begin("k", "f").state == "new"


def test_a_flipped_bit_is_refused_and_an_upload_heals_it(store, rows, tmp_path):
    version, _ = store.push(PromptFile(rows(1)), "general", "s50")
    store.push(PromptFile(rows(2)), "general", "s50")
    [path] = [
        p
        for p in (tmp_path / "store" / "blobs" / "sha256").glob("*/*")
        if rows(1).tensors["prompt_embeddings"].numpy().tobytes() in p.read_bytes()
    ]
    broken = bytearray(path.read_bytes())
    broken[-5] ^= 4
    path.write_bytes(broken)
    for count in (1, 2):
        with pytest.raises(CorruptBlob) as refused:
            store.load(version.digest)
        assert refused.value.digest == version.digest
        assert store.stats().integrity_failures == count
    with pytest.raises(CorruptBlob):
        store.content("general", 1)
    assert store.load(rows(2).digest) == rows(2)
    assert store.push(PromptFile(rows(1)), "general", "s50") == (version, False)
    assert store.load(version.digest) == rows(1)


def test_a_blob_that_holds_another_prompt_is_refused(store, rows):
    for seed in (1, 2):
        store.push(PromptFile(rows(seed)), "general", "s50")
    with store._database.write() as session:
        session.execute(
            text("UPDATE prompts SET blob = (SELECT blob FROM prompts WHERE digest = :d)"), {"d": rows(1).digest}
        )
    assert store.load(rows(1).digest) == rows(1)
    with pytest.raises(CorruptBlob, match=f"are those of {rows(1).digest}"):
        store.load(rows(2).digest)


def test_a_full_disk_stores_nothing_and_recovers(store, rows, monkeypatch, blob_files):
    store.push(PromptFile(rows(1)), "general", "s50")
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda _fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(StorageFull):
        store.push(PromptFile(rows(2)), "general", "s50")
    assert [version.version for version in store.versions.list("general").items] == [1]
    assert store.load(rows(1).digest) == rows(1)
    monkeypatch.setattr(os, "fsync", fsync)
    assert store.push(PromptFile(rows(2)), "general", "s50")[0].version == 2
    assert len(blob_files()) == 2


def test_a_full_database_says_so(store, rows):
    store.push(PromptFile(rows(0)), "general", "s50")
    with store._database.read() as session:
        limit = session.execute(text("PRAGMA page_count")).scalar_one() + 8
    store._database.close()  # connections made from now on take the limit
    event.listen(store._database._engine, "connect", lambda c, _r: c.execute(f"PRAGMA max_page_count = {limit}"))
    pushed = 1
    with pytest.raises(StorageFull, match="full"):  # noqa: PT012
        for seed in range(1, 500):
            store.push(PromptFile(rows(seed), Provenance(train={"x": "y" * 4000})), "general", "s50")
            pushed += 1
    assert pushed > 1
    assert [version.version for version in store.versions.list("general").items] == list(range(1, pushed + 1))
    assert store.load(rows(pushed - 1).digest) == rows(pushed - 1)


def test_sqlite_is_set_up_to_keep_what_it_acknowledged(store):
    with store._database.read() as session:
        pragma = {
            p: session.execute(text(f"PRAGMA {p}")).scalar_one()
            for p in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_only_one_opens_it(store, tmp_path):
    with pytest.raises(StoreLocked):
        PromptStore.open(tmp_path / "store")


def test_a_url_needs_a_place_for_blobs(tmp_path, rows):
    with pytest.raises(ValueError, match="blobs"):
        PromptStore.open(f"sqlite:///{tmp_path}/x.db")
    with PromptStore.open(f"sqlite:///{tmp_path}/x.db", blobs=tmp_path / "b") as store:
        store.push(PromptFile(rows(1)), "general", "s50")
    with closing(sqlite3.connect(tmp_path / "x.db")) as database:
        assert database.execute("SELECT count(*) FROM versions").fetchone() == (1,)


def test_a_directory_of_any_name(tmp_path, rows):
    with PromptStore.open(tmp_path / "a ?b#c%20d") as store:
        store.push(PromptFile(rows(1)), "general", "s50")
        store.check()
    assert (tmp_path / "a ?b#c%20d" / "store.db").exists()
