"""The page by command: both files, what was left out, and one line where there is nothing."""

from __future__ import annotations

import zipfile

import pytest
from support.runs import PROMPTS, Runs, evaluation, recovery


@pytest.fixture
def runs(tmp_path) -> Runs:
    made = Runs(tmp_path / "runs")
    made.learned(0)
    made.evaluated("report", **evaluation(PROMPTS[0], recovery=recovery(0.61, 0.53)))
    return made


def test_both_files_are_written(answer, runs, tmp_path):
    told = answer("report", runs.root, "--out", tmp_path / "out", "--store", tmp_path / "store")
    assert told["files"] == [str(tmp_path / "out" / name) for name in ("results.html", "results.md")]
    assert (told["runs"], told["measurements"], told["left_out"]) == (2, 0, [])
    for name in ("results.html", "results.md"):
        assert "53.0 % [52.0, 54.0]" in (tmp_path / "out" / name).read_text()


def test_the_original_is_weighed_inside_its_wheel_too(answer, runs, tmp_path):
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/model.gguf", bytes(12_300_000))
        archive.writestr("package/other.py", "x")
    answer("report", runs.root, "--out", tmp_path / "out", "--original", wheel)
    assert "| model.whl | as published | - | 12.3 |" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("made", "more", "said"),
    [
        (False, (), "runs"),
        (True, ("--original", "nothing.gguf"), "--original nothing.gguf"),
        (True, ("--original", "empty.whl"), "0 .gguf"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(cli, tmp_path, monkeypatch, made, more, said):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("x", "")
    if made:
        Runs(tmp_path / "runs").learned(0)
    failed = cli("report", "runs", *more)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
    assert said in failed.stderr


def test_an_empty_folder_gives_no_page(cli, tmp_path):
    (tmp_path / "runs").mkdir()
    failed = cli("report", tmp_path / "runs", "--out", tmp_path / "out")
    assert failed.exit_code == 1
    assert "nothing to report" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_help_fits_a_screen(cli):
    assert len(cli("report", "--help").stdout.splitlines()) <= 40
