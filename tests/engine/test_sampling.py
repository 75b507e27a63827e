"""Sampling follows its definition, row by row, whatever the rest of the batch."""

import math
from dataclasses import replace

import pytest
import torch

from engine import sampling
from engine.request import SamplingParams
from engine.sampling import Row, choose, noise, sample


def row(
    seed: int = 0, index: int = 0, tokens: list[int] | None = None, num_text: int = 1, banned=frozenset(), **params
):
    return Row(SamplingParams(**params), seed, index, tokens or [0], num_text, banned)


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def draw(values: list[float], count: int = 4000, **params) -> torch.Tensor:
    """Frequencies (V,) over `count` positions of one seeded stream."""
    table = logits(values).repeat(count, 1)
    rows = [row(tokens=[0] * (1 + i), **params) for i in range(count)]
    tokens = torch.tensor([choice.token_id for choice in sample(table, rows)])
    return torch.bincount(tokens, minlength=len(values)) / count


def test_greedy_takes_the_best():
    assert sample(logits([0.0, 3.0, 1.0]), [row(temperature=0.0)])[0].token_id == 1


@pytest.mark.parametrize("width", [250, 256])
def test_a_step_that_samples_nothing(width):
    """All chunks in the middle of their texts: no rows once failed the whole batch at some widths."""
    assert sample(torch.empty(0, width), []) == []


@pytest.mark.parametrize("width", [250, 256, 1024])
def test_greedy_takes_the_first_of_equals_at_any_width(width):
    torch.manual_seed(0)
    table = torch.randint(0, 3, (40, width)).float()
    chosen = sample(table.clone(), [row(temperature=0.0)] * 40)
    assert [choice.token_id for choice in chosen] == table.argmax(-1).tolist()


def test_frequencies_follow_the_distribution():
    values = [1.0, 0.0, -1.0, 2.0]
    expected = torch.tensor(values).div(0.7).softmax(-1)
    # 4,000 draws: a deviation of 0.03 is four standard errors
    assert torch.allclose(draw(values, temperature=0.7), expected, atol=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {3, 0}),
        ({"top_p": 0.6}, {3}),
        ({"top_p": 0.7}, {3, 0}),
        ({"min_p": 0.2}, {3, 0}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.01}, {3, 0, 1}),
        ({"top_p": 1e-9}, {3}),
    ],
)
def test_filters_keep_what_they_should(params, kept):
    values = [1.0, 0.0, -1.0, 2.0]  # probabilities 0.24, 0.09, 0.03, 0.64
    frequencies = draw(values, **params)
    assert {i for i, share in enumerate(frequencies) if share > 0} == kept
    inside = torch.tensor(values)[sorted(kept)].softmax(-1)
    assert torch.allclose(frequencies[sorted(kept)], inside, atol=0.03)


def test_filters_agree_with_a_full_sort_beyond_the_shortlist(monkeypatch):
    """The shortlist is a short cut: with one of two candidates the same tokens come out."""
    torch.manual_seed(0)
    table = torch.randn(64, 300)
    rows = [
        row(seed=i, top_p=p, min_p=m, top_k=k)
        for i in range(16)
        for p, m, k in ((0.95, 0.0, 0), (1.0, 0.05, 0), (0.5, 0.0, 100), (0.999, 0.001, 0))
    ]
    plain = [choice.token_id for choice in sample(table.clone(), rows)]
    monkeypatch.setattr(sampling, "SHORTLIST", 2)
    assert [choice.token_id for choice in sample(table.clone(), rows)] == plain


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(1)
    table = torch.randn(6, 500)
    rows = [
        row(seed=3),
        row(temperature=0.0),
        row(seed=4, top_p=0.9),
        row(seed=5, index=2, top_k=7, logprobs=3),
        row(seed=6, repetition_penalty=1.3, tokens=[1, 2, 3]),
        row(seed=7, tokens=[1, 9, 9], presence_penalty=1.0, frequency_penalty=0.5),
    ]
    together = sample(table.clone(), rows)
    assert [sample(table[i : i + 1].clone(), [r])[0] for i, r in enumerate(rows)] == together


def test_noise_depends_on_seed_choice_and_step_alone():
    assert torch.equal(noise(1, 0, 5, 100), noise(1, 0, 5, 100))
    assert len({float(noise(s, c, t, 1)) for s in range(8) for c in range(8) for t in range(8)}) == 512


