"""What is differentiated: against finite differences, for every form; and that both kinds start with one loss."""

import pytest
import torch
from support.tiny import ours, reference

from lab.evaluate.forward import own_kv
from lab.learn.compute import choose_compute, for_learning
from lab.learn.forms import LoraForm, NormForm, PromptForm, first
from lab.learn.losses import Target, chunked_loss
from lab.learn.recipe import LearnError
from llama import native
from llama.integers import IntegerLinear
from llama.linear import DenseLinear

IDS = torch.randint(0, 250, (2, 7), generator=torch.Generator().manual_seed(1))
N = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return ours(reference(), torch.float64)


def double(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


def made(kind, model, recompute=False):
    """(form, tensors) in fp64, nothing of them zero."""
    if kind == "lora":
        form, tensors = LoraForm(model, recompute), double(LoraForm.start(model, 2, 0))
        return form, {name: t + 0.1 * torch.ones_like(t) for name, t in tensors.items()}
    if kind == "norms":
        return NormForm(model, recompute), double(NormForm.start(model))
    generator = torch.Generator().manual_seed(2)
    c = model.config
    shapes = {"prompt_embeddings": (N, c.hidden_size)}
    if kind == "kv":
        shapes = dict.fromkeys(("keys", "values"), (c.num_layers, c.num_kv_heads, N, c.head_dim))
    tensors = {name: torch.randn(s, generator=generator, dtype=torch.float64) * 0.3 for name, s in shapes.items()}
    return PromptForm(model, N, recompute), tensors


def loss(model, form, tensors, n=N, distil=0.5):
    hidden = form.hidden(tensors, IDS[:, :-1], n).flatten(0, 1)
    states = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    return chunked_loss(hidden, model.head, Target(IDS[:, 1:].flatten(), states, model.head, distil), 5).total


@pytest.mark.parametrize("kind", ["rows", "kv", "lora", "norms"])
def test_gradients_are_those_of_finite_differences(kind, model):
    form, tensors = made(kind, model)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    gradients = torch.autograd.grad(loss(model, form, leaves), list(leaves.values()))
    generator = torch.Generator().manual_seed(3)
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        for _ in range(3):
            step = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 1e-5
            with torch.no_grad():
                up, down = (loss(model, form, {**tensors, name: tensor + s}) for s in (step, -step))
            assert (gradient * step).sum().item() == pytest.approx((up - down).item() / 2, rel=1e-5, abs=1e-11)


@pytest.mark.parametrize("kind", ["rows", "kv", "lora", "norms"])
def test_recomputing_changes_no_gradient(kind, model):
    found = []
    for recompute in (False, True):
        form, tensors = made(kind, model, recompute)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        found.append(torch.autograd.grad(loss(model, form, leaves), list(leaves.values())))
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_gradient_flows_through_packed_weights_as_through_their_copy(dense):
    from llama.load import load

    found = []
    for compute in ("packed", "float32"):
        model = for_learning(load(dense, level="w3g32", dtype="float32", prepare=False).model, compute)
        tensors = {"prompt_embeddings": torch.full((N, model.config.hidden_size), 0.1).requires_grad_()}
        total = loss(model, PromptForm(model, N), tensors, distil=0.0)
        found.append((total.detach(), *torch.autograd.grad(total, list(tensors.values()))))
    for packed, copied in zip(*found, strict=True):
        torch.testing.assert_close(packed, copied, rtol=1e-4, atol=1e-5)


def test_a_copy_in_fp32_holds_the_very_values_that_are_served_in_bf16(dense):
    from llama.load import load

    served = load(dense, level="w3g32", dtype="bfloat16", prepare=False).model
    values = [block.down.dense().float() for block in served.blocks]
    copy = for_learning(served, "float32")
    for block, expected in zip(copy.blocks, values, strict=True):
        assert torch.equal(block.down.dense(), expected)
    assert copy.head.dense().data_ptr() == copy.embedding.dense().data_ptr()  # tied, and there once


def test_integers_give_nearly_the_gradient_of_fp32():
    """Layers whose sides are multiples of 64 are products of integers, the others stay as they are."""
    if choose_compute("auto", CPU) != "int8":
        pytest.skip("this CPU multiplies no integers, or the kernels were not built")
    config = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = []
    for compute in ("float32", "int8"):
        model = for_learning(ours(reference(**config)), compute)
        assert isinstance(model.blocks[0].down, IntegerLinear) == (compute == "int8")
        assert isinstance(model.head, DenseLinear)  # 260 tokens
        tensors = {"prompt_embeddings": torch.full((N, 128), 0.1).requires_grad_()}
        total = loss(model, PromptForm(model, N), tensors, distil=0.0)
        found.append((total.detach(), *torch.autograd.grad(total, list(tensors.values()))))
    (plain, slope), (rounded, near) = found
    assert rounded.item() == pytest.approx(plain.item(), rel=1e-2)
    assert torch.cosine_similarity(near.flatten(), slope.flatten(), 0) > 0.99


def test_compute_is_one_of_five(monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: None)
    assert choose_compute("auto", CPU) == "float32"
    with pytest.raises(LearnError, match="needs AVX-512 VNNI or AVX2, and the kernels; choose float32"):
        choose_compute("int8", CPU)
    with pytest.raises(LearnError, match="compute is 'int7'; choose one of auto, packed"):
        choose_compute("int7", CPU)


def test_a_kv_prompt_made_of_rows_has_their_loss(model):
    form, rows = made("rows", model)
    expected = loss(model, form, rows).item()
    assert loss(model, form, own_kv(model, rows)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["rows", "kv"])
def test_fewer_positions_are_the_prompt_cut_short(kind, model):
    form, tensors = made(kind, model)
    cut = loss(model, form, first(tensors, 2), n=2)
    assert torch.equal(loss(model, form, tensors, n=2), cut)
    assert not torch.equal(loss(model, form, tensors, n=3), cut)


def test_lora_and_norms_start_as_the_model_itself(model):
    plain = PromptForm(model, 0)
    for form, tensors in (
        (LoraForm(model), LoraForm.start(model, 1, 0)),
        (NormForm(model), NormForm.start(model)),
    ):
        hidden = form.hidden(double(tensors), IDS, 0)
        from lab.evaluate.forward import hidden_states

        torch.testing.assert_close(hidden, hidden_states(model, IDS), rtol=1e-6, atol=1e-6)
    assert plain.positions == 0
