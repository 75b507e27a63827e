"""Bytes by digest: durable in the right order, verified at every read, swept at start, held by one process."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from prompts_store.blobs import LocalBlobs
from prompts_store.errors import CorruptBlob, StorageFull, StoreLocked


@pytest.fixture
def blobs(tmp_path):
    held = LocalBlobs(tmp_path)
    yield held
    held.close()


def path_of(root, digest: str):
    return root / "sha256" / digest[7:9] / digest[7:]


def test_a_blob_is_named_by_its_bytes(blobs, tmp_path):
    digest = blobs.put(b"hello")
    assert digest == "sha256:" + hashlib.sha256(b"hello").hexdigest()
    assert blobs.get(digest) == b"hello" == path_of(tmp_path, digest).read_bytes()
    assert blobs.put(b"hello") == digest
    blobs.remove(digest)
    blobs.remove(digest)
    with pytest.raises(CorruptBlob, match="missing"):
        blobs.get(digest)


def test_bytes_and_directory_are_synced_before_put_returns(blobs, tmp_path, monkeypatch):
    """The order that survives a power cut: file synced, renamed, directory synced."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    folder = path_of(tmp_path, blobs.put(b"x")).parent
    assert done[0] == str(folder.parent)  # it had to be made
    assert os.path.dirname(done[1]) == str(folder)
    assert os.path.basename(done[1]).startswith("tmp-")
    assert done[2:] == ["rename", str(folder)]


@pytest.mark.parametrize("at", range(0, 64 * 8, 7))
def test_any_flipped_bit_is_seen(blobs, tmp_path, at):
    data = bytes(range(64))
    digest = blobs.put(data)
    other = blobs.put(b"other")
    broken = bytearray(data)
    broken[at // 8] ^= 1 << at % 8
    path_of(tmp_path, digest).write_bytes(broken)
    for why in ("damaged", "missing"):
        with pytest.raises(CorruptBlob, match=why):
            blobs.get(digest)
    assert (tmp_path / "quarantine" / digest[7:]).read_bytes() == broken
    assert blobs.get(other) == b"other"
    blobs.put(data)
    assert blobs.get(digest) == data


def test_sweep_leaves_just_what_is_needed(blobs, tmp_path):
    keep, orphan = blobs.put(b"keep"), blobs.put(b"orphan")
    (path_of(tmp_path, keep).parent / "tmp-abc").write_bytes(b"half")
    assert blobs.sweep({keep}) == 2
    assert blobs.get(keep) == b"keep"
    assert not path_of(tmp_path, orphan).exists()
    assert blobs.sweep({keep}) == 0


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_failing_disk_leaves_nothing(blobs, tmp_path, monkeypatch, error):
    def fail(_fd):
        raise OSError(error, os.strerror(error))

    before = blobs.put(b"before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageFull):
        blobs.put(b"after")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "sha256").glob("*/*")] == [before[7:]]
    assert blobs.get(blobs.put(b"after")) == b"after"


def test_another_error_is_not_called_a_full_disk(blobs, monkeypatch):
    def fail(_fd):
        raise OSError(errno.EBADF, "bad")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="bad") as raised:
        blobs.put(b"x")
    assert not isinstance(raised.value, StorageFull)


@pytest.mark.parametrize("digest", ["", "x", "sha256:../../etc/passwd", "sha256:" + "A" * 64, "../" * 22 + "a"])
def test_only_digests_reach_a_path(blobs, digest):
    with pytest.raises(ValueError, match="no digest"):
        blobs.get(digest)


def test_one_holder_at_a_time(blobs, tmp_path):
    with pytest.raises(StoreLocked, match="another process holds the store"):
        LocalBlobs(tmp_path)
    other = f"from pathlib import Path; from prompts_store.blobs import LocalBlobs; LocalBlobs(Path({str(tmp_path)!r}))"
    answer = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
    assert "StoreLocked" in answer.stderr
    blobs.close()
    LocalBlobs(tmp_path).close()
