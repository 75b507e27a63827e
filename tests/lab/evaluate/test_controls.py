"""Prompts that nobody learned are what they are called: the text itself, of the asked length, kind and layout."""

from __future__ import annotations

import math

import pytest
import torch
from support.checkpoints import model as reference
from support.tiny import BASE, kv, ours, rows

from lab.data.documents import Document
from lab.data.windows import windows
from lab.evaluate.controls import Choice, best_prefix, by_frequency, fixed, of_tokens, untrained
from lab.evaluate.forward import prefix
from lab.evaluate.score import score
from lab.evaluate.scorer import Scorer
from llama.identity import Identity
from llama.load import LoadedModel

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def model():
    return ours(reference())


class Letters:
    """Ids are bytes; `<|endoftext|>` is one of them."""

    bos_token_id, eos_token_id, eos_token_ids = 257, 256, frozenset({256})

    def encode(self, text, bos="tokenizer"):
        return [256] if text == "<|endoftext|>" else list(text.encode())

    def chat_text(self, messages, *, asking=True):
        raise ValueError("no template")


def made(ids, document=0):
    ids = torch.tensor(ids)
    scored = torch.ones(ids.shape, dtype=torch.bool)
    scored[:, 0] = False
    return windows(ids, scored, torch.arange(len(ids)) + document)


@pytest.mark.parametrize("kind", ["rows", "kv"])
def test_a_text_as_a_prompt_is_the_text(model, kind):
    text, data = [10, 20, 30], made([[5, 6, 7, 8], [9, 10, 11, 12]])
    joined = torch.cat((torch.tensor([text] * 2), data.ids), 1)
    scored = torch.cat((torch.zeros(2, 3, dtype=torch.bool), data.scored), 1)
    expected = score(model, windows(joined, scored, data.document)).nll[:, 3:]
    found = score(model, data, of_tokens(model, BASE, text, kind=kind)).nll
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope", [None, YARN])
def test_both_kinds_of_a_text_leave_the_same_prefix(rope):
    """Keys are turned back and forth, where RoPE scales as well."""
    model = ours(reference(**({"rope_parameters": rope} if rope else {})))
    one, other = (prefix(model, of_tokens(model, BASE, [1, 2, 3, 4], kind=kind).tensors) for kind in ("rows", "kv"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("like", ["rows", "kv"])
def test_controls_have_the_layout_of_the_prompt(model, like):
    config = model.config
    prompt = rows(9, config.hidden_size, bos="after_prompt") if like == "rows" else kv(9, config, bos="after_prompt")
    found = fixed(model, Letters(), prompt)
    assert set(found) == {"untrained", "end_of_text", "hard_sentence_1", "hard_sentence_2", "hard_sentence_3"}
    assert all((each.bos, each.base) == ("after_prompt", BASE) for each in found.values())
    assert (found["untrained"].kind, found["untrained"].num_virtual_tokens) == (like, 9)
    end = found["end_of_text"]
    assert torch.equal(end.tensors["prompt_embeddings"], model.embed(torch.tensor([256])))


def test_an_untrained_prompt_is_drawn_by_its_seed(model):
    assert untrained(model, BASE, 4, seed=1) == untrained(model, BASE, 4, seed=1) != untrained(model, BASE, 4, seed=2)


def test_the_best_of_several_texts(model):
    texts = made(torch.randint(250, (6, 8), generator=torch.Generator().manual_seed(0)).tolist())
    select = made([[5, 6, 7, 8], [9, 10, 11, 12]], document=50)
    like = rows(3, model.config.hidden_size)
    scorer = Scorer(LoadedModel(model, Identity("tiny", BASE, "w4g64", "w"), 0, 0, "float32"))
    best, tried = best_prefix(scorer, like, Choice(texts, select, k=4))
    assert len(tried) == 4
    assert score(model, select, best).perplexity == min(tried)
    assert best.num_virtual_tokens == 3
    assert best_prefix(scorer, rows(9, model.config.hidden_size), Choice(texts, select)) == (None, [])


@pytest.mark.parametrize("ids", [[], [-1], [260]])
def test_ids_that_are_none(model, ids):
    with pytest.raises(ValueError, match="token ids from 0 to 259"):
        of_tokens(model, BASE, ids)


def test_answers_by_their_frequencies():
    def answers(*given: str) -> list[Document]:
        return [Document(str(i), text="?", completion=answer) for i, answer in enumerate(given)]

    learned = answers("yes", "yes", "yes", "no")
    assert by_frequency(learned, answers("yes", "no")) == pytest.approx(-math.log(3 / 4) - math.log(1 / 4))
    assert by_frequency(learned, answers("yes", "it depends")) is None  # not of a few: nobody can say how likely
