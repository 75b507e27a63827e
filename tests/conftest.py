"""What tests of every package may use: the embedded model, and how much of a long test to run."""

import os
from pathlib import Path

import pytest
import torch

for name in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS"):  # read when typer is imported: help would be in colour
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of tests stand behind none

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch's CUDA builds bring

EMBEDDED = Path(__file__).parents[1] / "models" / "smollm2-135m"


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The pulled checkpoint of the embedded model, as `make test` leaves it."""
    if not (EMBEDDED / "promptstitch.json").exists():
        pytest.fail("the embedded model is missing: `make test` pulls it into models/")
    return EMBEDDED


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether this is `make test-all`."""
    return os.environ.get("PROMPTSTITCH_FULL") == "1"
