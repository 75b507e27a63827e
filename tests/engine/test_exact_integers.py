"""In integers every kernel computes a row by itself: an answer is the same to the last bit alone and in any batch."""

import random

import pytest
import torch
from support import tiny
from support.checkpoints import model, save
from support.drive import ask

from engine.engine import LocalEngine
from engine.options import EngineOptions
from engine.served import ServedModel
from llama import native
from llama.load import load

ours = native.kernels()
pytestmark = pytest.mark.skipif(ours is None or not ours.multiplies_integers, reason="this CPU multiplies no integers")


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    folder = save(tmp_path_factory.mktemp("model"), model(**shape))
    loaded = load(folder, level="w4g64", dtype="bfloat16", device="cpu", compute="auto")
    assert loaded.compute == "int8"
    engines = []

    def make(**options) -> LocalEngine:
        served = ServedModel("tiny", tiny.BASE, "w4g64", "sha256:" + "c" * 64, 0, loaded.compute)
        engines.append(LocalEngine(loaded.model, tiny.ByteTokenizer(), served, EngineOptions(page_size=16, **options)))
        assert engines[-1].info.compute == "int8"
        return engines[-1]

    yield make, loaded.model.config
    for engine in engines:
        engine.close()


def test_alone_and_in_any_batch(serving):
    make, config = serving
    draw = random.Random(0)
    prompts = [None, tiny.rows(17, config.hidden_size, seed=1), tiny.kv(13, config)]
    asked = [
        ([draw.randrange(256) for _ in range(draw.choice((1, 5, 30, 90)))], prompts[i % 3], draw.choice((0.0, 1.0)))
        for i in range(40)
    ]

    def answers(engine: LocalEngine, at_once: bool) -> list[tuple[list[int], list[float]]]:
        found = []
        for number, (text, prompt, temperature) in enumerate(asked):
            sampling = {"max_tokens": 16, "temperature": temperature, "seed": number, "logprobs": 1}
            found.append(ask(engine, text, prompt, **sampling))
            if not at_once:
                found[-1].wait()
        for answer in found:
            answer.wait()
        return [(answer.tokens[0], [place.logprob for place in answer.logprobs[0]]) for answer in found]

    torch.set_num_threads(2)
    pages = 2 * config.num_layers * 16 * config.num_kv_heads * config.head_dim * 2
    crowded = make(max_running=32, max_batch_tokens=48, kv_bytes=18 * pages)
    together = answers(crowded, at_once=True)
    assert crowded.stats().preemptions > 0
    assert together == answers(make(max_running=1, max_batch_tokens=256, kv_bytes=400 * pages), at_once=False)
