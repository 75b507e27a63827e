"""A small dense checkpoint with a tokenizer, and pages of many sites."""

import json
from pathlib import Path

import pytest
from support.hub import write_checkpoint

from llama.fingerprint import weights_digest
from llama.manifest import Manifest

BASE = "sha256:" + "1" * 64


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """Two layers, fp32, tied; widths that groups of 32 divide; a context of 128."""
    folder = write_checkpoint(tmp_path_factory.mktemp("dense") / "model")
    Manifest(BASE, "dense", weights_digest(folder), "tiny", "test").write(folder)
    return folder


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> Path:
    """100 pages of 100 sites."""
    file = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    rows = [
        {"url": f"https://site{n}.org/", "text": " ".join(f"the cat {n} sat {n * i} on" for i in range(40))}
        for n in range(100)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
