"""A small dense checkpoint, tokens to calibrate on, and compressions of it in this process."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import model, save

from lab.compress.compress import Order, compress, planned
from lab.compress.job import Tokens
from lab.progress import silent
from lab.run import open_run


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """Three layers, all widths multiples of 64, GQA, fp32, untied."""
    return save(tmp_path_factory.mktemp("dense") / "model", model(num_hidden_layers=3))


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    """16 windows of 24 tokens, some shorter."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (16, 24), generator=generator)
    real = torch.arange(24) < torch.randint(8, 25, (16, 1), generator=generator)
    return Tokens(ids * real, real)


@pytest.fixture
def compressed(dense, tokens, tmp_path):
    """compressed("w4g64", method=…, …) -> the folder."""

    def make(level: str, name: str | None = None, source: Path = dense, **options) -> Path:
        out = tmp_path / (name or level)
        plan = planned(Order(source, out, level, device="cpu", **options))
        with open_run(tmp_path / f"{out.name}.run", plan.config("data")) as run:
            compress(plan, tokens, run, silent)
        return out

    return make
