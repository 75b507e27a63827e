"""`promptstitch matrix`: a table carried out cell by cell, and what it says a cell will take."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lab.matrix
from lab.data.named import documents
from lab.data.splits import split
from lab.estimate import memory, resident_bits
from lab.learn.compute import choose_compute
from lab.learn.recipe import read_recipe
from lab.table import TableError, read_table
from llama.identity import identify
from llama.load import choose_dtype, info

ROOT = Path(__file__).parents[2]

RECIPE = """
[recipes.small]
from = "default"
positions = 4
window = 32
select_windows = 8
init = "random"
"""
SEVEN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def table(tmp_path, checkpoint, pages, unseen):
    """table(runs, …) -> a TOML file of a table over the tiny checkpoint."""

    def write(runs: str, top: str = "", also: object = unseen) -> Path:
        file = tmp_path / "small.toml"
        file.write_text(
            f'model = "{checkpoint}"\nsteps = 3\nwindows = 16\ncalibration_tokens = 200\ndevice = "cpu"\n'
            f'dtype = "float32"\n{top}\n[tasks.letters]\ndata = "{pages}"\nalso = ["{also}:report"]\n{RECIPE}{runs}'
        )
        return file

    return write


RUNS = """
[[runs]]
levels = ["w3g64", "dense"]
kinds = ["rows"]
recipes = ["small"]
tasks = ["letters"]
"""


def test_every_cell_is_carried_out_and_a_second_call_does_nothing(command, table, tmp_path, monkeypatch):
    file = table(
        RUNS + '\n[[runs]]\nlevels = ["w4g64-s50"]\nkinds = ["kv", "norms"]\nrecipes = ["small"]\ntasks = ["letters"]\n'
    )
    root = tmp_path / "root"
    result = command("matrix", file, "--root", root, "--json")
    assert result.exit_code == 0, result.output
    cells = {each["cell"]: each for each in json.loads(result.stdout)["cells"]}
    assert list(cells) == [
        "dense.rows.small.letters.0",
        "w3g64.rows.small.letters.0",
        "w4g64-s50.kv.small.letters.0",
        "w4g64-s50.norms.small.letters.0",
    ]
    assert {each["state"] for each in cells.values()} == {"finished"}
    assert cells["w3g64.rows.small.letters.0"]["dense"] is not None
    assert set(cells["w3g64.rows.small.letters.0"]) >= {"perplexity", "without", "share", "kl_share", "unseen.jsonl"}
    control = cells["w4g64-s50.norms.small.letters.0"]  # figures without a prompt, of the very same kind
    assert control["without"] == pytest.approx(cells["w4g64-s50.kv.small.letters.0"]["without"])
    assert control["perplexity"] != control["without"]
    assert control["kl_share"] is not None
    page = tmp_path / "page"
    assert command("report", root, "--out", page).exit_code == 0
    assert "| w4g64-s50 | norms |" in (page / "results.md").read_text()
    report = json.loads((root / "cells" / "w3g64.rows.small.letters.0" / "report" / "config.json").read_text())
    twin = json.loads((root / "cells" / "dense.rows.small.letters.0" / "learn" / "figures.json").read_text())
    assert report["config"]["equal"] == twin["digest"]
    assert identify(root / "levels" / "w4g64-s50").level == "w4g64-s50"

    def broken(*_args, **_options):
        raise AssertionError("a finished cell was begun again")

    monkeypatch.setattr(lab.matrix, "_carry_out", broken)
    again = json.loads(command("matrix", file, "--root", root, "--json").stdout)["cells"]
    assert {each["state"] for each in again} == {"finished before"}
    assert [each["loss"] for each in again] == [each["loss"] for each in cells.values()]


def test_a_table_that_changed_is_not_answered_with_what_was_found_before(command, table, tmp_path, pages):
    """It said "finished before", and wrote the old figures under the new table."""
    root = tmp_path / "root"
    runs = '\n[[runs]]\nlevels = ["dense", "w4g64-s50"]\nkinds = ["kv"]\nrecipes = ["small"]\ntasks = ["letters"]\n'
    assert command("matrix", table(runs), "--root", root).exit_code == 0
    other = table(runs).read_text().replace("steps = 3", "steps = 4").replace("positions = 4", "positions = 5")
    changed = command("matrix", _file(tmp_path / "changed.toml", other), "--root", root, "--json")
    assert changed.exit_code == 1
    for each in json.loads(changed.stdout)["cells"]:
        assert each["state"] == "failed"
        assert "budget.amount was 3, now 4" in each["error"]
        assert "recipe.positions was 4, now 5" in each["error"]
    # A level that was made of other data or other tokens is not taken either, whoever asks for it first.
    seeds = table(runs + "seeds = [1]\n").read_text()
    more = _file(tmp_path / "more.toml", seeds.replace("calibration_tokens = 200", "calibration_tokens = 300"))
    told = json.loads(command("matrix", more, "--root", root, "--json").stdout)["cells"]
    assert [each["state"] for each in told] == ["finished", "failed"]
    assert "levels/w4g64-s50.run holds a run of another config: data was" in told[1]["error"]
    same = json.loads(command("matrix", _file(tmp_path / "seeds.toml", seeds), "--root", root, "--json").stdout)
    assert [each["state"] for each in same["cells"]] == ["finished before", "finished"]
    # What is to be reported on besides is made up for.
    two = _file(
        tmp_path / "two.toml", table(runs).read_text().replace(':report"]', f':report", "{_copy(pages, tmp_path)}"]')
    )
    told = json.loads(command("matrix", two, "--root", root, "--json").stdout)["cells"]
    assert {each["state"] for each in told} == {"finished"}
    assert "copy.jsonl" in told[1]


def test_data_that_was_learned_from_is_not_reported_on_whole(command, table, pages, tmp_path):
    told = command("matrix", table(RUNS, also=pages), "--root", tmp_path / "root", "--json")
    assert told.exit_code == 1
    assert f"{pages}:report is what a prompt was learned from" in json.loads(told.stdout)["cells"][0]["error"]
    learned = [each.text for each in split(documents(str(pages))).parts["learn"]]
    some = _file(tmp_path / "some.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in learned))
    told = command("matrix", table(RUNS, also=some), "--root", tmp_path / "root", "--json")
    assert "shares words in a row with what is learned from" in json.loads(told.stdout)["cells"][0]["error"]


def _file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _copy(pages: Path, folder: Path) -> str:
    """Of the pages, one letter being another: other data."""
    return str(_file(folder / "copy.jsonl", pages.read_text().replace("a", "b"))) + ":report"


def test_how_a_level_is_made_tells_its_cells_apart(command, table, tmp_path):
    runs = (
        '\n[[runs]]\nlevels = ["dense", "w3g64@gptq"]\nallocations = ["uniform", "sensitivity"]\n'
        'embeddings = ["keep", "q8"]\nrecipes = ["small"]\ntasks = ["letters"]\n'
    )
    file, root = table(runs), tmp_path / "root"
    names = [cell.name for cell in read_table(file).cells]
    models = ["w3g64@gptq", "w3g64@gptq+q8", "w3g64@gptq+sensitivity", "w3g64@gptq+sensitivity+q8"]
    assert names == [f"{model}.rows.small.letters.0" for model in ["dense", *models]]
    assert {cell.twin for cell in read_table(file).cells} == {names[0]}
    only = ["--only", f"{models[-1]}.rows.small.letters.0"]
    assert command("matrix", file, "--root", root, "--only", names[0]).exit_code == 0
    result = command("matrix", file, "--root", root, *only)
    assert result.exit_code == 0, result.output
    assert [each.name for each in (root / "levels").iterdir() if each.suffix != ".run"] == models[-1:]
    made = json.loads((root / "levels" / f"{models[-1]}.run" / "figures.json").read_text())
    assert (made["embedding"], made["allocation"]) == ("q8", "sensitivity")
    page = tmp_path / "page"
    assert command("report", root, "--out", page).exit_code == 0
    assert "| w3g64 | gptq, sensitivity, q8 |" in (page / "results.md").read_text()


def test_a_cell_that_fails_is_told_and_stops_no_other(command, table, tmp_path):
    bad = RECIPE.replace("small", "long").replace("window = 32", "window = 400")
    runs = '\n[[runs]]\nlevels = ["w3g64"]\nrecipes = ["long", "small"]\ntasks = ["letters"]\n'
    root = tmp_path / "root"
    result = command("matrix", table(bad + runs), "--root", root)
    assert result.exit_code == 1
    assert "1 of 2 cells failed" in result.stderr
    told = {each["cell"]: each for each in json.loads((root / "matrix.json").read_text())["cells"]}
    assert "too short for one window of 400 tokens" in told["w3g64.rows.long.letters.0"]["error"]
    assert told["w3g64.rows.small.letters.0"]["state"] == "finished"
    assert "DataError" in (root / "cells" / "w3g64.rows.long.letters.0.error.txt").read_text()


def test_only_one_cell(command, table, tmp_path):
    file, root = table(RUNS), tmp_path / "root"
    waiting = command("matrix", file, "--root", root, "--only", "w3g64.rows.small.letters.0")
    assert waiting.exit_code == 1
    assert "held against the cell dense.rows.small.letters.0, which has not finished" in waiting.stdout
    assert command("matrix", file, "--root", root, "--only", "dense.rows.small.letters.0").exit_code == 0
    assert command("matrix", file, "--root", root, "--only", "w3g64.rows.small.letters.0").exit_code == 0
    unknown = command("matrix", file, "--root", root, "--only", "w9")
    assert unknown.exit_code == 1
    assert "cells are dense.rows.small.letters.0" in unknown.stderr


def test_a_dry_run_tells_tokens_time_and_memory_and_starts_nothing(command, table, tmp_path):
    result = command(
        "matrix", table(RUNS), "--root", tmp_path / "root", "--dry-run", "--tokens-per-second", 128, "--json"
    )
    told = json.loads(result.stdout)
    assert [each["tokens"] for each in told["cells"]] == [3 * 2 * 32] * 2
    learning = 3 * 2 * 32 / 128
    assert all(each["seconds"] >= learning for each in told["cells"])
    assert told["left"]["tokens"] == 2 * 3 * 2 * 32
    assert not (tmp_path / "root").exists()
    for option in (["--memory", "24GB"], ["--tokens-per-second", 128]):
        refused = command("matrix", table(RUNS), "--root", tmp_path / "root", *option)
        assert refused.exit_code == 2
        assert f"{option[0]} is of use with --dry-run only" in refused.stderr


@pytest.fixture
def seven(tmp_path):
    """seven(device) -> what a dry run says of two recipes for a 7B in 24 GB: without and with recomputation."""

    def estimate(command, device: str) -> list[dict]:
        folder, file = tmp_path / "seven", tmp_path / "seven.toml"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(SEVEN))
        file.write_text(
            f'model = "{folder}"\ndevice = "{device}"\ndtype = "bfloat16"\ncompute = "packed"\n'
            '[tasks.web]\ndata = "c4"\n'
            "[recipes.wide]\nbatch = 32\n[recipes.again]\nbatch = 32\nrecompute = true\n"
            '[[runs]]\nlevels = ["w4g64-s50"]\nkinds = ["rows"]\nrecipes = ["wide", "again"]\ntasks = ["web"]\n'
        )
        options = ("--dry-run", "--tokens-per-second", 1000, "--memory", "24GB", "--json")
        return json.loads(command("matrix", file, "--root", tmp_path / "root", *options).stdout)["cells"]

    return estimate


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_dry_run_of_7b_needs_no_weights_and_says_what_fits_24_gb(command, seven, device):
    wide, again = seven(command, device)
    assert (wide["fits"], again["fits"]) == (False, True)
    assert 13.3e9 < again["memory"]["teaching"] < 14.5e9  # the dense model in bf16
    assert 3e9 < again["memory"]["weights"] < 5e9
    assert wide["memory"]["activations"] > 3 * again["memory"]["activations"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "compute", "recompute"),
    [("kv", "packed", False), ("rows", "float32", False), ("kv", "float32", True), ("kv", "int8", False)],
)
def test_the_estimate_of_memory_is_what_is_measured_within_a_fifth(tmp_path, kind, compute, recompute):
    if not (folder := ROOT / "models" / "smollm2-135m").is_dir():
        pytest.skip("the embedded model was not pulled")
    if choose_dtype("auto", torch.device("cpu")) != torch.bfloat16:
        pytest.skip("torch multiplies bf16 so slowly on this CPU that it takes minutes")
    if compute == "int8" and choose_compute("auto", torch.device("cpu")) != "int8":
        pytest.skip("this CPU multiplies no integers")
    script = Path(__file__).with_name("measure_peak.py")
    options = (folder, "w3g64", kind, compute, 256, 4, int(recompute), tmp_path / "run")
    command = [sys.executable, script, *map(str, options)]
    # What the C library keeps of freed pieces is luck, between nothing and the slack: here it keeps nothing.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    recipe = read_recipe("default", kind, {"batch": 4, "recompute": recompute, "distil": 0.0})
    expected = memory(info(folder).config, "w3g64", kind, recipe, compute, "bfloat16", cuda=False)
    assert int(out.stdout) == pytest.approx(replace(expected, slack=0.0).peak, rel=0.2)


@pytest.mark.parametrize(
    ("level", "bits"), [("dense", 16.0), ("w4g64", 4.25), ("w3g64", 4.25), ("w4g64-s50", 3.25), ("s50", 9.0)]
)
def test_bits_in_memory(level, bits):
    assert resident_bits(level) == bits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold model"),
        ('model = "x"\nlevels = 3', "levels is not known"),
        ('model = "x"\n[tasks.a]\ndata = "c4"\n[[runs]]\nlevels = ["w3g64"]\ntasks = ["b"]', r"no \[tasks.b\]"),
        ('model = "x"\n[tasks.a]\ndata = "c4"\n[[runs]]\nlevels = "w3g64"\ntasks = ["a"]', "levels must be a list"),
        (
            'model = "x"\n[tasks.a]\ndata = "c4"\n[[runs]]\nlevels = ["w3g64"]\nembeddings = ["q4"]\ntasks = ["a"]',
            "embeddings: 'q4' is none of keep, q8",
        ),
        (
            'model = "x"\n[tasks.a]\ndata = "c4"\n[[runs]]\nlevels = ["w3g64"]\nkinds = ["x"]\ntasks = ["a"]',
            "none of rows",
        ),
        (
            'model = "x"\nbos = "after-prompt"\n[tasks.a]\ndata = "c4"\n[[runs]]\nlevels = ["w3g64"]\ntasks = ["a"]',
            "bos: 'after-prompt' is none of tokenizer",
        ),
        (
            'model = "x"\n[tasks.a]\ndata = "c4"\n[recipes]\nmine = "mine.toml"\n[[runs]]\nlevels = ["w3g64"]\n'
            'tasks = ["a"]\nrecipes = ["mine"]',
            "recipes.mine must be a table",
        ),
        ("model = ", "cannot be read as TOML"),
    ],
)
def test_a_table_that_does_not_hold_names_the_field(tmp_path, text, message):
    file = tmp_path / "t.toml"
    file.write_text(text)
    with pytest.raises(TableError, match=message):
        read_table(file)


def test_the_table_that_comes_with_it_holds():
    from importlib.resources import files

    found = read_table(files("lab").joinpath("matrices", "smollm2.toml"))
    names = [cell.name for cell in found.cells]
    best = {"rows": "default", "kv": "fine"}
    assert {f"w4g64-s50.{kind}.{best[kind]}.general.{seed}" for kind in best for seed in range(3)} <= set(names)
    assert {cell.twin for cell in found.cells if cell.kind in ("rows", "kv") and cell.seed == 0} - set(names) <= {
        "dense.rows.text.general.0",
        "dense.kv.text.general.0",
        "dense.rows.n32.general.0",
        "dense.rows.bytes.general.0",
    }
    assert all(cell.recipe.distil == 0 for cell in found.cells if cell.level == "dense")
    assert names[:2] == ["dense.kv.default.general.0", "w3g64.kv.default.general.0"]
    assert all(names.index(cell.twin) <= names.index(cell.name) for cell in found.cells if cell.twin in names)
