"""`pull` and `info`: a checkpoint made ready, and what it is said to be."""

from __future__ import annotations

import shutil

from llama.manifest import FILE


def test_info_tells_the_fingerprint_and_what_a_level_would_give(answer, cli, model, base):
    dense, packed = answer("info", model), answer("info", model, "--level", "w3g32")
    assert (dense["name"], dense["level"], packed["level"]) == ("tiny", "dense", "w3g32")
    assert dense["base"] == packed["base"] == base
    assert dense["weights"] != packed["weights"]
    assert (dense["layers"], dense["hidden_size"], dense["vocabulary"], dense["context"]) == (2, 64, 260, 2048)
    assert base in cli("info", model).stdout


def test_pull_copies_a_folder_and_writes_its_manifest(answer, model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns(FILE))
    told = answer("pull", bare, "--to", tmp_path / "to")
    assert (told["folder"], told["base"]) == (str(tmp_path / "to"), answer("info", model)["base"])
    assert (tmp_path / "to" / FILE).is_file()
    assert not (bare / FILE).exists()


def test_a_pulled_model_is_found_by_its_name(answer, model):
    answer("pull", model, "--to", _default("org/tiny"))
    assert answer("info", "org/tiny")["level"] == "dense"


def test_what_cannot_be_pulled_or_quantised_is_one_line(cli, model, tmp_path):
    for words in (("pull", "no-such-model"), ("info", "no-such-model"), ("info", model, "--level", "w3g7")):
        refused = cli(*words)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert refused.stderr.startswith("error: ")


def _default(name):
    from llama.pull import default_folder

    return default_folder(name)
