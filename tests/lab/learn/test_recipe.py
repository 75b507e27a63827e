"""Recipes: the built-in ones, files, changes, and what is refused by the name of the field; budgets."""

import pytest
import torch
from support.learning import random_windows, small_recipe

from lab.data.documents import Document, Turn
from lab.learn.budget import POOL, Budget, parse_budget, pool, steps_in, steps_of
from lab.learn.recipe import KINDS, LearnError, parse_change, read_recipe


@pytest.mark.parametrize("name", ["default", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_built_in_recipes_hold_for_every_kind(name, kind):
    assert read_recipe(name, kind, {}).lr > 0


def test_the_paper_s_recipe_is_the_paper_s():
    recipe = read_recipe("paper", "rows", {})
    assert (recipe.positions, recipe.window, recipe.batch, recipe.lr, recipe.clip) == (100, 1024, 2, 1e-3, 1.0)
    assert (recipe.init, recipe.decay, recipe.distil, recipe.tokens) == ("first", "linear", 0.0, 30_000 * 2 * 1024)
    assert round(recipe.warmup * 30_000) == 501


def test_a_value_may_differ_by_kind():
    assert read_recipe("default", "rows", {}).lr != read_recipe("default", "kv", {}).lr


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_is_a_recipe(suffix, tmp_path):
    import json

    fields = small_recipe().told() | {"lr": 0.5}
    text = json.dumps(fields) if suffix == "json" else "".join(f"{k} = {json.dumps(v)}\n" for k, v in fields.items())
    file = tmp_path / f"mine.{suffix}"
    file.write_text(text)
    assert read_recipe(str(file), "rows", {}).lr == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate is not known; known are positions"),
        ({"lr": -1.0}, "lr must be from 0"),
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"positions": 2.5}, "positions must be int, got 2.5"),
        ({"positions": True}, "positions must be int, got True"),
        ({"distil": 1.5}, "distil must be from 0 to 1"),
        ({"decay": "stairs"}, "decay must be one of linear, cosine, none"),
        ({"lr": float("nan")}, "lr must be finite"),
    ],
)
def test_what_does_not_hold_is_named(change, message):
    with pytest.raises(LearnError, match=message):
        small_recipe(**change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "neither a file nor one of default, paper"),
        ("lr = ", "cannot be read as TOML"),
        ("lr = 0.1", "positions is missing; `default` has all fields"),
        ("lr = {rows = 1.0}\n", "lr says nothing of kind kv"),
    ],
)
def test_a_file_that_is_no_recipe_says_what_is_wrong(text, message, tmp_path):
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LearnError, match=message):
        read_recipe(str(file), "kv", {})


def test_the_rate_warms_up_and_decays():
    linear = small_recipe(warmup=0.1, decay="linear")
    factors = [linear.factor(step, 100) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.02
    assert [small_recipe(warmup=0.0, decay="none").factor(step, 9) for step in range(9)] == [1.0] * 9
    assert small_recipe(warmup=0.0, decay="cosine").factor(50, 100) == pytest.approx(0.5)


def test_changes_on_the_command_line():
    assert parse_change("lr=0.01") == ("lr", 0.01)
    assert parse_change("recompute=true") == ("recompute", True)
    assert parse_change("init=text:be brief = good") == ("init", "text:be brief = good")
    with pytest.raises(LearnError, match="FIELD=VALUE"):
        parse_change("lr")


def test_a_budget_is_steps_tokens_or_time():
    recipe = small_recipe(tokens=700)
    assert parse_budget("1.5h", None, None, recipe) == Budget(5400, "seconds")
    assert parse_budget("90s", None, None, recipe) == Budget(90, "seconds")
    assert parse_budget(None, 5, None, recipe) == Budget(5, "tokens")
    assert parse_budget(None, None, 5, recipe) == Budget(5, "steps")
    assert parse_budget(None, None, None, recipe) == Budget(700, "tokens")
    for bad in (("15", None, None), ("0m", None, None), (None, 0, None), ("15m", 3, None)):
        with pytest.raises(LearnError):
            parse_budget(*bad, recipe)


def test_tokens_and_time_become_steps():
    learn, recipe = random_windows(100), small_recipe()
    each = learn.lengths.double().mean().item() * recipe.batch
    assert steps_of(Budget(each * 7, "tokens"), learn, recipe) == 7
    assert steps_in(120, 2.0, 5.0, recipe) == (50, 3)  # four selections of five seconds
    assert steps_in(60, 2.0, 5.0, recipe) == (25, 1)  # two, a sixth of the time
    with pytest.raises(LearnError, match=r"leaves no time: a step takes 2\.0 s and a selection 5\.0 s, 2 times"):
        steps_in(11, 2.0, 5.0, recipe)


def test_the_pool_is_whole_epochs_worth_and_the_same_for_like_runs():
    learn, recipe = random_windows(1000), small_recipe(batch=4)
    assert pool(60, learn, recipe) == pool(64, learn, recipe) == POOL
    assert pool(65, learn, recipe) == 2 * POOL
    assert pool(10**6, learn, recipe) == 1000
    assert torch.equal(learn.select(torch.arange(POOL)).ids, learn.ids[:POOL])


def test_completions_are_not_distilled_from_a_model_that_does_not_know_the_task():
    """Banking77 on w4g64-s50 kept 75 % of what the same prompt gains on the dense model, boolq 66 %, when the dense
    model's own guesses at the labels were most of the loss."""
    text, task = Document("a", text="words"), Document("b", text="asked", completion=" answer")
    chat = Document("c", turns=(Turn("user", "Hi"), Turn("assistant", "Hello")))
    recipe = read_recipe("default", "kv", {})
    assert recipe.over([task, task]).distil == 0.0
    for documents in ([text], [chat], [task, text]):
        assert recipe.over(documents).distil == recipe.distil == 0.8
    assert recipe.over([task]).over([text]).distil == 0.0  # decided once


def test_a_share_that_is_asked_for_holds_for_completions_too():
    task = Document("b", text="asked", completion=" answer")
    assert read_recipe("default", "kv", {"distil": 0.5}).over([task]).distil == 0.5
    assert read_recipe("default", "kv", {"distil_tasks": 0.3}).over([task]).distil == 0.3
    assert read_recipe("paper", "rows", {}).over([task]).distil == 0.0
