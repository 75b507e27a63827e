"""What was acknowledged survives kill -9, and what was not leaves nothing; a control shows that the test can see."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = os.environ.get("PROMPTSTITCH_FULL") == "1"
PROGRAM = Path(__file__).with_name("kill_uploads.py")


def run(folder: Path, *options: str) -> dict[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(folder), *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(answer.stdout)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost(tmp_path):
    kills = 200 if FULL else 40
    counts = run(tmp_path / "store", "--kills", str(kills), "--seed", "7")
    assert counts["kills"] == kills
    assert counts["acknowledged"] >= kills // 2
    assert counts["orphans"] > 0  # the kills did meet uploads half way
    assert {name: counts[name] for name in ("lost", "torn", "gaps", "unreadable", "leftovers")} == {
        "lost": 0, "torn": 0, "gaps": 0, "unreadable": 0, "leftovers": 0
    }  # fmt: skip


@pytest.mark.slow
def test_without_rename_the_damage_shows(tmp_path):
    """An uploader spends over half of its time inside a blob; that 15 kills all miss it has a chance below 1e-4."""
    assert run(tmp_path / "store", "--kills", "15", "--seed", "7", "--control")["torn"] > 0
