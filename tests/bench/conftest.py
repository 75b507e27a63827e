"""A fake server that runs as a process, and a small checkpoint folder: a word tokenizer and an embedding table."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from bench import forms
from bench.server import Contestant, serving
from bench.workload import WORDS

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """One token a word, and one for a newline."""
    folder = tmp_path_factory.mktemp("checkpoint")
    vocabulary = {word: i for i, word in enumerate(["?", "\n", *dict.fromkeys(WORDS.split())])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"\n|[^\s]+"), "removed", invert=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    table = torch.arange(len(vocabulary) * 4, dtype=torch.float32).reshape(-1, 4)  # (V, H)
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """URL of a fake server."""
    command = [sys.executable, str(FAKE_SERVER), "{port}"]
    contestant = Contestant("fake", "bf16", command, forms.named("base"))
    with serving(contestant, tmp_path_factory.mktemp("logs") / "fake.log") as running:
        yield running.url
