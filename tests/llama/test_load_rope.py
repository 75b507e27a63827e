"""Positions that no rotation can be made of: refused by the name of the field."""

import json

import pytest
from support.checkpoints import model, save

from llama.errors import BrokenCheckpoint
from llama.load import load

ROPES = {
    "theta": ({"rope_type": "default", "rope_theta": 0}, "rope_theta is 0"),
    "nan": ({"rope_type": "default", "rope_theta": float("nan")}, "rope_theta is nan"),
    "factor": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor of rope_type linear"),
    "llama3": ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}, "low_freq_factor, high_freq_factor"),
    "equal": (
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 2, "high_freq_factor": 2},
        "low_freq_factor, high_freq_factor",
    ),
    "yarn": ({"rope_type": "yarn", "rope_theta": 1, "factor": 2}, "of yarn not 1"),
}


@pytest.mark.parametrize("name", ROPES)
def test_positions_that_cannot_be_turned(tmp_path, name):
    """Divisions by zero, and models that answered nothing finite."""
    rope, message = ROPES[name]
    folder = save(tmp_path, model(tie_word_embeddings=True))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "rope_parameters": rope}))
    with pytest.raises(BrokenCheckpoint, match=message):
        load(folder, device="cpu")
