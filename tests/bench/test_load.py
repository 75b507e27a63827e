"""What the load generator reports is what the fake server did, faults included."""

import json

import httpx
import pytest

from bench import forms
from bench.load import first_tokens, main, run
from bench.workload import Job, Workload

TEXT = "water house road"


def ask(url, models, **kwargs):
    workload = Workload(requests=len(models), concurrency=4, max_tokens=3)
    jobs = [Job(TEXT, 3, model) for model in models]
    return run(url, jobs, forms.named("base"), workload, **kwargs)


def test_good_answers_are_counted_and_timed(fake):
    result = ask(fake, [None] * 8)
    assert result.errors == {}
    assert result.output_tokens_per_second == pytest.approx(8 * 3 / result.seconds)
    assert result.requests_per_second == pytest.approx(8 / result.seconds)
    assert (result.text_tokens, result.cached_tokens) == (24, 40)
    assert 20 <= result.ttft_p50 <= result.ttft_p99
    assert 0 < result.itl_p50 <= result.itl_p99
    assert result.latency_p50 > result.ttft_p50


def test_without_a_stream_there_are_no_first_tokens(fake):
    result = ask(fake, [None] * 4, stream=False)
    assert result.errors == {}
    assert result.ttft_p50 is None
    assert result.itl_p50 is None
    assert result.output_tokens_per_second > 0


def test_every_fault_is_an_error_of_its_own(fake):
    result = ask(fake, ["busy", "broken", "cut", "short", "garbled", "nobody", None])
    assert result.errors == {
        "http 429": 1,
        "error in a 200": 1,
        "cut off": 1,
        "2 tokens, not 3": 1,
        "not JSON": 1,
        "http 404": 1,
    }
    assert result.output_tokens_per_second == pytest.approx(3 / result.seconds)


def test_a_server_that_is_not_there_is_an_error(fake):
    result = ask("http://127.0.0.1:9", [None])
    assert result.errors == {"ConnectError": 1}
    assert result.output_tokens_per_second == 0


def test_greedy_exact_length_requests(fake):
    ask(fake, [None])
    body = httpx.get(f"{fake}/seen").json()[-1]
    assert (body["temperature"], body["max_tokens"], body["ignore_eos"]) == (0, 3, True)
    assert body["stream_options"] == {"include_usage": True}


def test_every_request_has_a_connection_of_its_own(fake):
    """llama.cpp's server closes kept connections after a stream: the next request on one of them was lost."""
    ask(fake, [None] * 8)
    assert len({body["client"] for body in httpx.get(f"{fake}/seen").json()[-8:]}) == 8


def test_first_tokens_compare_the_same_text_with_and_without(fake):
    httpx.post(f"{fake}/v1/prompts/slow/versions", content=b"")
    figures = first_tokens(fake, [Job(f"{TEXT} {i}", 4, "slow") for i in range(7)], forms.named("base"))
    assert figures.pairs == 6  # the first one warmed the prompt up
    assert figures.errors == {}
    assert figures.with_prompt_p50 >= 200
    assert figures.without_p50 >= 20
    assert figures.ratio_low <= figures.ratio <= figures.ratio_high
    assert figures.ratio > 1.2
    last = httpx.get(f"{fake}/seen").json()[-12:]
    assert [body["model"] for body in last] == ["base", "slow", "slow", "base"] * 3
    assert all(a["prompt"] == b["prompt"] for a, b in zip(last[::2], last[1::2], strict=True))


def test_first_tokens_never_send_a_text_twice_in_one_form(fake):
    """The texts that warmed the prompts up came again as pairs: a third of them was answered from the text cache."""
    for task in ("one", "two"):
        httpx.post(f"{fake}/v1/prompts/{task}/versions", content=b"")
    jobs = [Job(f"only {i}", 2, ("one", "two")[i % 2]) for i in range(6)]
    first_tokens(fake, jobs, forms.named("base"))
    sent = [(body["model"], body["prompt"]) for body in httpx.get(f"{fake}/seen").json() if "only" in body["prompt"]]
    assert len(sent) == len(set(sent)) == 2 + 2 * 4
    assert [prompt for _, prompt in sent[:2]] == ["only 0", "only 1"]


def test_command_line_writes_the_figures_and_fails_on_errors(fake, checkpoint, tmp_path):
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(main)
    file = tmp_path / "figures.json"
    common = [
        "--checkpoint",
        str(checkpoint),
        "--url",
        fake,
        "--requests",
        "4",
        "--max-tokens",
        "3",
        "--json",
        str(file),
    ]
    assert CliRunner().invoke(app, common).exit_code == 0
    assert json.loads(file.read_text())["errors"] == {}
    assert CliRunner().invoke(app, [*common, "--prompts", "nobody"]).exit_code == 1
    assert json.loads(file.read_text())["errors"] == {"http 404": 4}
