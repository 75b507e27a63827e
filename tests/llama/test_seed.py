"""The prompts that ship belong to the model that ships: at the default level, and at a calibrated one."""

from pathlib import Path

import pytest

import prompts_store
from llama.fingerprint import derived_weights
from llama.rtn import QUANTISER
from prompts_store.file import read_prompt

SEEDS = Path(prompts_store.__file__).parent / "seeds"
LEVELS = ("w3g64", "w4g64-s50")
BASE = "sha256:91dfa36327b121cf7e46f2d3c86f9d4846e52d6b9c390b21c1fd4b9fb46c6209"
WEIGHTS = "sha256:70fa9eed7436c4229701fbb798691c237f1ab1d6bd4cbfce6e6892dbfe5fd216"


def test_all_of_them_are_small():
    sizes = {seed.name: seed.stat().st_size for seed in SEEDS.iterdir()}
    assert set(sizes) == {f"general.{level}.safetensors" for level in LEVELS}
    assert sum(sizes.values()) <= 5_000_000


@pytest.mark.parametrize("level", LEVELS)
def test_a_seed_names_the_embedded_model_and_its_level(level):
    file = read_prompt(SEEDS / f"general.{level}.safetensors")
    assert (file.prompt.kind, file.prompt.num_virtual_tokens) == ("kv", 32)
    assert (file.prompt.base, file.prompt.bos, file.prompt.chat_template) == (BASE, "tokenizer", "none")
    assert (file.provenance.task, file.provenance.level) == ("general", level)


def test_the_default_level_is_of_the_same_weights_on_every_machine():
    file = read_prompt(SEEDS / "general.w3g64.safetensors")
    assert file.provenance.weights == derived_weights(WEIGHTS, "w3g64", QUANTISER)


@pytest.mark.parametrize("level", LEVELS)
def test_a_seed_says_how_it_was_learned_and_carries_its_self_test(level):
    file = read_prompt(SEEDS / f"general.{level}.safetensors")
    train = file.provenance.train
    assert (train["method"], train["parents"], train["dense"]) == ("learn", [], WEIGHTS)
    assert {"data", "steps", "tokens_seen", "lr", "seed", "divergence", "run"} <= train.keys()
    assert file.provenance.golden is not None
    assert len(file.provenance.golden.ids) == 64
