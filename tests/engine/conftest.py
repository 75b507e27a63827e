from collections.abc import Callable, Iterator

import pytest
import torch
from support import tiny

from engine.engine import LocalEngine, ServedModel
from engine.options import EngineOptions


@pytest.fixture(scope="session")
def reference():
    return tiny.reference()


@pytest.fixture
def make_engine(reference) -> Iterator[Callable[..., LocalEngine]]:
    """Engines over the tiny model, closed after the test."""
    torch.set_num_threads(1)
    engines = []

    def make(**options) -> LocalEngine:
        served = ServedModel("tiny", tiny.BASE, "dense", "sha256:" + "c" * 64, 0)
        options = {"page_size": 4, "kv_bytes": 1 << 20, "max_batch_tokens": 32, **options}
        engines.append(LocalEngine(tiny.ours(reference), tiny.ByteTokenizer(), served, EngineOptions(**options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
