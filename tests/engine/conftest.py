from collections.abc import Callable, Iterator

import pytest
import torch
from support import tiny
from support.replayed import replaying

from engine import engine as module
from engine.engine import LocalEngine
from engine.options import EngineOptions
from engine.served import ServedModel


@pytest.fixture(scope="session")
def reference():
    return tiny.reference()


@pytest.fixture(params=["launched", "replayed"])
def make_engine(request, reference, monkeypatch) -> Iterator[Callable[..., LocalEngine]]:
    """Engines over the tiny model, closed after the test: as on the CPU, and as on CUDA, where decoding steps are
    replayed and the next one begins before the last one's tokens are read."""
    torch.set_num_threads(1)
    if request.param == "replayed":
        monkeypatch.setattr(module, "decode_graphs", replaying)
    engines = []

    def make(**options) -> LocalEngine:
        served = ServedModel("tiny", tiny.BASE, "dense", "sha256:" + "c" * 64, 0)
        options = {"page_size": 4, "kv_bytes": 1 << 20, "max_batch_tokens": 32, **options}
        engines.append(LocalEngine(tiny.ours(reference), tiny.ByteTokenizer(), served, EngineOptions(**options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
