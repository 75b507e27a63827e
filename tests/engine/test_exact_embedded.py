"""The embedded model in fp32, mixed requests in one batch on few pages, against transformers: token for token."""

import random

import pytest
import torch
from support import tiny
from support.drive import Answer, ask
from support.exact import judge
from transformers import LlamaForCausalLM

from engine.engine import LocalEngine
from engine.options import EngineOptions
from engine.request import RequestDone
from engine.served import ServedModel
from llama.load import load
from llama.tokenizer import HubTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PAGES = 90  # of 16 tokens: a tenth of what 32 such requests would like


@pytest.fixture(scope="module")
def served(embedded):
    torch.set_num_threads(2)
    loaded = load(embedded, dtype="float32", device="cpu")
    identity = loaded.identity
    model = ServedModel(identity.name, tiny.BASE, identity.level, identity.weights, loaded.resident_bytes)
    options = EngineOptions(max_running=32, max_batch_tokens=256, kv_bytes=PAGES * 2 * 30 * 16 * 3 * 64 * 4)
    engine = LocalEngine(loaded.model, HubTokenizer(embedded), model, options)
    yield engine
    engine.close()


def requests(config, count: int) -> list[tuple[list[int], object]]:
    """Texts of 1 to 900 tokens behind no prompt, four `rows` prompts, one `kv` prompt."""
    generator = random.Random(0)
    prompts = [None, *(tiny.rows(n, 576, seed=n, scale=0.1) for n in (1, 17, 64, 130)), tiny.kv(24, config, scale=1.0)]
    lengths = [1, 2, 5, 15, 16, 17, 33, 60, 100, 128, 250, 400, 900]
    return [
        ([generator.randrange(17, 49152) for _ in range(generator.choice(lengths))], generator.choice(prompts))
        for _ in range(count)
    ]


def test_greedy_answers_equal_transformers(served, embedded, full):
    count = 200 if full else 32
    asked = requests(served._model.config, count)
    answers = [ask(served, text, prompt, max_tokens=(8, 100)[i % 2]) for i, (text, prompt) in enumerate(asked)]
    cancelled = set(range(3, count, 9))
    for i in cancelled:
        served.cancel(answers[i].request.request_id)
    for i in set(range(count)) - cancelled:
        assert isinstance(answers[i].wait(timeout=1800).last, RequestDone)
    stats = served.stats()
    assert stats.preemptions > 0
    assert stats.pages_used == 0

    reference = LlamaForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()
    ties, tokens = [], 0
    for i in sorted(set(range(count)) - cancelled):
        text, prompt = asked[i]
        verdict = judge(reference, text, answers[i].tokens[0], prompt)
        assert not verdict.wrong, (i, len(text), prompt, verdict)
        ties += [(i, at) for at in verdict.ties]
        tokens += len(answers[i].tokens[0])
    print(f"{tokens} tokens of {count - len(cancelled)} requests, {stats.preemptions} preemptions, ties: {ties}")
    assert len(ties) <= 0.02 * tokens


def test_seeded_sampling_is_the_same_alone_and_in_the_batch(served):
    asked = requests(served._model.config, 16)
    fields = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 12}

    def start(i: int) -> Answer:
        return ask(served, asked[i][0][:60], asked[i][1], seed=i, **fields)

    alone = [start(i).wait().tokens for i in range(len(asked))]
    together = [start(i) for i in range(len(asked))]
    assert [answer.wait().tokens for answer in together] == alone
