"""Losses computed chunk by chunk equal the plain ones, values and gradients, and never hold all logits."""

import pytest
import torch
import torch.nn.functional as F

from lab.learn.losses import Target, chunked_loss
from llama.linear import DenseLinear

TOKENS, WIDTH, VOCABULARY = 23, 8, 40


def made(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    states = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    heads = [DenseLinear(torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)) for _ in range(2)]
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden, states, heads, ids


def plain(hidden, states, heads, ids, distil):
    """(total, cross-entropy, divergence), summed."""
    scores = heads[0](hidden).log_softmax(-1)
    cross_entropy = F.nll_loss(scores, ids, reduction="sum")
    divergence = F.kl_div(scores, heads[1](states).log_softmax(-1), reduction="sum", log_target=True)
    return (1 - distil) * cross_entropy + distil * divergence, cross_entropy, divergence


@pytest.mark.parametrize("rows", [1, 7, 23, 100])
@pytest.mark.parametrize("distil", [0.0, 0.3, 1.0])
def test_values_and_gradients_are_those_of_the_plain_losses(rows, distil):
    hidden, states, heads, ids = made()
    expected, cross_entropy, divergence = plain(hidden, states, heads, ids, distil)
    (gradient,) = torch.autograd.grad(expected * 3, hidden)
    found = chunked_loss(hidden, heads[0], Target(ids, states, heads[1], distil), rows)
    torch.testing.assert_close(found.total, expected)
    assert found.cross_entropy == pytest.approx(cross_entropy.item(), rel=1e-12)
    assert found.divergence == pytest.approx(divergence.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found.total * 3, hidden)[0], gradient)


def test_without_a_teacher_it_is_cross_entropy_whatever_the_share():
    hidden, _, heads, ids = made()
    found = chunked_loss(hidden, heads[0], Target(ids, distil=0.9), 5)
    expected = F.cross_entropy(heads[0](hidden), ids, reduction="sum")
    torch.testing.assert_close(found.total, expected)
    assert found.divergence is None
    torch.testing.assert_close(torch.autograd.grad(found.total, hidden), torch.autograd.grad(expected, hidden))


def test_the_model_that_is_its_own_teacher_has_nothing_to_learn():
    hidden, _, heads, ids = made()
    found = chunked_loss(hidden, heads[0], Target(ids, hidden.detach(), heads[0], 1.0), 5)
    assert abs(found.total.item()) < 1e-12
    assert torch.autograd.grad(found.total, hidden)[0].abs().max() < 1e-14


def test_bf16_states_are_summed_in_fp32():
    hidden, states, heads, ids = made(torch.bfloat16)
    found = chunked_loss(hidden, heads[0], Target(ids, states, heads[1], 0.5), 5)
    assert found.total.dtype == torch.float32
    expected = plain(hidden.float(), states.float(), [DenseLinear(h.dense().float()) for h in heads], ids, 0.5)[0]
    torch.testing.assert_close(found.total, expected, rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(found.total, hidden)
    assert gradient.dtype == torch.bfloat16


def test_logits_never_exist_for_more_tokens_than_a_chunk():
    hidden, states, heads, ids = made()
    seen = []

    class Watched(DenseLinear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    watched = Watched(heads[0].dense().detach())
    chunked_loss(hidden, watched, Target(ids, states, heads[1], 0.5), 5).total.backward()
    assert max(seen) == 5
    assert sum(seen) == TOKENS


def test_no_gradient_is_computed_where_none_is_wanted():
    hidden, _, heads, ids = made()
    with torch.no_grad():
        assert not chunked_loss(hidden.detach(), heads[0], Target(ids), 5).total.requires_grad
