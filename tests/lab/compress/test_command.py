"""`promptstitch compress`: one line in, a checkpoint and a JSON document out; what is wrong is said in one line."""

import json

import pytest
from support.checkpoints import model
from support.hub import write_checkpoint
from typer.testing import CliRunner

from cli.main import app
from lab.data.splits import part_of
from llama.fingerprint import weights_digest
from llama.manifest import Manifest


@pytest.fixture
def dense(tmp_path):
    """A checkpoint with a tokenizer, all widths multiples of 64, and its manifest."""
    made = model(vocab_size=300, tie_word_embeddings=True)
    state = {name: tensor for name, tensor in made.state_dict().items() if name != "lm_head.weight"}
    folder = write_checkpoint(tmp_path / "dense", config={**made.config.to_dict(), "vocab_size": 300}, state=state)
    Manifest("sha256:" + "1" * 64, "dense", weights_digest(folder), "tiny", "test").write(folder)
    return folder


@pytest.fixture
def pages(tmp_path):
    """60 pages of 60 sites."""
    file = tmp_path / "pages.jsonl"
    rows = [
        {"url": f"https://site{n}.org/", "text": " ".join(f"the cat {n} sat {n * i}" for i in range(40))}
        for n in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*args: object):
    result = CliRunner().invoke(app, ["compress", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*args: object) -> dict:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_document(dense, pages, tmp_path):
    out = tmp_path / "out"
    options = ("--window", 32, "--calibration-tokens", 200, "--device", "cpu", "--embedding", "q8")
    told = answer(dense, "--level", "w4g64-s50", "--data", pages, "--out", out, *options)
    manifest = Manifest.read(out)
    assert (told["weights"], told["base"], told["level"]) == (manifest.weights, manifest.base, "w4g64-s50")
    assert told["weights"] == weights_digest(out)
    assert told["disk_bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert told["calibration_tokens"] == 224  # whole windows
    assert told["paper_smaller"] == 8
    assert told["embedding_lossless"] is False
    assert told["dead_inputs"] == 0
    assert 0 < told["layer_error"] < 0.2
    figures = json.loads((tmp_path / "out.run" / "figures.json").read_text())
    assert figures["weights"] == told["weights"]
    assert len(figures["layers"]) == 8


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(dense, pages, tmp_path):
    def weights(name: str, seed: int) -> str:
        options = ("--window", 32, "--calibration-tokens", 64, "--device", "cpu", "--seed", seed)
        return answer(dense, "--level", "w4g64", "--data", pages, "--out", tmp_path / name, *options)["weights"]

    assert weights("a", 0) == weights("b", 0) != weights("c", 1)


def test_only_the_sites_kept_for_calibration_are_read(dense, pages, tmp_path):
    """Pages of other parts may hold anything: the digest of the data stays."""
    options = ("--window", 32, "--calibration-tokens", 500, "--device", "cpu")
    answer(dense, "--level", "w4g64", "--data", pages, "--out", tmp_path / "a", *options)
    rows = [json.loads(line) for line in pages.read_text().splitlines()]
    for n, row in enumerate(rows):
        if part_of(f"site{n}.org") != "calibration":
            row["text"] = f"other words {n} " * 50
    pages.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer(dense, "--level", "w4g64", "--data", pages, "--out", tmp_path / "b", *options)
    configs = [json.loads((tmp_path / f"{name}.run/config.json").read_text())["config"] for name in "ab"]
    assert configs[0]["data"] == configs[1]["data"]


def test_rounding_to_nearest_needs_no_data(dense, tmp_path):
    told = answer(dense, "--level", "w3g64", "--method", "rtn", "--out", tmp_path / "out", "--device", "cpu")
    assert told["calibration_tokens"] == 0
    assert told["layer_error"] is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--level", "w4g64"), 2, "say --data"),
        (("--level", "w4g128", "--method", "rtn"), 1, "w4g64 would fit"),
        (("--level", "w5g64", "--method", "rtn"), 1, "bits are one of 2, 3, 4, 8"),
        (("--level", "w4g64", "--method", "awq"), 1, "choose one of: gptq, sparsegpt, rtn"),
        (("--level", "w4g64", "--method", "wanda"), 1, "choose one of: gptq, rtn"),
        (("--level", "w4g64", "--scales", "big"), 2, "fitted or largest"),
        (("--level", "w4g64", "--calibration-tokens", "0"), 2, "at least 1"),
        (("--level", "w4g64", "--sweeps", "-1"), 1, "sweeps is -1"),
        (("--level", "w4g64", "--data", "nowhere.txt"), 1, "nowhere.txt is neither a file"),
        (("--level", "w4g64", "--data", __file__), 1, "--part all"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(dense, tmp_path, options, code, message):
    result = run(dense, "--out", tmp_path / "out", "--device", "cpu", *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_order_is_refused(dense, tmp_path):
    options = ("--method", "rtn", "--device", "cpu", "--run", tmp_path / "run")
    answer(dense, "--level", "w4g64", "--out", tmp_path / "a", *options)
    result = run(dense, "--level", "w3g64", "--out", tmp_path / "b", *options)
    assert result.exit_code == 1
    assert "level was" in result.stderr


def test_what_a_method_makes_no_use_of_is_said(dense, tmp_path):
    """So that one command line serves a loop over methods, and nothing is ignored without a word."""
    options = ("--method", "rtn", "--data", "nowhere", "--window", 7, "--sweeps", 9, "--device", "cpu")
    result = run(dense, "--level", "w4g64", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "note: rtn makes no use of --data, --window, --sweeps"
