"""A tiny checkpoint that loads at several levels, prompts for it, and pages of random letters."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.checkpoints import model, save
from support.tiny import ByteTokenizer, kv, rows

from lab.data.documents import Document
from lab.transfer.prompts import Contender
from lab.transfer.samples import Sample, sample
from lab.transfer.transfer import Model, Order, models_of
from llama.config import LlamaConfig
from llama.manifest import Manifest

LEVELS = ("dense", "w4g64", "w3g64")


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("dense") / "model", model())


@pytest.fixture(scope="session")
def base(dense) -> str:
    manifest = Manifest.read(dense)
    assert manifest is not None
    return manifest.base


@pytest.fixture(scope="session")
def models(dense) -> list[Model]:
    return models_of([dense], LEVELS)


def documents(count: int = 9, letters: int = 150, seed: int = 0) -> list[Document]:
    dice = random.Random(seed)
    return [
        Document(f"d{i}", f"site{i}.example", "".join(dice.choices("abcdefgh ", k=letters - 7 * (i % 3))))
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def pages() -> Sample:
    """About 40 windows of 32 tokens of nine documents, to select on."""
    return sample("pages", "select", documents(), ByteTokenizer(), 32, ["none", "after_prompt"])


@pytest.fixture(scope="session")
def contenders(models, base) -> list[Contender]:
    """`rows` learned nowhere in particular at two levels, and a `kv` prompt with a BOS behind it."""
    dense, w4, w3 = (each.identity for each in models)
    config = LlamaConfig.from_hf(model().config.to_dict())
    return [
        Contender(rows(5, 128, 1, base=base), "t@1", "t", 1, "w4g64", w4.weights, ()),
        Contender(rows(3, 128, 2, base=base), "t@2", "t", 2, "w3g64", w3.weights, ()),
        Contender(kv(4, config, 3, base=base, bos="after_prompt"), "t@3", "t", 3, "dense", dense.weights, None),
    ]


@pytest.fixture
def order(models, contenders, pages):
    """order(budget=…) -> the whole table."""

    def made(**changes) -> Order:
        told = {"models": models, "contenders": contenders, "samples": [pages], "window": 32, "dtype": "float32"}
        return Order(**{**told, "device": "cpu", **changes})

    return made


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
