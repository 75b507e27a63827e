"""One text, answered by a server or by a model that is loaded for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.served import serving, stock

LOCAL = ("--dtype", "float32", "--kv-memory", "16MiB")


@pytest.fixture
def local(model, tmp_path):
    return ("--model", model, "--store", tmp_path / "store", *LOCAL)


def test_the_text_goes_to_stdout_and_its_story_to_stderr(cli, local):
    told = cli("generate", "Hello", "--max-tokens", 5, "--temperature", 0, *local)
    assert told.exit_code == 0
    assert told.stdout.endswith("\n")
    assert told.stderr == "no prompt; 0 soft + 5 text -> 5 tokens; length\n"


def test_a_seed_gives_the_same_answer(answer, local):
    texts = [answer("generate", "Hi", "--seed", 7, "--max-tokens", 12, *local)["text"] for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_message_goes_through_the_chat_template(answer, local):
    told = answer("generate", "Hi", "--chat", "--max-tokens", 1, *local)
    assert told["usage"]["text_tokens"] == 3  # <role> and two bytes


def test_a_task_that_is_not_there_is_an_error_and_optional_does_not_hide_it(cli, local):
    for policy in ("transfer", "optional"):
        missing = cli("generate", "Hi", "--task", "typo", "--resolution", policy, *local)
        assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
        assert "typo" in missing.stderr


def test_a_server_answers_with_the_stitched_prompt(answer, cli, tmp_path):
    with serving(tmp_path / "store", prepare=stock) as served:
        told = answer("generate", "Hi", "--task", "haiku:best", "--max-tokens", 6, "--url", served.url)
        assert (told["prompt"]["task"], told["prompt"]["version"], told["prompt"]["resolution"]) == (
            "haiku",
            1,
            "exact",
        )
        assert told["usage"]["completion_tokens"] == 6
        assert told["finish_reason"] == "length"
        assert len(told["text"]) == 6

        shown = cli("generate", "Hi", "--task", "deep", "--max-tokens", 6, "--url", served.url)
        assert shown.stderr.startswith("deep@1 of w3g64, transferred; 4 soft + 2 text -> 6 tokens")
        refused = cli("generate", "Hi", "--task", "deep", "--resolution", "exact", "--url", served.url)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)


def test_a_part_of_a_prompt(answer, cli, model, local, tmp_path):
    """By a server and without one the same words."""
    with serving(tmp_path / "served", prepare=stock) as served:
        told = answer("generate", "Hi", "--task", "haiku", "--soft-tokens", 3, "--max-tokens", 2, "--url", served.url)
        assert told["usage"]["soft_tokens"] == 3
        refused = cli("generate", "Hi", "--task", "haiku", "--soft-tokens", 5, "--url", served.url)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    answer("prompts", "from-text", "be brief", "--model", model, "--task", "brief", "--store", tmp_path / "store")
    greedy = ("--task", "brief", "--temperature", 0, "--max-tokens", 8)
    texts = {n: answer("generate", "Hi", "--soft-tokens", n, *greedy, *local)["text"] for n in (2, 8)}
    assert texts[8] == answer("generate", "Hi", *greedy, *local)["text"] != texts[2]
    answer("prompts", "from-text", "be", "--model", model, "--task", "be", "--store", tmp_path / "store")
    assert texts[2] == answer("generate", "Hi", "--task", "be", *greedy[2:], *local)["text"]
    for bad in (("--soft-tokens", 9, "--task", "brief"), ("--soft-tokens", 1)):
        refused = cli("generate", "Hi", *bad, *local)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert "--soft-tokens" in refused.stderr


def test_a_cache_too_small_names_the_option(cli, local):
    refused = cli("generate", "Hi", *local[:-1], "1KiB")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "--kv-memory" in refused.stderr


def test_local_options_do_not_go_with_a_server(cli):
    refused = cli("generate", "Hi", "--level", "w3g64", "--url", "http://127.0.0.1:1")
    assert refused.exit_code == 2
    assert "--level" in refused.stderr


def test_text_comes_from_standard_input_too(answer, local):
    assert answer("generate", "-", "--max-tokens", 1, *local, input="123456789")["usage"]["text_tokens"] == 9


@pytest.mark.slow
def test_the_embedded_model_answers_behind_its_shipped_prompt(answer, tmp_path):
    """A tokenizer's stand-ins for spaces once came out as text: the vocabulary lacks a few bytes and was misjudged."""
    model = Path(__file__).parents[2] / "models" / "smollm2-135m"
    if not model.is_dir():
        pytest.skip("make pulls models/smollm2-135m")
    place = ("--model", model, "--level", "w3g64", "--store", tmp_path / "store", "--kv-memory", "64MiB")
    told = answer(
        "generate", "The capital of France is", "--task", "general", "--max-tokens", 8, "--temperature", 0, *place
    )
    assert (told["prompt"]["resolution"], told["prompt"]["same_weights"]) == ("exact", True)
    assert (told["prompt"]["level"], told["usage"]["soft_tokens"]) == ("w3g64", 32)
    assert " " in told["text"]
    assert told["text"].isascii()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stop", ""), "--stop"),
        ((*(("--stop", "x") * 17),), "--stop"),
        (("--top-p", 0), "--top-p"),
        (("--seed", 10**20), "--seed"),
        (("--resolution", "exact"), "--resolution is of use with --task only"),
    ],
)
def test_bounds_are_those_of_a_server(cli, local, options, message):
    refused = cli("generate", "Hello", *options, *local)
    assert refused.exit_code == 2
    assert message in refused.stderr


def test_text_that_is_no_utf_8_is_refused(cli, local):
    for refused in (cli("generate", "-", *local, input=b"caf\xe9"), cli("generate", "\udcff", *local)):
        assert refused.exit_code == 2
        assert "the text is not UTF-8" in refused.stderr
