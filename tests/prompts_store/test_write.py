"""A prompt file is written whole or not at all."""

import errno
from pathlib import Path

import pytest

from prompts_store.file import PromptFile, write_prompt


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
