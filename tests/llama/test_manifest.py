"""The manifest: written and read without loss, and strictly."""

import json

import pytest

from llama.errors import BrokenCheckpoint
from llama.manifest import FILE, Manifest

DIGEST = "sha256:" + "0123456789abcdef" * 4
GOOD = Manifest(base=DIGEST, level="w4g128-s50", weights=DIGEST, name="tiny", source="dir")


def test_round_trip(tmp_path):
    GOOD.write(tmp_path)
    assert Manifest.read(tmp_path) == GOOD


def test_none_where_there_is_none(tmp_path):
    assert Manifest.read(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "91dfa363"}, "base must be sha256"),
        ({"weights": DIGEST.upper()}, "weights must be sha256"),
        ({"level": "W4 g128"}, "level"),
        ({"level": ""}, "level must be a text"),
        ({"name": None}, "name must be a text"),
        ({"source": 7}, "source must be a text"),
        ({"format": "promptstitch.manifest.v2"}, "this version reads"),
        ({"colour": "red"}, "unknown fields: colour"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, message):
    GOOD.write(tmp_path)
    raw = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(raw | change))
    with pytest.raises(BrokenCheckpoint, match=message):
        Manifest.read(tmp_path)


def test_a_missing_field_is_named(tmp_path):
    GOOD.write(tmp_path)
    raw = json.loads((tmp_path / FILE).read_text())
    del raw["weights"]
    (tmp_path / FILE).write_text(json.dumps(raw))
    with pytest.raises(BrokenCheckpoint, match="fields: weights"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\xff"])
def test_what_is_no_object_is_refused(tmp_path, text):
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(BrokenCheckpoint, match=FILE):
        Manifest.read(tmp_path)
