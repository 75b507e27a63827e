"""`promptstitch learn`: from one command to a prompt file that fits what is served; kills; what is refused."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from lab.learn.compute import choose_compute
from lab.learn.learn import golden
from llama.identity import identify
from llama.load import load
from prompts_store.file import read_prompt

LEVEL = "w3g32"
SMALL = ("window=24", "batch=2", "positions=4", "selections=2", "select_windows=4", "lr=0.05")


def arguments(dense, pages, tmp_path, *more):
    changes = [part for change in SMALL for part in ("--set", change)]
    where = ("--cache", tmp_path / "teacher", "--run", tmp_path / "run")
    usual = ("--level", LEVEL, "--data", pages, "--device", "cpu", *where, *changes)
    return ["learn", str(dense), *map(str, usual), *map(str, more)]


def run(*args):
    result = CliRunner().invoke(app, args[0])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*args):
    result = run(arguments(*args, "--json"))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*args):
    result = run(arguments(*args))
    assert result.exit_code in (1, 2), result.output
    *before, said = result.stderr.splitlines()
    assert said.startswith("error: ")
    assert not any(line.startswith(("error", "Traceback")) for line in before)
    return said


@pytest.mark.parametrize("kind", ["rows", "kv"])
def test_a_prompt_with_where_it_comes_from_and_its_self_test(kind, dense, pages, tmp_path):
    out = tmp_path / "prompt.safetensors"
    told = answer(dense, pages, tmp_path, "--kind", kind, "--task", "cats", "--steps", 6, "--out", out)
    file, identity = read_prompt(out), identify(dense, LEVEL)
    prompt, origin = file.prompt, file.provenance
    assert (prompt.kind, prompt.base, prompt.bos, prompt.num_virtual_tokens) == (kind, identity.base, "tokenizer", 4)
    assert (origin.task, origin.level, origin.weights) == ("cats", LEVEL, identity.weights)
    assert (origin.train["steps"], origin.train["seed"], origin.train["parents"]) == (6, 0, [])
    assert told["digest"] == prompt.digest
    assert told["best"]["loss"] < told["first"]["loss"]
    assert told["best"]["divergence"] > 0
    served = load(dense, level=LEVEL, device="cpu").model
    from lab.data.windows import windows

    ids = torch.tensor([origin.golden.ids])
    again = golden(served, prompt, windows(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1).long()))
    assert again.ids == origin.golden.ids
    assert origin.golden.agrees(again.loss)
    assert again.loss == pytest.approx(origin.golden.loss, abs=1e-6)


def test_the_same_command_again_says_the_same_and_another_is_refused(dense, pages, tmp_path):
    args = (dense, pages, tmp_path, "--steps", 3)
    first = answer(*args)
    file = Path(first["file"]).read_bytes()
    again = answer(*args)
    assert {name for name in first if again[name] != first[name]} <= {"peak_resident_bytes"}
    assert Path(first["file"]).read_bytes() == file
    assert "recipe.lr was 0.05, now 0.5" in refusal(*args, "--set", "lr=0.5")


@pytest.mark.parametrize(("kind", "count"), [("lora", 2 * 4 * (2 * 32 + 32 + 16)), ("norms", 5 * 32)])
def test_a_control_leaves_figures_alone(kind, count, dense, pages, tmp_path):
    told = answer(dense, pages, tmp_path, "--kind", kind, "--steps", 4)
    assert told["file"] is None
    assert told["parameters"] == count
    assert told["best"]["loss"] <= told["first"]["loss"]
    assert not list((tmp_path / "run").glob("prompt*"))
    assert "writes figures and no prompt file" in refusal(
        dense, pages, tmp_path, "--kind", kind, "--out", tmp_path / "x"
    )


def test_a_prompt_is_learned_on_from_another(dense, pages, tmp_path):
    first = answer(dense, pages, tmp_path, "--steps", 3)
    on = ("--kind", "kv", "--init", first["file"], "--run", tmp_path / "second", "--steps", 2)
    second = answer(dense, pages, tmp_path, *on)
    assert read_prompt(Path(second["file"])).provenance.train["parents"] == [first["digest"]]
    assert second["first"]["loss"] == pytest.approx(first["best"]["loss"], abs=1e-3)
    more = ("--init", first["file"], "--set", "positions=5", "--run", tmp_path / "third")
    assert "has 4 positions; ask for as many at most, not 5" in refusal(dense, pages, tmp_path, *more)
    rows = ("--kind", "rows", "--init", second["file"], "--run", tmp_path / "fourth")
    assert "is a kv prompt, which has no rows" in refusal(dense, pages, tmp_path, *rows)


def test_a_time_is_turned_into_steps_once(dense, pages, tmp_path):
    args = (dense, pages, tmp_path, "--budget", "2s", "--set", "selections=1")
    told = answer(*args)
    plan = json.loads((tmp_path / "run" / "figures.json").read_text())["plan"]
    assert plan["steps"] == told["steps"] >= 1
    assert answer(*args)["digest"] == told["digest"]


def test_what_cannot_be_is_said_in_one_line(dense, pages, tmp_path):
    def said(*more):
        return refusal(dense, pages, tmp_path, *more)

    assert "context has 128; lower positions or window" in said("--set", "positions=105")
    assert "init is 'nonsense': neither first, random" in said("--init", "nonsense")
    assert "is no task name" in said("--task", "BoolQ")
    assert "cannot be cut into groups of 64; choose a group" in said("--level", "w3g64")
    assert not (tmp_path / "run").exists()
    assert "nothing is to be learned from itself" in said("--level", "dense")
    assert "--kind is 'vera'" in said("--kind", "vera")
    assert "is a folder; name a file" in said("--out", tmp_path)
    assert "one of default, paper" in said("--recipe", "none")
    assert "not known" in said("--set", "rate=1")
    assert "leaves no time" in said("--budget", "0.001s")
    assert "contradict" in said("--budget", "1m", "--steps", 3)
    assert "too short for one window" in said("--set", "window=120", "--data", _short(tmp_path))


def _short(tmp_path):
    file = tmp_path / "short.jsonl"
    rows = [{"url": f"https://s{n}.org", "text": f"the cat {n} sat"} for n in range(100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_prompts_of_another_base_are_no_start(dense, pages, tmp_path):
    from support.tiny import rows

    from prompts_store.file import PromptFile, write_prompt

    file = tmp_path / "other.safetensors"
    write_prompt(file, PromptFile(rows(4, 32)))
    said = refusal(dense, pages, tmp_path, "--init", file)
    assert "belongs to base sha256:bbbb" in said
    assert "the model's is sha256:1111" in said


def test_a_rate_that_blows_up_says_so_and_leaves_the_state(dense, pages, tmp_path):
    changes = ("--set", "lr=1000.0", "--set", "clip=0", "--set", "warmup=0", "--set", "weight_decay=10.0")
    said = refusal(dense, pages, tmp_path, *changes, "--set", "decay=none", "--steps", 200)
    assert "ower lr" in said
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_a_dry_run_tells_the_plan_and_writes_nothing(dense, pages, tmp_path):
    told = answer(dense, pages, tmp_path, "--dry-run", "--tokens", 480)
    assert (told["steps"], told["parameters"], told["compute"]) == (
        10,
        4 * 32,
        choose_compute("auto", torch.device("cpu")),
    )
    assert told["memory"]["peak"] > sum(
        told["memory"][part] for part in ("weights", "activations", "logits", "learned")
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_prompt(dense, pages, tmp_path, full):
    more = ("--steps", 300, "--set", "selections=60", "--kind", "kv", "--json")
    program = [sys.executable, "-c", "from cli.main import main; main()"]  # as many threads in each
    first = subprocess.run(
        [*program, *arguments(dense, pages, tmp_path / "a", *more)], capture_output=True, check=True, text=True
    )
    whole = json.loads(first.stdout)
    command = [*program, *arguments(dense, pages, tmp_path / "b", *more)]
    dice, killed, log = random.Random(0), 0, tmp_path / "b" / "run" / "log.jsonl"
    while killed < (20 if full else 3):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        held = log.stat().st_size if log.exists() else 0
        while child.poll() is None and (not log.exists() or log.stat().st_size <= held):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        killed += 1
        child.communicate()
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert json.loads(done.stdout)["digest"] == whole["digest"]
