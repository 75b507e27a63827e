"""Checkpoints of a few kilobytes on disk, a command line in this process, and one registry reached in two ways."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.fake_engine import BASE, HIDDEN
from support.served import prompt_bytes, serving
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from typer.testing import CliRunner, Result

from cli.main import app
from llama.manifest import Manifest
from llama.pull import pull

SPECIAL = ("<eos>", "<bos>", "<role>", "<pad>")
TEMPLATE = "{% for m in messages %}{{ '<role>' + m['content'] }}{% endfor %}"
Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No setting from outside, and a user's data folder of the test's own."""
    for name in list(os.environ):
        if name.startswith("PROMPTSTITCH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "160")


def run(*args: object, **options: Any) -> Result:
    """A command that must not end in a traceback."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def cli() -> Cli:
    """cli("info", folder) -> the result, whatever its exit code."""
    return run


@pytest.fixture
def answer() -> Callable[..., Any]:
    """answer("info", folder) -> the document of --json, of a command that goes well."""

    def documented(*args: object, **options: Any) -> Any:
        result = run(*args, "--json", **options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return documented


def byte_tokenizer(adds_bos: bool) -> Tokenizer:
    """256 bytes, then SPECIAL, so that any text joined to any other has the ids of both."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 257)])
    return tokenizer


def checkpoint(folder: Path, adds_bos: bool = False, **shape: int) -> Path:
    """The tiny model of `support.tiny`, with its manifest."""
    tiny.reference(**shape).save_pretrained(folder)
    byte_tokenizer(adds_bos).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return pull(str(folder))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A checkpoint whose tokenizer adds nothing to a text."""
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model_with_bos(tmp_path_factory) -> Path:
    """The same, but its tokenizer puts a BOS before plain text."""
    return checkpoint(tmp_path_factory.mktemp("models") / "tiny-bos", adds_bos=True)


@pytest.fixture(scope="session")
def narrow() -> dict[str, int]:
    """The shape of a model that is as wide as the fake engine says it is."""
    return {"hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="session")
def narrow_model(tmp_path_factory, narrow) -> Path:
    """A checkpoint of that shape."""
    return checkpoint(tmp_path_factory.mktemp("models") / "narrow", **narrow)


@pytest.fixture(scope="session")
def base(model) -> str:
    manifest = Manifest.read(model)
    assert manifest is not None
    return manifest.base


@pytest.fixture(params=["store", "url"])
def place(request, tmp_path) -> Iterator[tuple[str, str]]:
    """The options that reach an empty registry: a local one, and one behind a server (of base `support` BASE)."""
    if request.param == "store":
        yield "--store", str(tmp_path / "store")
        return
    with serving(tmp_path / "store") as served:
        yield "--url", served.url


@pytest.fixture
def prompt(tmp_path) -> Callable[..., Path]:
    """prompt(seed, level=…) -> a prompt file of BASE."""

    def write(seed: int = 0, **shape: Any) -> Path:
        path = tmp_path / f"prompt-{seed}.safetensors"
        path.write_bytes(prompt_bytes(seed, **{"base": BASE, **shape}))
        return path

    return write
