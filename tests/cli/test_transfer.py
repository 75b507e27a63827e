"""Stored prompts on checkpoints they were not learned on: what is written down decides what a server takes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from support.served import serving
from support.tiny import kv, rows

from llama.config import LlamaConfig
from llama.load import info
from prompts_store.file import PromptFile, Provenance, write_prompt
from prompts_store.reference import Reference
from prompts_store.resolution import Query, Served
from prompts_store.store import PromptStore

SIZE = ("--window", 24, "--dtype", "float32", "--device", "cpu")


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Run folders are made where the command is given."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pages(tmp_path) -> Path:
    """160 pages of as many sites."""
    dice = random.Random(0)
    lines = [
        {"url": f"https://site{i}.example/x", "text": "".join(dice.choices("abcdefgh .", k=60))} for i in range(160)
    ]
    path = tmp_path / "pages.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def prompts(folder: Path, base: str) -> list[PromptFile]:
    """Two `rows` prompts and a `kv` one, of levels other than w8g32; the second is by far the worst."""
    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    train = {"parents": []}
    return [
        PromptFile(rows(3, 64, 1, base=base), Provenance(level="w4g32", train=train)),
        PromptFile(rows(3, 64, 2, scale=30.0, base=base), Provenance(level="w3g32", train=train)),
        PromptFile(kv(3, config, 3, base=base), Provenance(level="w2g32", train=train)),
    ]


@pytest.fixture
def store(tmp_path, model, base) -> Path:
    with PromptStore.open(tmp_path / "store") as opened:
        for file in prompts(model, base):
            opened.push(file, "general")
    return tmp_path / "store"


def measured(store: Path) -> list:
    with PromptStore.open(store) as opened:
        return [
            (each.version, each.measurement)
            for version in (1, 2, 3)
            for each in opened.measurements.list("general", version).items
        ]


def resolved(store: Path, model: Path, level: str) -> tuple[str, bool | None]:
    """What a server of the model would take, and whether it was measured."""
    told = info(model, level=level).identity
    with PromptStore.open(store) as opened:
        found = opened.resolve(Query(Reference("general")), Served(told.base, told.level, told.weights))
    assert found.version is not None
    assert found.resolution.how == "transferred"
    return found.version.digest, found.resolution.measured


def test_what_is_best_in_situ_is_what_a_server_takes_from_then_on(answer, store, model, pages):
    assert resolved(store, model, "w8g32")[1] is False
    told = answer("transfer", "--in-situ", model, "--level", "w8g32", "--store", store, "--data", pages, *SIZE)
    by_perplexity = sorted(told["cells"], key=lambda cell: cell["perplexity"])
    assert len(by_perplexity) == 3
    (best,) = told["best"]
    assert (best["task"], best["digest"]) == ("general", by_perplexity[0]["digest"])
    assert best["next_best"] == by_perplexity[1]["prompt"]
    assert best["ahead"]["value"] == pytest.approx(by_perplexity[1]["loss"] - by_perplexity[0]["loss"], abs=1e-6)
    assert resolved(store, model, "w8g32") == (best["digest"], True)
    assert best["served"]["digest"] == best["digest"]
    # Nothing but `select` was looked at, on the weights that are served.
    weights = info(model, level="w8g32").identity.weights
    assert {(m.split, m.served_level, m.served_weights) for _, m in measured(store)} == {("select", "w8g32", weights)}


def test_a_prompt_of_the_very_level_still_goes_first_and_is_named(answer, cli, store, model, base, pages):
    with PromptStore.open(store) as opened:
        native = PromptFile(rows(3, 64, 9, scale=30.0, base=base), Provenance(level="w8g32"))
        opened.push(native, "general")
    asked = ("transfer", "--in-situ", model, "--level", "w8g32", "--store", store, "--data", pages, *SIZE)
    (best,) = answer(*asked)["best"]
    assert best["prompt"] != "general@4"
    assert (best["served"]["prompt"], best["served"]["resolution"]) == ("general@4", "exact")
    assert "general@4 all the same" in cli(*asked).stdout


def test_a_table_measures_both_splits_and_a_second_call_adds_nothing(answer, store, model, pages):
    asked = ("transfer", model, "--level", "w4g32", "--level", "w8g32", "--store", store, "--data", pages, *SIZE)
    told = answer(*asked)
    assert len(told["cells"]) == 2 * 2 * 3
    first = measured(store)
    assert len(first) == 12
    for cell in told["cells"]:
        (found,) = [
            m
            for v, m in first
            if f"general@{v}" == cell["prompt"] and m.split == cell["split"] and m.served_weights == cell["weights"]
        ]
        assert (found.metric, found.value, found.dataset) == ("perplexity", cell["perplexity"], cell["dataset"])
        assert found.gain == cell["gain"]["value"] == pytest.approx(cell["loss_without"] - cell["loss"], abs=1e-9)
        assert found.scored_tokens == cell["scored_tokens"]
    digests = {split: {c["dataset"] for c in told["cells"] if c["split"] == split} for split in ("select", "report")}
    assert len(digests["select"]) == len(digests["report"]) == 1
    assert digests["select"] != digests["report"]
    assert answer(*asked) == told
    assert measured(store) == first


def test_files_are_measured_without_any_store(answer, model, base, tmp_path, pages):
    file = tmp_path / "mine.safetensors"
    write_prompt(file, prompts(model, base)[0])
    told = answer("transfer", model, "--prompt", file, "--data", f"{pages}:report", *SIZE)
    (cell,) = told["cells"]
    assert (cell["prompt"], cell["split"], cell["level"]) == ("mine.safetensors", "report", "dense")
    assert not (tmp_path / "store").exists()


def test_the_run_folder_holds_what_was_told(answer, store, model, pages, tmp_path):
    told = answer("transfer", model, "--store", store, "--data", pages, "--run", tmp_path / "run", *SIZE)
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert {"run": str(tmp_path / "run"), **figures} == told


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((), "--in-situ MODEL"),
        (("MODEL", "--in-situ", "MODEL"), "--in-situ MODEL"),
        (("MODEL",), "--data"),
        (("--in-situ", "MODEL", "--data", "a", "--data", "b"), "one --data"),
        (("MODEL", "--data", "PAGES", "--budget", "3m"), "--budget is of use with --in-situ only"),
        (("--in-situ", "MODEL", "--data", "PAGES", "--budget", "soon"), "--budget"),
        (("--in-situ", "MODEL", "--data", "PAGES:report", "--window", "24"), "leave :report out"),
        (("MODEL", "--data", "PAGES", "--window", "4096"), "--window 4096"),
        (("MODEL", "--data", "PAGES", "--task", "haiku"), "haiku"),
        (("MODEL", "--data", "nothing-of-this-name"), "nothing-of-this-name"),
        (("MODEL", "--data", "PAGES", "--level", "w5g7"), "w5g7"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(cli, store, model, pages, wrong, said):
    words = [word.replace("MODEL", str(model)).replace("PAGES", str(pages)) for word in wrong]
    failed = cli("transfer", *words, "--store", store)
    assert failed.exit_code in (1, 2)
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
    assert said in failed.stderr


def test_a_store_that_is_in_use_is_told_with_what_to_do(cli, store, model, pages):
    with PromptStore.open(store):
        failed = cli("transfer", model, "--store", store, "--data", pages, *SIZE)
    assert failed.exit_code == 1
    assert "stop that one" in failed.stderr
    assert "--url URL" in failed.stderr


@pytest.mark.parametrize("native", [False, True])
def test_a_servers_registry_is_measured_and_reported_as_a_store_is(
    answer, cli, store, model, base, pages, tmp_path, native
):
    if native:  # what a server takes is then what an alias says
        with PromptStore.open(store) as opened:
            for seed in (9, 10):
                opened.push(PromptFile(rows(3, 64, seed, base=base), Provenance(level="w8g32")), "general")
            opened.aliases.put("general", "default", 4)
    copy = tmp_path / "served"
    shutil.copytree(store, copy)
    asked = ("transfer", "--in-situ", model, "--level", "w8g32", "--data", pages, *SIZE)
    table = ("transfer", model, "--level", "w8g32", "--data", f"{pages}:report", *SIZE)
    here = answer(*asked, "--store", store, "--run", tmp_path / "here")
    with serving(copy) as served:
        there = answer(*asked, "--url", served.url, "--run", tmp_path / "there")
        assert {**there, "run": here["run"]} == here
        assert answer(*asked, "--url", served.url, "--run", tmp_path / "there") == there
        taken = there["best"][0]["served"]
        assert (taken["resolution"], taken["prompt"] == "general@4") == ("exact" if native else "transferred", native)
        answer(*table, "--url", served.url)
        shown = answer("report", tmp_path / "there", "--url", served.url, "--out", tmp_path / "page")
        assert shown["measurements"] == (5 if native else 3)
        assert "registry: general@1" in (tmp_path / "page" / "results.md").read_text()
        both = cli(*asked, "--url", served.url, "--store", store)
        assert (both.exit_code, "name two registries" in both.stderr) == (2, True)
    assert [each for each in measured(copy) if each[1].split == "select"] == measured(store)


def test_help_fits_a_screen(cli):
    assert len(cli("transfer", "--help").stdout.splitlines()) <= 50
