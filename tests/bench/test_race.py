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

from bench import fidelity, forms, lineup, machine, page, peers, soft_prompts
from bench.__main__ import figures_table, report, verdict_table
from bench.plan import Claim, Load, Plan
from bench.race import Measured, Race
from bench.result import FirstToken, Result, Start
from bench.server import Contestant, serving
from bench.verdict import beside, judge, medians
from bench.workload import Workload, load_tokenizer

FAKE_SERVER = Path(__file__).with_name("fake_server.py")
SPEED = "output_tokens_per_second"
UPLOADS = "/v1/prompts/more/versions?level=dense"
SMALL = Workload(requests=4, concurrency=2, max_tokens=2)
LOADS = {
    load.name: load
    for load in (
        Load("stitched", SMALL, prompts=2),
        Load("bare", SMALL),
        Load("open", SMALL, kind="open", capacity="bare", capacity_of="vllm", share=0.5),
        Load("uploads", SMALL, prompts=2, uploads=50.0),
        Load("first token", SMALL, prompts=2, kind="first token"),
        Load("start", SMALL, kind="start"),
    )
}


def claim(load, figure=SPEED, ours=("ours*",), peers=("vllm",), **kwargs):
    return Claim("W", "what", load, figure, ours, peers, **({"at_least": 2.0} | kwargs))


def fake_contestant(name, checkpoint, folder):
    """A fake server to which the prompts are uploaded as to ours."""
    names = soft_prompts.write_prompts(checkpoint, folder, count=2, rows=3)
    upload = functools.partial(soft_prompts.upload, folder=folder, names=names)
    code = f"""import fcntl, sys
held = open({str(folder / name)!r} + sys.argv.pop(), "w")
fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a store, which one server holds
exec(open({str(FAKE_SERVER)!r}).read())
"""
    command = [sys.executable, "-c", code, "{port}", ".store{again}"]
    return Contestant(name, "bf16", command, forms.named("base"), {"NOTHING": "1"}, upload, UPLOADS, lambda url: 1e6)


def race_of(plan, checkpoint, folder):
    names = soft_prompts.write_prompts(checkpoint, folder, count=2, rows=3)
    upload = (folder / f"{names[0]}.safetensors").read_bytes()
    return Race(plan, load_tokenizer(checkpoint), names, upload, logs=folder / "logs")


def result(tokens_per_second):
    return Result(1, {}, 0, 1.0, tokens_per_second, 1.0, 1, *[None] * 7, 0.0)


def measured(number, contestant, load, figures):
    return Measured(number, contestant, load, figures, None, 1.0, 0.1, True, 3.0)


