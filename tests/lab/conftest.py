"""What the commands of the lab are tried on: a tiny checkpoint with a tokenizer, pages of letters, a command line."""

import json
import os
import random
from pathlib import Path

import pytest
from support.lab import write_model
from typer.testing import CliRunner

from cli.main import app


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Dense, all widths multiples of 64, a context of 2,048, with its manifest."""
    return write_model(tmp_path_factory.mktemp("checkpoint") / "dense")


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> Path:
    """80 pages of 80 sites."""
    return _written(tmp_path_factory.mktemp("data") / "pages.jsonl", random.Random(0))


@pytest.fixture(scope="session")
def unseen(tmp_path_factory) -> Path:
    """80 others."""
    return _written(tmp_path_factory.mktemp("data") / "unseen.jsonl", random.Random(1))


def _written(file: Path, dice: random.Random) -> Path:
    rows = [{"url": f"https://site{n}.org/", "text": "".join(dice.choices("abcdefgh ", k=250))} for n in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def command(monkeypatch):
    """command("recover", …) -> the result, whatever its exit code; nothing but typer may have ended it."""
    for name in list(os.environ):
        if name.startswith("PROMPTSTITCH_"):
            monkeypatch.delenv(name)

    def run(*args: object):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
