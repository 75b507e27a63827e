"""Greedy answers of mixed batches equal transformers, token for token."""

import random

import pytest
import torch
from support import tiny
from support.drive import ask
from support.exact import judge

from llama.config import LlamaConfig

TEXTS = random.Random(0)


def text(length: int) -> list[int]:
    return [TEXTS.randrange(256) for _ in range(length)]


@pytest.fixture(scope="module")
def prompts(reference):
    config = LlamaConfig.from_hf(reference.config.to_dict())
    whole = [*(tiny.rows(n, 64, seed=n) for n in (1, 17, 64, 130)), tiny.kv(13, config)]
    return [None, *whole, whole[2].first(18), whole[3].first(16), whole[4].first(6)]


def test_one_request_equals_generate(make_engine, reference, prompts):
    """The plainest case against `generate` itself."""
    engine = make_engine()
    for prompt in prompts[:5]:
        ids = text(11)
        embeds = reference.get_input_embeddings()(torch.tensor([ids]))
        if prompt is not None:
            embeds = torch.cat((prompt.tensors["prompt_embeddings"][None], embeds), 1)
        expected = reference.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), do_sample=False, max_new_tokens=20
        )[0].tolist()
        assert ask(engine, ids, prompt, max_tokens=20).wait().tokens[0] == expected


def test_mixed_batch_under_page_pressure(make_engine, reference, prompts):
    """32 at once with and without prompts on few pages: preempted, chunked, shared, and still exact."""
    engine = make_engine(kv_bytes=400 * 4 * 2 * 2 * 2 * 16 * 4 // 2, max_running=32, max_batch_tokens=40)
    answers = [
        ask(engine, text(TEXTS.choice((1, 3, 8, 30, 90, 300))), TEXTS.choice(prompts), max_tokens=24)
        for _ in range(200)
    ]
    for answer in answers[::8]:
        engine.cancel(answer.request.request_id)
    ties = tokens = 0
    for i, answer in enumerate(answers):
        if i % 8 == 0:
            continue
        answer.wait()
        verdict = judge(reference, answer.request.token_ids, answer.tokens[0], answer.request.prompt)
        assert not verdict.wrong, (i, verdict)
        ties += len(verdict.ties)
        tokens += len(answer.tokens[0])
    assert ties <= 0.02 * tokens
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.soft_prefix_hits > stats.soft_prefix_misses >= 5
    assert stats.pages_used == 0
