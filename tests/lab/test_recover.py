"""`promptstitch recover`: from a dense checkpoint to a measured version in a store, killed and taken up again."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.lab import SMALL, write_model

import lab.recover
import lab.run
from lab.publish import publish
from llama.identity import identify
from prompts_store.file import read_prompt
from prompts_store.records import Measurement
from prompts_store.reference import parse_reference
from prompts_store.resolution import Query, Served
from prompts_store.store import PromptStore


def told(command, *args: object) -> dict:
    result = command("recover", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def asked(checkpoint, pages, tmp_path):
    """The command line of a run in the folder of the test."""
    return [checkpoint, "--data", pages, "--task", "general", *places(tmp_path), *SMALL]


def places(folder: Path) -> list[object]:
    return ["--run", folder / "run", "--store", folder / "store", "--cache", folder / "teacher"]


def test_the_store_holds_version_alias_and_measurements(command, asked, checkpoint, tmp_path):
    found = told(command, *asked, "--level", "w3g64", "--steps", 30)
    served = identify(checkpoint, "w3g64")
    assert (found["base"], found["level"], found["weights"]) == (served.base, "w3g64", served.weights)
    assert found["checkpoint"] is None  # made while it loads
    prompt, perplexity = found["prompt"], found["perplexity"]
    assert perplexity["prompt"] < perplexity["compressed"]
    assert perplexity["dense"] is not None
    assert found["gain"]["interval"][0] > 0
    with PromptStore.open(tmp_path / "store") as store:
        version = store.versions.get("general", prompt["version"])
        assert version.digest == prompt["digest"] == read_prompt(Path(prompt["file"])).prompt.digest
        assert (version.level, version.weights) == ("w3g64", served.weights)
        assert version.golden is not None
        alias = store.aliases.get("general", "default", base=served.base, level="w3g64")
        assert alias.version == version.version
        measured = [each.measurement for each in store.measurements.list("general", version.version).items]
        assert [each.split for each in measured] == ["select", "report"]
        assert measured[1].value == pytest.approx(perplexity["prompt"], rel=1e-6)
        assert measured[1].gain == pytest.approx(found["gain"]["value"], rel=1e-6)
        assert measured[0].dataset != measured[1].dataset
        query = Query(parse_reference("general"), "exact")
        exact = store.resolve(query, Served(served.base, "w3g64", served.weights)).resolution
        assert (exact.how, exact.same_weights) == ("exact", True)
        fresh = identify(checkpoint, "w2g64")
        other = store.resolve(Query(parse_reference("general")), Served(fresh.base, "w2g64", fresh.weights))
        assert (other.resolution.how, other.version.version) == ("transferred", version.version)


def test_the_page_and_the_lines_that_serve_it(command, asked, tmp_path):
    result = command("recover", *asked, "--level", "w3g64", "--steps", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("expected: ")
    assert lines[-2].startswith(f"promptstitch serve {asked[0]} --level w3g64 --dtype float32 --store ")
    assert lines[-1].startswith("curl -s http://127.0.0.1:8000/v1/generate ")
    assert json.loads(lines[-1].partition(" -d ")[2].strip("'"))["resolution"] == "exact"
    page = (tmp_path / "run" / "results.html").read_text()
    assert "w3g64" in page
    assert "4 of 4 report" not in result.stdout  # progress goes to stderr
    assert "2 of 4 select: start" in result.stderr
    assert "all done about" in result.stderr


def test_a_level_that_needs_the_solver_leaves_a_checkpoint(command, asked, tmp_path):
    found = told(command, *asked, "--level", "w4g64-s50", "--steps", 2, "--calibration-tokens", 200)
    folder = Path(found["checkpoint"])
    assert folder == tmp_path / "run" / "checkpoint"
    assert identify(folder).weights == found["weights"] == found["compressed"]["weights"]
    assert found["serve"].startswith(f"promptstitch serve {folder} --dtype float32")
    again = told(command, *asked, "--level", "w4g64-s50", "--steps", 2, "--calibration-tokens", 200)
    assert again["prompt"] == {**found["prompt"], "new": again["prompt"]["new"], "why": again["prompt"]["why"]}


@pytest.mark.parametrize(
    "options",
    [["--calibration-tokens", 300], ["--seed", 1], ["--method", "magnitude"], ["--embedding", "q8"]],
    ids=lambda options: options[0],
)
def test_a_checkpoint_that_was_made_otherwise_is_not_taken(command, asked, checkpoint, tmp_path, options):
    """Whatever had the base and the level was taken, and the run's config said what was asked for."""
    level = ["--level", "w4g64-s50", "--steps", 2, "--calibration-tokens", 200, "--out", tmp_path / "made"]
    told(command, *asked, *level)
    asked[asked.index("--run") + 1] = tmp_path / "second"
    result = command("recover", *asked, *level, *options)
    assert result.exit_code == 1
    assert "made.run holds a run of another config" in result.stderr


