"""The loss of a text through the engine is transformers' own, behind either kind of prompt and behind a part of one."""

import pytest
import torch
from support import tiny
from support.drive import ask
from support.exact import teacher_forced

from engine.api import InvalidRequest
from engine.score import ScoringFailed, mean_loss
from llama.config import LlamaConfig

IDS = [int(i) for i in torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(3))]


@pytest.fixture(scope="module")
def prompts(reference):
    config = LlamaConfig.from_hf(reference.config.to_dict())
    return {"none": None, "rows": tiny.rows(13, 64), "kv": tiny.kv(13, config)}


def expected(reference, ids, prompt):
    logits = teacher_forced(reference, ids[:1], ids[1:], prompt)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()


@pytest.mark.parametrize("kind", ["none", "rows", "kv"])
def test_the_loss_is_that_of_transformers(make_engine, reference, prompts, kind):
    prompt = prompts[kind]
    found = mean_loss(make_engine(), IDS, prompt)
    assert found == pytest.approx(expected(reference, IDS, prompt), abs=1e-5)


@pytest.mark.parametrize("kind", ["rows", "kv"])
def test_the_first_positions_of_a_prompt_are_served_exactly(make_engine, reference, prompts, kind):
    """Whole, cut and cut otherwise on one engine: each has pages of its own, none is served another's."""
    engine, whole = make_engine(), prompts[kind]
    cuts = {n: whole.first(n) for n in (1, 4, 5, 12, 13)}
    for _ in range(2):  # the second time from the cache
        for n, cut in cuts.items():
            assert mean_loss(engine, IDS, cut) == pytest.approx(expected(reference, IDS, cut), abs=1e-5), n
    assert len({round(mean_loss(engine, IDS, cut), 4) for cut in cuts.values()}) == len(cuts)
    assert set(engine.stats().loaded_prompts) == {cut.digest for cut in cuts.values()}


def test_the_first_positions_leave_what_they_leave_in_front_of_the_rest(reference, prompts):
    """Why cutting is exact for rows: the cache of the first n equals the start of the cache of all."""
    rows = prompts["rows"].tensors["prompt_embeddings"][None]
    whole = reference(inputs_embeds=rows, use_cache=True).past_key_values
    cut = reference(inputs_embeds=rows[:, :5], use_cache=True).past_key_values
    for full, part in zip(whole.layers, cut.layers, strict=True):
        torch.testing.assert_close(full.keys[:, :, :5], part.keys)
        torch.testing.assert_close(full.values[:, :, :5], part.values)


def test_a_text_longer_than_a_step_is_scored(make_engine, reference):
    """Steps that scored a piece told an empty list of events; who looked for the last of them never heard again."""
    ids = IDS * 3
    answer = ask(make_engine(max_batch_tokens=20), ids, None, max_tokens=0, prompt_logprobs=0).wait(20)
    assert len(answer.scored) == len(ids)
    assert mean_loss(make_engine(max_batch_tokens=20), ids) == pytest.approx(expected(reference, ids, None), abs=1e-5)


def test_what_cannot_be_scored(make_engine):
    engine = make_engine()
    with pytest.raises(ValueError, match="two tokens"):
        mean_loss(engine, [1])
    with pytest.raises(InvalidRequest):
        mean_loss(engine, [1, 260])
    with pytest.raises(ScoringFailed) as late:
        mean_loss(engine, IDS, timeout=1e-9)
    assert late.value.event.code == "deadline"
