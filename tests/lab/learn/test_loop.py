"""The loop: PEFT's losses step by step, draws, selection, resuming to the bit, and a loss that is not finite."""

import math

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from support.learning import learner, random_windows, small_recipe, start_rows, state_of
from support.tiny import ours, reference

from lab.learn.batches import Batches, positions_at
from lab.learn.recipe import LearnError
from lab.progress import silent
from lab.run import open_run


@pytest.fixture(scope="module")
def model():
    return ours(reference())


def peft_losses(recipe, steps, seed):
    """What PEFT's prompt tuning on transformers' model loses step by step, from the same rows on the same windows."""
    hf = reference()
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=recipe.positions)
    tuned = get_peft_model(hf, config)
    rows = tuned.prompt_encoder["default"].embedding.weight
    rows.data.copy_(start_rows(ours(hf), recipe.positions)["prompt_embeddings"])
    optimiser = torch.optim.AdamW([rows], lr=recipe.lr, weight_decay=0.0)
    learn, losses = random_windows(), []
    batches = Batches(len(learn), recipe.batch, seed)
    for step in range(steps):
        at = batches.at(step)
        labels = learn.ids[at].masked_fill(~learn.scored[at], -100)
        loss = tuned(input_ids=learn.ids[at], attention_mask=torch.ones_like(labels), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([rows], recipe.clip)
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * recipe.factor(step, steps)
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers
@pytest.mark.parametrize("micro", [0, 1])
def test_the_loss_is_that_of_peft_over_fifty_steps(micro, model, tmp_path):
    recipe = small_recipe(name="paper", lr=0.02, micro=micro, warmup=0.1)
    with open_run(tmp_path, {}, seed=5) as run:
        learner(model, recipe, 50, run).run(silent)
        found = [event["loss"] for event in run.events("step")]
    expected = peft_losses(recipe, 50, seed=5)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert expected[-1] < expected[0] - 0.1  # something was learned


def test_a_run_taken_up_anywhere_ends_in_the_same_bits(model, tmp_path):
    recipe = small_recipe(nested=0.5, lr=0.05)
    with open_run(tmp_path / "whole", {}) as run:
        whole = learner(model, recipe, 12, run).run(silent)
    stops = iter([1, 2, 5, 5, 9])
    done = None
    while done is None:
        with open_run(tmp_path / "broken", {}) as run:
            stop = next(stops, 99)

            def report(step, at, of, stop=stop):
                if step.startswith("learn") and at == stop:
                    raise KeyboardInterrupt

            try:
                done = learner(model, recipe, 12, run, save_seconds=0).run(report)
            except KeyboardInterrupt:
                continue
    assert torch.equal(done.tensors["prompt_embeddings"], whole.tensors["prompt_embeddings"])
    assert done.best == whole.best
    assert done.tokens == whole.tokens
    assert state_of(tmp_path / "broken") == state_of(tmp_path / "whole")
    with open_run(tmp_path / "broken", {}) as run:
        assert [event["step"] for event in run.events("step")] == list(range(1, 13))


def test_the_best_by_the_selection_windows_is_kept(model, tmp_path):
    with open_run(tmp_path, {}) as run:  # a rate so high that it gets worse
        learned = learner(model, small_recipe(lr=5.0, ema=0.0), 6, run).run(silent)
        selections = run.events("select")
    assert [event["step"] for event in selections] == [0, 2, 4, 6]
    assert learned.best.loss == min(event["loss"] for event in selections)
    assert learned.first.loss == selections[0]["loss"]
    if learned.best.step == 0:
        assert torch.equal(learned.tensors["prompt_embeddings"], start_rows(model, 4)["prompt_embeddings"])


def test_the_average_is_of_the_steps_and_not_of_the_zeros_before_them(model, tmp_path):
    recipe = small_recipe(ema=0.9, lr=0.01)
    with open_run(tmp_path, {}) as run:
        made = learner(model, recipe, 3, run)
        seen = []
        for _ in range(3):
            made.step()
            seen.append(made.tensors["prompt_embeddings"].detach().clone())
        weights = torch.tensor([0.9**2, 0.9, 1.0]) * 0.1
        expected = sum(w * s for w, s in zip(weights, seen, strict=True)) / weights.sum()
        made.select(silent)
        learned = made._best["prompt_embeddings"] if made.best.step == 3 else expected
    torch.testing.assert_close(learned, expected)


def test_a_loss_that_is_not_finite_stops_with_what_to_do(model, tmp_path):
    with open_run(tmp_path, {}) as run:
        made = learner(model, small_recipe(), 6, run, save_seconds=0)
        made.select(silent)
        made._save()
        before = state_of(tmp_path)
        with torch.no_grad():
            made.tensors["prompt_embeddings"][0, 0] = math.nan
        with pytest.raises(LearnError, match=r"step 0: the loss is nan at lr .*Lower lr or clip.*intact in"):
            made.run(silent)
        assert state_of(tmp_path) == before
        assert learner(model, small_recipe(), 6, run).run(silent).steps == 6  # it goes on from there


def test_every_epoch_takes_each_window_once():
    batches = Batches(10, 3, seed=1)
    drawn = torch.cat([batches.at(step) for step in range(10)]).tolist()
    epochs = [drawn[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert drawn != torch.cat([Batches(10, 3, seed=2).at(step) for step in range(10)]).tolist()


def test_a_share_of_the_steps_sees_only_the_first_positions():
    drawn = [positions_at(step, 32, 0.25, seed=0) for step in range(4000)]
    short = [n for n in drawn if n < 32]
    assert 0.22 < len(short) / len(drawn) < 0.28
    assert set(short) == set(range(1, 32))
    assert {positions_at(step, 32, 0.0, 0) for step in range(50)} == {32}
    assert positions_at(0, 0, 1.0, 0) == 0


def test_nested_learning_makes_the_first_positions_a_better_prompt(model, tmp_path):
    """Both learn the same windows; cut to one position, the one that was learned nested is better on them."""
    lost = {}
    for nested in (0.0, 0.5):
        recipe = small_recipe(nested=nested, lr=0.1, ema=0.0, positions=8)
        with open_run(tmp_path / str(nested), {}) as run:
            made = learner(model, recipe, 60, run)
            made.run(silent)
            with torch.no_grad():
                lost[nested] = made._loss(made._learn, torch.arange(10), made.tensors, 1).total.item()
    assert lost[0.5] < lost[0.0] - 1.0
