"""A race over fake servers: rounds in turns, processes gone afterwards, ratios of one round only."""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from bench import forms, machine, soft_prompts
from bench.race import BARE, FIRST_TOKEN, STITCHED, Measured, Race
from bench.result import FirstToken, Result
from bench.server import Contestant, serving
from bench.side_by_side import figures_table, report, verdict_table
from bench.verdict import OURS, Claim, judge, medians
from bench.workload import Workload, load_tokenizer

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


def fake_contestant(name, checkpoint, folder):
    """A fake server to which the prompts are uploaded as to ours."""
    names = soft_prompts.write_prompts(checkpoint, folder, count=2, rows=3)
    upload = functools.partial(soft_prompts.upload, folder=folder, names=names)
    command = [sys.executable, str(FAKE_SERVER), "{port}"]
    return Contestant(name, "bf16", command, forms.named("base"), {"NOTHING": "1"}, upload)


def result(tokens_per_second):
    return Result(1, {}, 1.0, tokens_per_second, 1.0, 1, *[None] * 7, 0.0)


def measured(number, contestant, workload, figures):
    return Measured(number, contestant, workload, figures, 1.0, 0.1, True, 2.0, 3)


@pytest.mark.parametrize("resident", [True, False])
def test_rounds_take_turns_and_leave_no_process(checkpoint, tmp_path, resident):
    workload = Workload(requests=4, concurrency=2, max_tokens=2, prompts=("bench0", "bench1"))
    race = Race(load_tokenizer(checkpoint), None, workload, pairs=2, resident=resident, logs=tmp_path / "logs")
    lineup = [fake_contestant(name, checkpoint, tmp_path) for name in (OURS, "vllm")]
    before = psutil.Process().children()
    rows = list(race.run(lineup, rounds=2))

    turns = [(row.round, row.contestant) for row in rows[::3]]
    assert turns == [(0, OURS), (0, "vllm"), (1, OURS), (1, "vllm")]
    assert len({row.start_seconds for row in rows}) == (2 if resident else 4)
    assert [row.workload for row in rows] == [BARE, STITCHED, FIRST_TOKEN] * 4
    assert [row.figures.errors for row in rows] == [{}] * 12
    assert all(row.rss_bytes > 1 << 20 for row in rows)
    assert psutil.Process().children() == before

    told = json.loads(json.dumps(report(rows, lineup, race)))
    assert told["contestants"][0]["command"].startswith("NOTHING=1 ")
    assert len(told["measured"]) == 12
    assert told["verdicts"][0]["claim"] == "stitched: promptstitch / vllm"
    console = Console(width=200, record=True, quiet=True)
    console.print(figures_table(rows), verdict_table(judge(rows)))


def test_no_text_is_sent_twice_to_one_process(checkpoint, tmp_path, monkeypatch):
    """A prefix cache would answer a repeated text without computing it."""
    seen = []

    def remember(url):
        monkeypatch.setattr(Race, "_jobs", lambda self, workload: seen.append(jobs(self, workload)) or seen[-1])

    jobs = Race._jobs
    contestant = replace(fake_contestant("fake", checkpoint, tmp_path))
    upload = contestant.prepare
    contestant = replace(contestant, prepare=lambda url: (upload(url), remember(url)))
    workload = Workload(requests=4, concurrency=2, max_tokens=2, prompts=("bench0", "bench1"))
    race = Race(load_tokenizer(checkpoint), None, workload, pairs=2, resident=True, logs=tmp_path)
    list(race.run([contestant], rounds=2))
    texts = [job.text for batch in seen for job in batch]
    assert len(texts) == 2 + 2 + 2 * (4 + 4 + 4)
    assert len(set(texts)) == len(texts)


def test_a_server_that_dies_tells_its_last_words(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    dying = Contestant("dying", "bf16", command, forms.named("base"))
    with pytest.raises(RuntimeError, match=r"(?s)dying: ended with 1.*no such model"), serving(dying, tmp_path / "log"):
        pass


def test_children_are_stopped_and_counted(tmp_path):
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"sys.argv = ['', sys.argv[1]]; exec(open({str(FAKE_SERVER)!r}).read())"
    )
    parent = Contestant("parent", "bf16", [sys.executable, "-c", code, "{port}"], forms.named("base"))
    with serving(parent, tmp_path / "log") as running:
        assert httpx.get(f"{running.url}/health").status_code == 200
        [child] = running.process.children()
        alone = running.process.memory_info().rss
        assert running.rss_bytes() > alone
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_ratios_are_of_one_round_and_medians_over_rounds():
    rows = [measured(i, OURS, STITCHED, result(x)) for i, x in enumerate((100.0, 300.0, 200.0))]
    rows += [measured(i, "llama.cpp-a", STITCHED, result(x)) for i, x in enumerate((50.0, 100.0, 25.0))]
    rows += [measured(i, "llama.cpp-b", STITCHED, result(x)) for i, x in enumerate((10.0, 150.0, 50.0))]
    [verdict] = judge(rows, [Claim(STITCHED, "llama.cpp", at_least=2.4)])
    assert (verdict.low, verdict.median, verdict.high, verdict.ok) == (2.0, 2.0, 4.0, False)
    assert medians(rows)[OURS, STITCHED]["output_tokens_per_second"] == 200.0
    assert medians(rows)[OURS, STITCHED]["ttft_p50"] is None


def test_a_claim_without_both_sides_has_no_verdict():
    rows = [measured(0, OURS, STITCHED, result(1.0)), measured(1, "vllm", STITCHED, result(1.0))]
    assert judge(rows) == []


def test_first_token_claim_reads_our_own_ratio():
    figures = FirstToken(3, {}, 12.0, 10.0, 1.2, 1.1, 1.3, 0.1)
    [verdict] = judge([measured(0, OURS, FIRST_TOKEN, figures)])
    assert (verdict.bound, verdict.median, verdict.ok) == ("<= 1.15", 1.2, False)


def test_machine_is_described_and_its_busy_cores_counted():
    told = machine.describe()
    assert told["cores"] >= 1
    assert told["memory_bytes"] > 1 << 28
    before = machine.Reading.now()
    while machine.Reading.now().at < before.at + 0.3:
        pass
    assert 0.5 < machine.Reading.now().busy_cores_since(before) <= told["cores"] + 0.1
    assert machine.wait_until_quiet(1.0, idle_cores=1e9, window=0.01)
    assert not machine.wait_until_quiet(0.05, idle_cores=-1.0, window=0.01)
