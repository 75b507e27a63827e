"""A prompt file is written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from prompts_store.file import PromptFile, write_prompt, write_whole


def test_a_file_that_does_not_fit_leaves_the_one_that_is_there(rows, tmp_path, monkeypatch):
    place = tmp_path / "p.safetensors"
    write_prompt(place, PromptFile(rows()))
    before = place.read_bytes()

    def full(self, data):
        self.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: .*p\.safetensors"):
        write_prompt(place, PromptFile(rows()))
    assert place.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_link_goes_on_and_what_is_no_file_is_written_to(tmp_path):
    """A rename would put a plain file in the place of a pipe, or of /dev/null."""
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"x"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"y")
    assert os.read(reader, 2) == b"y"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