def test_a_checkpoint_whose_making_is_not_known_is_not_taken(command, asked, pages, checkpoint, tmp_path):
    made = ["--level", "w4g64-s50", "--data", pages, "--calibration-tokens", 200, "--out", tmp_path / "made"]
    assert command("compress", checkpoint, *made, "--window", 32, "--run", tmp_path / "elsewhere").exit_code == 0
    _refused(command("recover", *asked, *made[:2], "--steps", 2, *made[-2:]), "which would say how it was made")


def test_a_compressed_model_is_not_taken_for_the_dense_one(command, asked, checkpoint, pages, tmp_path):
    made = ["--level", "w4g64", "--method", "rtn", "--out", tmp_path / "made"]
    assert command("compress", checkpoint, *made).exit_code == 0
    _refused(
        command("recover", *asked, "--level", "w3g64", "--dense", tmp_path / "made"), "made is w4g64; name the dense"
    )
    learned = told(command, *asked, "--level", "w3g64", "--steps", 2)["prompt"]["file"]
    measure = ["evaluate", checkpoint, "--level", "w3g64", "--text", pages, "--window", 32, "--prompt", learned]
    _refused(command(*measure, "--dense", tmp_path / "made"), "made is w4g64; name the dense")
    _refused(command(*measure, "--dense", checkpoint, "--dense-prompt", learned), "was learned at w3g64")


def test_the_default_is_measured_on_what_the_new_one_is(command, asked, tmp_path):
    """On other windows the two could not be compared, and the worse one became the default."""
    first = told(command, *asked, "--level", "w3g64", "--steps", 40)
    asked[asked.index("--run") + 1] = tmp_path / "second"
    asked[asked.index("--windows") + 1] = 16
    second = told(command, *asked, "--level", "w3g64", "--steps", 1, "--seed", 1)
    assert first["prompt"]["promoted"]
    assert not second["prompt"]["promoted"]
    assert "general@1, the default, has perplexity" in second["prompt"]["why"]
    with PromptStore.open(tmp_path / "store") as store:
        measured = [each.measurement for each in store.measurements.list("general", 1).items]
        assert [each.split for each in measured] == ["select", "report", "select"]


def test_killed_while_learning_it_goes_on_to_the_same_prompt(command, asked, checkpoint, pages, tmp_path):
    whole = told(command, *asked, "--level", "w3g64", "--steps", 200)
    other = tmp_path / "killed"
    line = [
        checkpoint,
        "--data",
        pages,
        "--task",
        "general",
        *places(other),
        *SMALL,
        "--level",
        "w3g64",
        "--steps",
        200,
    ]
    process = subprocess.Popen(
        [Path(sys.executable).parent / "promptstitch", "recover", *map(str, line)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.startswith("PROMPTSTITCH_")},
    )
    log = other / "run" / "learn" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b'"event": "step"') > 15):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (other / "run" / "learn" / "prompt.safetensors").exists(), "it was over before it could be killed"
    assert (other / "run" / "learn" / "state.safetensors").exists()
    assert told(command, *line)["prompt"]["digest"] == whole["prompt"]["digest"]


def test_a_finished_step_is_not_done_again(command, asked, tmp_path, monkeypatch):
    """Cut short while it measured: what was learned stays as it is, and nothing is pushed twice."""

    def broken(*_args, **_options):
        raise lab.run.RunError("no room")

    monkeypatch.setattr(lab.recover, "prove", broken)
    result = command("recover", *asked, "--level", "w3g64", "--steps", 4)
    assert result.exit_code == 1
    assert "no room" in result.stderr
    monkeypatch.undo()
    kept = {file: file.read_bytes() for file in (tmp_path / "run" / "learn").iterdir() if file.name != ".lock"}
    monkeypatch.setattr(lab.recover, "learn", broken)
    first = told(command, *asked, "--level", "w3g64", "--steps", 4)
    assert {file: file.read_bytes() for file in kept} == kept
    monkeypatch.setattr("lab.prove.load", broken)
    again = told(command, *asked, "--level", "w3g64", "--steps", 4)
    assert again["perplexity"] == first["perplexity"]
    assert again["prompt"]["version"] == first["prompt"]["version"] == 1
    with PromptStore.open(tmp_path / "store") as store:
        assert len(store.measurements.list("general", 1).items) == 2


def test_another_order_in_the_same_folder_is_refused(command, asked):
    told(command, *asked, "--level", "w3g64", "--steps", 2)
    result = command("recover", *asked, "--level", "w4g64", "--steps", 2)
    assert result.exit_code == 1
    assert 'level was "w3g64", now "w4g64"' in result.stderr


@pytest.fixture
def learned(command, asked):
    """A prompt file, and measurements of it that say nothing of a gain."""
    found = told(command, *asked, "--level", "w3g64", "--steps", 2)
    file = read_prompt(Path(found["prompt"]["file"]))

    def measured(split: str, value: float, *gain: float) -> Measurement:
        return Measurement(
            "perplexity", value, "sha256:" + "d" * 64, split, "w3g64", file.provenance.weights, 100, *gain
        )

    return file, measured


def unasked(_file):
    raise AssertionError("what the default is worth is known already")