def test_noise_of_some_ids_is_the_whole_noises():
    """To the bit: filters must not change what a seed draws."""
    for step, size in enumerate((1, 260, 2048, 49_152)):
        whole = noise(7, 0, step, size)
        for count in {1, min(size, 5), min(size, 1000)}:
            ids = torch.randperm(size, generator=torch.Generator().manual_seed(count))[:count]
            assert torch.equal(noise(7, 0, step, size, ids), whole[ids])


def test_noise_is_standard_gumbel():
    many = noise(0, 0, 0, 1_000_000)
    assert float(many.mean()) == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert float(many.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_rounding_of_logits_does_not_change_a_seeded_answer():
    """It did while the cumulative distribution was inverted: among many small probabilities every border moves."""
    torch.manual_seed(2)
    table = torch.randn(1, 49152)
    for seed in range(50):
        exact, rounded = (
            sample(t.clone(), [row(seed=seed)])[0].token_id for t in (table, table + 3e-5 * torch.rand(49152))
        )
        assert exact == rounded


def test_repetition_penalty_is_the_papers():
    """Positive logits are divided, negative ones multiplied; text counts as well as what was generated."""
    table = logits([2.0, -1.0, 1.9, 0.0])
    chosen = sample(table, [row(temperature=0.0, repetition_penalty=2.0, tokens=[0, 1], num_text=1)])
    assert chosen[0].token_id == 2
    assert table[0].tolist() == [1.0, -2.0, pytest.approx(1.9), 0.0]


def test_presence_and_frequency_count_generated_tokens_only():
    table = logits([5.0, 5.0, 5.0])
    sample(table, [row(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5, tokens=[0, 1, 1, 2], num_text=1)])
    assert table[0].tolist() == [5.0, 5.0 - 1 - 1, 5.0 - 1 - 0.5]


def test_bias_and_bans():
    assert sample(logits([0.0, 1.0]), [row(temperature=0.0, logit_bias=((0, 5.0),))])[0].token_id == 0
    assert sample(logits([9.0, 1.0]), [row(temperature=0.0, banned=frozenset({0}))])[0].token_id == 1


def test_logprobs_are_raw():
    """Before penalties, bias and temperature."""
    values = torch.tensor([1.0, 0.0, 2.0])
    expected = values.log_softmax(-1)
    (choice,) = sample(values[None].clone(), [row(temperature=0.5, seed=1, logprobs=2, logit_bias=((1, 50.0),))])
    assert choice.token_id == 1
    assert choice.logprob.logprob == pytest.approx(float(expected[1]))
    assert [token for token, _ in choice.logprob.top] == [2, 0]
    assert choice.logprob.top[0][1] == pytest.approx(float(expected[2]))
    assert math.isclose(sum(math.exp(p) for p in expected.tolist()), 1, rel_tol=1e-5)


def test_what_is_left_on_the_device_is_what_is_told():
    torch.manual_seed(1)
    table = torch.randn(6, 512)
    table[4, 7] = math.nan
    rows = [row(seed=i, tokens=[0] * (1 + i), temperature=(0.0, 0.7)[i % 2]) for i in range(6)]
    assert all(each.plain for each in rows)
    expected = [choice.token_id for choice in sample(table.clone(), rows)]
    expected[4] = -1
    assert choose(table, rows).tolist() == expected
    # Chosen before the token in front of it is known:
    before = [replace(each, tokens=each.tokens[:-1], ahead=1) for each in rows]
    assert choose(table, before).tolist() == expected


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": ((3, 1.0),)},
        {"banned": frozenset({3})},
    ],
)
def test_what_needs_a_look_is_not_plain(params):
    assert not row(temperature=1.0, **params).plain
    assert row(temperature=0.0, top_k=5, top_p=0.5, min_p=0.1).plain  # filters keep the best, whatever they drop


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 5e-324])
def test_a_temperature_next_to_nothing_is_greedy(temperature):
    """Divided by it, logits left fp32, and what came out was noise."""
    torch.manual_seed(0)
    table = torch.randn(4, 512) * 20
    rows = [row(temperature=temperature, top_p=(1.0, 0.9)[i % 2]) for i in range(4)]
    assert [choice.token_id for choice in sample(table.clone(), rows)] == table.argmax(-1).tolist()
