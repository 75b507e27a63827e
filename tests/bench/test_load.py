"""What the load generator reports is what the fake server did, faults included."""

import json
import time

import httpx
import pytest
from typer.testing import CliRunner

from bench import forms
from bench.fidelity import Measure
from bench.load import Pace, first_tokens, run
from bench.soft_prompts import write_prompts
from bench.workload import Job, Workload, load_tokenizer
from cli.main import app

TEXT = "water house road"
PATH = "/v1/prompts/more/versions?level=dense"
COMMON = ("--requests", "4", "--max-tokens", "3")


def ask(url, models, **kwargs):
    jobs = [Job(TEXT, 3, model, 3) for model in models]
    return run(url, jobs, forms.named("base"), Pace(4), **kwargs)


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
    httpx.post(f"{fake}/v1/prompts/slow/versions?level=dense", content=b"")
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
        httpx.post(f"{fake}/v1/prompts/{task}/versions?level=dense", content=b"")
    jobs = [Job(f"only {i}", 2, ("one", "two")[i % 2]) for i in range(6)]
    first_tokens(fake, jobs, forms.named("base"))
    sent = [(body["model"], body["prompt"]) for body in httpx.get(f"{fake}/seen").json() if "only" in body["prompt"]]
    assert len(sent) == len(set(sent)) == 2 + 2 * 4
    assert [prompt for _, prompt in sent[:2]] == ["only 0", "only 1"]


def test_by_the_clock_requests_go_whatever_became_of_those_before(fake):
    """20 a second: two at a time would take ten times as long, for a slow prompt answers after 0.2 s."""
    httpx.post(f"{fake}/v1/prompts/late/versions?level=dense", content=b"")
    jobs = [Job(TEXT, 3, "late", 3)] * 20
    result = run(fake, jobs, forms.named("base"), Pace(rate=200.0))
    assert result.errors == {}
    assert result.seconds < 20 * 0.2 / 2
    slow = run(fake, jobs[:5], forms.named("base"), Pace(rate=5.0))
    assert slow.seconds > 0.4


def test_clients_that_hang_up_are_neither_good_nor_wrong(fake):
    jobs = [Job(TEXT, 3, None, 8)] * 30
    result = run(fake, jobs, forms.named("base"), Pace(rate=300.0, hang_up=0.5))
    assert result.errors == {}
    assert 5 < result.hung_up < 25
    assert result.output_tokens_per_second == pytest.approx((30 - result.hung_up) * 8 / result.seconds)


def test_answers_have_the_lengths_that_were_asked_of_each(fake, checkpoint):
    jobs = Workload(requests=12, max_tokens=6, least_tokens=2).jobs(load_tokenizer(checkpoint))
    assert {job.max_tokens for job in jobs} == {2, 3, 4, 5, 6}
    result = run(fake, jobs, forms.named("base"), Pace(4))
    assert result.errors == {}
    assert result.output_tokens_per_second == pytest.approx(sum(job.max_tokens for job in jobs) / result.seconds)


def test_uploads_go_on_beside_a_load_each_with_other_bytes(fake, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.uploads.ENOUGH", 0.5)  # a busy machine leaves more than one under way
    [name] = write_prompts(checkpoint, tmp_path, count=1, rows=2)
    prompt = (tmp_path / f"{name}.safetensors").read_bytes()
    jobs = [Job(TEXT, 3, None, 30)] * 8
    seen = httpx.get(f"{fake}/uploads").json()
    result = run(fake, jobs, forms.named("base"), Pace(2, uploads=40.0), upload=(PATH, prompt))
    again = run(fake, jobs, forms.named("base"), Pace(2, uploads=40.0, seed=1), upload=(PATH, prompt))
    assert (result.errors, again.errors) == ({}, {})
    uploads = httpx.get(f"{fake}/uploads").json()[len(seen) :]
    assert len(uploads) == len(set(uploads)) == pytest.approx(40.0 * (result.seconds + again.seconds), rel=0.3)
    jobs = [Job(TEXT, 3, None, 3)]
    refused = run(fake, jobs, forms.named("base"), Pace(2, uploads=40.0), upload=("/nowhere", prompt))
    assert refused.errors["upload: http 404"] > 0


def test_uploads_that_do_not_keep_up_are_told(fake, checkpoint, tmp_path, monkeypatch):
    """A load beside 6 uploads a second passed for one beside 50."""
    monkeypatch.setattr("bench.uploads.CONNECTIONS", 1)
    monkeypatch.setattr("bench.uploads._Client.post", lambda *_: time.sleep(0.2))
    jobs = [Job(TEXT, 3, None, 30)] * 4
    figures = run(fake, jobs, forms.named("base"), Pace(1, uploads=100.0), upload=(PATH, b"x" * 16))
    assert any(error.startswith("uploads too slow: ") for error in figures.errors)


def test_errors_of_the_dense_server_are_told(fake):
    measure = Measure.of(fake, [Job(TEXT, 8, None)] * 2, lambda job: {"model": "busy", "prompt": job.text})
    assert measure.compare(fake, forms.named("base")).errors == {"dense: http 429": 2}


def test_command_line_prints_the_figures_and_fails_on_errors(fake, checkpoint, tmp_path):
    def bench(*args):
        return CliRunner().invoke(app, ["bench", str(checkpoint), "--model", "base", "--url", fake, *COMMON, *args])

    good = bench("--json")
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["errors"] == {}
    wrong = bench("--prompts", "nobody", "--json")
    assert (wrong.exit_code, json.loads(wrong.stdout)["errors"]) == (1, {"http 404": 4})
    assert "--rate" in bench("--hang-up", "0.1").output
    assert "--prompts" in bench("--ttft").output
    assert "whole numbers" in bench("--concurrency", "1,many").output
    assert "leave --concurrency out" in bench("--rate", "9", "--concurrency", "4").output
    assert "one at a time" in bench("--ttft", "--prompts", "a", "--no-stream").output
    assert "--form embeds" in bench("--prompt-dir", str(tmp_path)).output
    by_the_clock = json.loads(bench("--rate", "50", "--json").stdout)
    assert by_the_clock["rate"] == 50
    assert "concurrency" not in by_the_clock


def test_command_line_measures_several_numbers_at_a_time_and_draws_them(fake, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plots" / "growth.svg"
    command = ["bench", str(checkpoint), "--model", "base", "--url", fake, *COMMON]
    done = CliRunner().invoke(app, [*command, "--concurrency", "1,4", "--plot", str(plot), "--json"])
    assert done.exit_code == 0, done.output
    one, four = json.loads(done.stdout)["data"]
    assert (one["concurrency"], four["concurrency"]) == (1, 4)
    assert one["seconds"] > four["seconds"]
    assert "requests at a time" in plot.read_text()
