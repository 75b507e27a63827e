"""Losses of exactly the same tokens with and without a prompt, equal to transformers' own; memory that stays small."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import model as reference
from support.exact import kv_cache
from support.tiny import kv, ours, rows

from lab.data.windows import windows
from lab.evaluate import score as scoring
from lab.evaluate.forward import hidden_states, prefix
from lab.evaluate.score import NotFiniteLoss, Teacher, batches, predicting, score

EXACT = {"rtol": 0, "atol": 1e-4}


def made(count=5, length=24, seed=3, ragged=False):
    """Random windows; ragged: of different lengths, only their second half scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(260, (count, length), generator=generator)
    scored = torch.ones(count, length, dtype=torch.bool)
    scored[:, 0] = False
    for row in range(count if ragged else 0):
        ids[row, length - 3 * row :] = 0
        scored[row, length - 3 * row :] = False
        scored[row, : (length - 3 * row) // 2] = False
    return windows(ids, scored, torch.arange(count) // 2)


def theirs_nll(theirs, ids, prompt):
    """(T,) losses of one window in transformers, 0 for its first token."""
    embeds, cache, soft = theirs.get_input_embeddings()(ids[None]), None, 0
    if prompt is not None and prompt.kind == "rows":
        soft = prompt.num_virtual_tokens
        embeds = torch.cat((prompt.tensors["prompt_embeddings"][None], embeds), 1)
    elif prompt is not None:
        cache = kv_cache(theirs, prompt)
    logits = theirs(inputs_embeds=embeds, past_key_values=cache).logits[0, soft:]
    return torch.cat((torch.zeros(1), F.cross_entropy(logits[:-1], ids[1:], reduction="none")))


@pytest.fixture(scope="module")
def pair():
    theirs = reference()
    return ours(theirs), theirs


def prompts(model):
    return {"none": None, "rows": rows(7, model.config.hidden_size), "kv": kv(7, model.config)}


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["none", "rows", "kv"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_losses_are_those_of_transformers(pair, kind, ragged, batch_tokens):
    mine, theirs = pair
    data, prompt = made(ragged=ragged), prompts(mine)[kind]
    found = score(mine, data, prompt, batch_tokens=batch_tokens)
    expected = torch.stack([theirs_nll(theirs, ids, prompt) for ids in data.ids]) * data.scored
    torch.testing.assert_close(found.nll, expected, **EXACT)
    assert found.perplexity == pytest.approx(math.exp(float(expected.sum()) / data.scored_tokens), rel=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["rows", "kv"])
def test_a_text_behind_a_prefix_is_what_a_step_by_step_decoder_gives(pair, kind):
    """The mask behind a prefix is the lower-right triangle; aligned top-left, the first tokens would see no prompt."""
    mine, theirs = pair
    prompt, ids = prompts(mine)[kind], made(1).ids
    hidden = hidden_states(mine, ids, prefix(mine, prompt.tensors))
    if kind == "kv":
        cache = kv_cache(theirs, prompt)
    else:
        cache = theirs(inputs_embeds=prompt.tensors["prompt_embeddings"][None], use_cache=True).past_key_values
    for at, token in enumerate(ids[0]):
        step = theirs(token.view(1, 1), past_key_values=cache, use_cache=True)
        torch.testing.assert_close(mine.logits(hidden[0, at : at + 1]), step.logits[0], **EXACT)


@pytest.mark.parametrize("kind", ["none", "rows", "kv"])
def test_a_prompt_that_does_nothing_gains_nothing(pair, kind):
    """A model that is deaf to everything has perplexity V. Averaging over soft positions, too, would print 40 for 260
    behind 12 of them."""
    deaf = ours(reference())
    deaf.head.weight.zero_()
    found = score(deaf, made(), prompts(deaf)[kind])
    assert found.perplexity == pytest.approx(260, rel=1e-5)
    assert found.windows.scored_tokens == 5 * 23


@pytest.mark.parametrize("kind", ["none", "rows", "kv"])
def test_chunks_of_logits_change_nothing(pair, kind, monkeypatch):
    mine, _ = pair
    data, prompt = made(ragged=True), prompts(mine)[kind]
    whole = score(mine, data, prompt)
    monkeypatch.setitem(scoring.LOGITS, "cpu", 260 * 3)
    torch.testing.assert_close(score(mine, data, prompt).nll, whole.nll, **EXACT)


def states(model, data):
    return torch.cat([hidden for _, hidden in predicting(model, data, None, batches(data, in_order=True))])


@torch.inference_mode()
def test_divergence_from_the_dense_model(pair):
    """Against transformers' distributions, written out; 0 against itself, and every token agrees."""
    mine, theirs = pair
    other, data = ours(reference(seed=1)), made(ragged=True)
    teacher = Teacher(data, states(mine, data), mine.logits)
    same = score(mine, data, teacher=teacher)
    assert float(same.kl.max()) < 1e-6
    assert torch.equal(same.agrees, data.scored)

    found = score(other, data, teacher=teacher)
    p = theirs(data.ids).logits.log_softmax(-1)[:, :-1]
    logits = reference(seed=1)(data.ids).logits[:, :-1]
    expected = torch.zeros(data.scored.shape)
    expected[:, 1:] = (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(found.kl, expected * data.scored, **EXACT)
    agree = torch.zeros_like(data.scored)
    agree[:, 1:] = p.argmax(-1) == logits.argmax(-1)
    assert torch.equal(found.agrees, agree & data.scored)


@torch.inference_mode()
def test_the_dense_model_scores_itself_from_its_states(pair):
    mine, _ = pair
    data = made(ragged=True)
    found, expected = Teacher(data, states(mine, data), mine.logits).scores(), score(mine, data)
    torch.testing.assert_close(found.nll, expected.nll, **EXACT)
    assert torch.equal(found.hits, expected.hits)


def test_a_loss_that_is_not_finite_is_no_figure():
    broken = ours(reference())
    broken.head.weight[7, 0] = float("nan")
    with pytest.raises(NotFiniteLoss, match=r"window 0 is not finite in torch.float32.*--dtype float32"):
        score(broken, made())


def test_a_teacher_of_other_windows_is_refused(pair):
    mine, _ = pair
    with pytest.raises(ValueError, match="115 scored tokens"):
        Teacher(made(), torch.zeros(7, mine.config.hidden_size), mine.logits)


@pytest.mark.parametrize("kind", ["rows", "kv"])
def test_gradients_flow_into_the_prompt(pair, kind):
    """The forward that scores is the one that learns: finite differences agree."""
    mine, _ = pair
    tensors = {name: t.clone().requires_grad_() for name, t in prompts(mine)[kind].tensors.items()}
    ids = made(2, 8).ids

    def loss(given):
        return mine.logits(hidden_states(mine, ids, prefix(mine, given))[:, -1]).square().mean()

    loss(tensors).backward()
    for name, tensor in tensors.items():
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            up, down = (loss({**tensors, name: tensor + sign * 2e-3 * direction}) for sign in (1, -1))
        slope = float((tensor.grad * direction).sum())
        assert abs(slope) > 1e-4
        assert float(up - down) / 4e-3 == pytest.approx(slope, rel=2e-2)