@pytest.mark.parametrize(
    ("gain", "promoted"), [((0.1, 0.01, 0.2), True), ((0.1, -0.01, 0.2), False), ((0.1, 0.0, 0.2), False), ((), False)]
)
def test_the_default_moves_only_for_a_gain_that_is_more_than_chance(learned, tmp_path, gain, promoted):
    file, measured = learned
    with PromptStore.open(tmp_path / "fresh") as store:
        found = publish(
            store, file, "general", measured("select", 9.0, *gain), measured("report", 9.0, 1.0, 0.5, 2.0), unasked
        )
        assert found.promoted is promoted
        assert len(store.aliases.list("general").items) == promoted
        again = publish(
            store, file, "general", measured("select", 9.0, *gain), measured("report", 9.0, 1.0, 0.5, 2.0), unasked
        )
        assert (again.new, again.promoted, again.version) == (False, promoted, found.version)


def test_a_default_that_was_measured_better_stays(learned, tmp_path):
    file, measured = learned
    gain = (0.1, 0.05, 0.2)
    with PromptStore.open(tmp_path / "fresh") as store:
        publish(store, file, "general", measured("select", 9.0, *gain), measured("report", 9.0), unasked)
        other = type(file)(file.prompt.first(2), file.provenance)
        worse = publish(store, other, "general", measured("select", 9.5, *gain), measured("report", 8.0), unasked)
        assert (worse.version.version, worse.promoted) == (2, False)
        assert "general@1" in worse.why
        best = type(file)(file.prompt.first(3), file.provenance)
        assert publish(
            store, best, "general", measured("select", 8.0, *gain), measured("report", 9.5), unasked
        ).promoted
        base = file.prompt.base
        assert store.aliases.get("general", "default", base=base, level="w3g64").version == 3


WRONG = {
    "empty": (b"", "is empty"),
    "not_utf8": (b'{"text": "caf\xe9"}\n', "is not UTF-8: byte 13"),
    "half_json": (b'{"text": "whole"}\n{"text": "ha', "line 2 is not JSON"),
    "no_field": (b'{"body": "x"}\n', "none of the fields text"),
    "one_site": (b'{"text": "a b c"}\n', "give more documents"),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_that_cannot_be_used(command, checkpoint, tmp_path, name):
    data, message = WRONG[name]
    file = tmp_path / f"{name}.jsonl"
    file.write_bytes(data)
    options = ["--data", file, "--task", "general", "--level", "w3g64", "--steps", 2, *places(tmp_path), *SMALL]
    _refused(command("recover", checkpoint, *options), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "w3g64", "--set", "window=400"], "too short for one window of 400 tokens"),
        (["--level", "w3g64", "--set", "positions=2040"], "the model's context has 2048"),
        (["--level", "w5g64"], "bits are one of 2, 3, 4, 8"),
        ([], "say which level"),
        (["--level", "w3g64", "--method", "wanda"], "choose one of: gptq, rtn"),
        (["--level", "w3g64", "--allocation", "sensitivity"], "is made while loading and writes no checkpoint"),
        (["--level", "w3g64", "--out", "made"], "--out: w3g64 is made while loading, so no checkpoint is written"),
        (["--level", "s50", "--allocation", "even"], "choose one of: uniform, sensitivity"),
    ],
)
def test_orders_that_cannot_be_had(command, asked, options, message):
    _refused(command("recover", *asked, "--steps", 2, *options), message)


def test_a_dense_model_of_another_base(command, checkpoint, pages, tmp_path):
    other = write_model(tmp_path / "other", seed=1, base="sha256:" + "2" * 64)
    options = ["--data", pages, "--task", "general", "--level", "w3g64", "--steps", 2, *places(tmp_path), *SMALL]
    _refused(command("recover", checkpoint, *options, "--dense", other), "is of base sha256:2222")


def test_a_loss_that_is_no_number_says_what_to_lower(command, asked, tmp_path, monkeypatch):
    from lab.learn import loop

    before = loop.chunked_loss

    def broken(*args):
        loss = before(*args)
        return loss if not loss.total.requires_grad else loop.replace(loss, total=loss.total * float("nan"))

    monkeypatch.setattr(loop, "chunked_loss", broken)
    _refused(command("recover", *asked, "--level", "w3g64", "--steps", 4), "Lower lr")
    assert (tmp_path / "run" / "learn" / "state.safetensors").exists()
    monkeypatch.undo()
    assert told(command, *asked, "--level", "w3g64", "--steps", 4)["prompt"]["version"] == 1


def test_a_full_disk_leaves_what_was_saved(command, asked, monkeypatch):
    """And with room again, the same command ends as one that had it all along."""
    before, saved = lab.run.save_file, []

    def full(*args, **options):
        saved.append(args)
        if len(saved) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return before(*args, **options)

    monkeypatch.setattr(lab.run, "save_file", full)
    _refused(command("recover", *asked, "--level", "w3g64", "--steps", 30), "No space left on device")
    monkeypatch.undo()
    assert told(command, *asked, "--level", "w3g64", "--steps", 30)["prompt"]["tokens_seen"] == 30 * 2 * 32


def _refused(result, message: str) -> None:
    assert result.exit_code in (1, 2), result.output
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