def test_rounds_take_turns_and_leave_no_process(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.uploads.ENOUGH", 0.5)  # a busy machine leaves more than one under way
    claims = tuple(claim(load) for load in ("stitched", "bare", "open", "uploads"))
    claims += (claim("first token", "ratio", peers=(), at_least=None, at_most=1.0),)
    claims += (claim("start", "first_answer_seconds", at_least=None, at_most=1.0),)
    race = race_of(Plan(LOADS, claims), checkpoint, tmp_path)
    entrants = [fake_contestant(name, checkpoint, tmp_path) for name in ("ours", "vllm")]
    before = psutil.Process().children()
    rows = list(race.run(entrants, rounds=2))

    both = [(load, name) for load in ("stitched", "bare", "open", "uploads") for name in ("ours", "vllm")]
    turns = [*both, ("first token", "ours"), ("start", "ours"), ("start", "vllm")]
    assert [(row.round, row.load, row.contestant) for row in rows] == [(i, *turn) for i in range(2) for turn in turns]
    assert [row.figures.errors for row in rows] == [{}] * len(rows)
    assert all(0.5 < row.beyond_model_mb < 500 for row in rows if row.load != "start")
    capacity = {row.round: row.figures.requests_per_second for row in rows if (row.load, row.contestant) == both[3]}
    assert [row.rate for row in rows if row.load == "open"] == [capacity[i] / 2 for i in (0, 0, 1, 1)]
    assert all(isinstance(row.figures, Start) for row in rows if row.load == "start")
    assert psutil.Process().children() == before

    told = json.loads(json.dumps(report(rows, entrants, race)))
    assert told["contestants"][0]["command"].startswith("NOTHING=1 ")
    assert len(told["measured"]) == len(rows)
    assert [verdict["peer"] for verdict in told["verdicts"]] == ["vllm"] * 4 + ["", "vllm"]
    text = "\n".join(page.race(told))
    assert "| W | what | ours | vllm | >= 2 |" in text
    assert "Errors: none." in text
    assert "{again}" not in text
    console = Console(width=200, record=True, quiet=True)
    console.print(figures_table(rows), verdict_table(judge(rows, claims)))


def test_fidelity_is_measured_once_with_the_dense_model_for_truth(checkpoint, tmp_path):
    """Both sides of a claim across kinds of weights, the truth beside them though no claim names it."""
    loads = {
        "bare": LOADS["bare"],
        "fidelity": Load("fidelity", replace(SMALL, max_tokens=12), kind="fidelity", truth="dense"),
    }
    plan = Plan(loads, (claim("bare", across=True),))
    assert [load.name for load in plan.needs("dense")] == ["fidelity"]
    assert [load.name for load in Plan(loads, (claim("bare"),)).needs("dense")] == []
    says = {"dense": "one ", "ours": "one ", "vllm": "another "}
    entrants = [replace(fake_contestant(n, checkpoint, tmp_path), env={"SAYS": word}) for n, word in says.items()]
    rows = list(race_of(plan, checkpoint, tmp_path).run(entrants, rounds=2))
    shares = {row.contestant: row.figures.share for row in rows if row.load == "fidelity"}
    assert shares == {"dense": 1.0, "ours": 1.0, "vllm": 0.0}
    assert [row.round for row in rows if row.load == "fidelity"] == [0, 0, 0]
    [verdict] = judge(rows, plan.claims)
    assert (verdict.share, verdict.peer_share) == (1.0, 0.0)
    told = json.loads(json.dumps(report(rows, entrants, race_of(plan, checkpoint, tmp_path))))
    assert "| 100.0% | 0.0% |" in "\n".join(page.race(told))


def test_a_truth_that_takes_no_part_is_named(checkpoint, tmp_path):
    loads = {"fidelity": Load("fidelity", SMALL, kind="fidelity", truth="dense"), "bare": LOADS["bare"]}
    race = race_of(Plan(loads, (claim("bare", across=True),)), checkpoint, tmp_path)
    with pytest.raises(RuntimeError, match="the load fidelity goes by dense, which takes no part"):
        list(race.run([fake_contestant("ours", checkpoint, tmp_path)], rounds=1))


def test_contexts_are_cut_at_words_behind_what_was_given():
    text = "given one two  three four five six seven"
    assert fidelity._cuts(text, behind=len("given")) == [text[:n] for n in (5, 9, 13, 20, 25, 30)]
    assert fidelity._cuts("given one two", behind=5) == []


def test_no_text_is_sent_twice_to_one_process(checkpoint, tmp_path, monkeypatch):
    """A prefix cache would answer a repeated text without computing it."""
    seen = []
    jobs = Race._jobs
    monkeypatch.setattr(Race, "_jobs", lambda *args, **kwargs: seen.append(jobs(*args, **kwargs)) or seen[-1])
    plan = Plan(LOADS, (claim("stitched"), claim("bare"), claim("first token", "ratio", peers=())))
    list(race_of(plan, checkpoint, tmp_path).run([fake_contestant("ours", checkpoint, tmp_path)], rounds=2))
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
        both = running.anonymous_bytes()
        assert both > replace(running, process=child).anonymous_bytes() > 1 << 20
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_ratios_are_of_one_round_and_medians_over_rounds():
    rows = [measured(i, "ours", "stitched", result(x)) for i, x in enumerate((100.0, 300.0, 200.0))]
    rows += [measured(i, "llama.cpp-a", "stitched", result(x)) for i, x in enumerate((50.0, 100.0, 25.0))]
    rows += [measured(i, "llama.cpp-b", "stitched", result(x)) for i, x in enumerate((10.0, 150.0, 50.0))]
    [verdict] = judge(rows, [claim("stitched", peers=("llama.cpp-*",), at_least=2.4)])
    assert (verdict.low, verdict.median, verdict.high, verdict.ok) == (2.0, 2.0, 4.0, False)
    assert (verdict.ours, verdict.peer) == ("ours", "llama.cpp-b")
    assert medians(rows)["ours", "stitched"][SPEED] == 200.0
    assert medians(rows)["ours", "stitched"]["ttft_p50"] is None


def test_a_claim_says_which_of_its_peers_took_no_part():
    rows = [measured(0, name, "bare", result(100.0)) for name in ("ours", "vllm")]
    rows.append(measured(0, "llama.cpp-a", "stitched", result(100.0)))
    [verdict] = judge(rows, [claim("bare", peers=("vllm", "llama.cpp-*"), at_least=1.0)])
    assert (verdict.ok, verdict.peer, verdict.absent) == (True, "vllm", ("llama.cpp-*",))
    assert beside(verdict.peer, verdict.absent) == "vllm, without llama.cpp-*"


def test_the_best_of_ours_counts_unless_each_is_claimed():
    rows = [measured(0, name, "bare", result(x)) for name, x in (("ours-a", 1.0), ("ours-b", 6.0), ("vllm", 2.0))]
    [best] = judge(rows, [claim("bare")])
    assert (best.ours, best.median, best.ok) == ("ours-b", 3.0, True)
    assert [(v.ours, v.ok) for v in judge(rows, [claim("bare", each=True)])] == [("ours-a", False), ("ours-b", True)]


def test_less_is_better_where_there_is_a_most():
    rows = [measured(0, name, "bare", result(x)) for name, x in (("ours-a", 1.0), ("ours-b", 6.0), ("vllm", 2.0))]
    [verdict] = judge(rows, [claim("bare", at_least=None, at_most=0.4)])
    assert (verdict.ours, verdict.median, verdict.ok) == ("ours-a", 0.5, False)


def test_ours_under_another_load_is_the_other_side_where_no_peer_is():
    rows = [measured(0, "ours-a", load, result(x)) for load, x in (("stitched", 3.0), ("bare", 4.0))]
    rows.append(measured(0, "ours-b", "bare", result(400.0)))
    [verdict] = judge(rows, [claim("stitched", ours=("ours-a",), peers=(), peer_load="bare")])
    assert (verdict.median, verdict.peer) == (0.75, "ours-a")


def test_a_claim_without_both_sides_has_no_verdict():
    rows = [measured(0, "ours", "stitched", result(1.0)), measured(1, "vllm", "stitched", result(1.0))]
    [verdict] = judge(rows, [claim("stitched")])
    assert (verdict.median, verdict.ok) == (None, None)


def test_a_claim_may_be_of_a_figure_alone():
    figures = FirstToken(3, {}, 12.0, 10.0, 1.2, 1.1, 1.3, 0.1)
    [verdict] = judge(
        [measured(0, "ours", "first token", figures)],
        [claim("first token", "ratio", peers=(), at_least=None, at_most=1.15)],
    )
    assert (verdict.bound, verdict.median, verdict.peer, verdict.ok) == ("<= 1.15", 1.2, "", False)


def test_the_plan_of_the_race_holds_together():
    """Every load and figure that a claim names is there, and every contestant is put under what claims need of it."""
    plan = Plan.read()
    figures = {"ratio", "first_answer_seconds", "beyond_model_mb", *Result.__dataclass_fields__}
    for each in plan.claims:
        assert each.load in plan.loads
        assert each.against in {"", *plan.loads}
        assert each.figure in figures
        assert (each.at_least is None) != (each.at_most is None)
    needs = {
        name: [load.name for load in plan.needs(name)] for name in ("promptstitch-w8g64", "llama.cpp-q4_0", "vllm")
    }
    assert needs["promptstitch-w8g64"] == ["bare", "single", "fidelity"]
    assert needs["llama.cpp-q4_0"] == ["stitched", "bare", "single", "long", "fidelity"]
    assert needs["vllm"] == ["stitched", "bare", "long", "mixed", "open", "fidelity", "start"]
    assert {each.line for each in Plan.read(only=["W5", "W6"]).claims} == {"W5", "W6"}
    with pytest.raises(ValueError, match="no line W9; lines are W1"):
        Plan.read(only=["W9"])


def test_a_peer_that_is_not_set_up_is_named(tmp_path):
    assert peers.missing(tmp_path, ["promptstitch", "vllm", "llama.cpp-q4_0"]) == ["vllm", "llama.cpp-q4_0"]


def test_a_contestant_of_ours_is_a_level_or_a_folder(checkpoint, tmp_path):
    """A folder's level is in its manifest: none is asked for."""
    made = lineup.ours(checkpoint, tmp_path, tmp_path, (), "w4g64")
    given = lineup.ours(checkpoint, tmp_path, tmp_path, (), str(tmp_path))
    assert (made.name, given.name) == ("promptstitch-w4g64", f"promptstitch-{tmp_path.name}")
    assert made.command[-2:] == ["--level", "w4g64"]
    assert "--level" not in given.command


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
