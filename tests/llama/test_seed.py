"""The prompts that ship belong to the model that ships: at the default level, and at a calibrated one."""

from pathlib import Path

import pytest

import prompts_store
from llama.fingerprint import derived_weights
from llama.rtn import QUANTISER
from prompts_store.file import read_prompt

SEEDS = Path(prompts_store.__file__).parent / "seeds"
SHIPPED = (("chat", "w3g64"), ("general", "w3g64"), ("general", "w4g64-s50"))
TEMPLATE = "sha256:872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788"
BASE = "sha256:91dfa36327b121cf7e46f2d3c86f9d4846e52d6b9c390b21c1fd4b9fb46c6209"
WEIGHTS = "sha256:70fa9eed7436c4229701fbb798691c237f1ab1d6bd4cbfce6e6892dbfe5fd216"


def test_all_of_them_are_small():
    sizes = {seed.name: seed.stat().st_size for seed in SEEDS.iterdir()}
    assert set(sizes) == {f"{task}.{level}.safetensors" for task, level in SHIPPED}
    assert sum(sizes.values()) <= 5_000_000


@pytest.mark.parametrize(("task", "level"), SHIPPED)
def test_a_seed_names_the_embedded_model_and_its_level(task, level):
    file = read_prompt(SEEDS / f"{task}.{level}.safetensors")
    assert (file.prompt.kind, file.prompt.num_virtual_tokens) == ("kv", 32)
    assert (file.prompt.base, file.prompt.bos, file.prompt.chat_template) == (
        BASE,
        "tokenizer",
        TEMPLATE if task == "chat" else "none",
    )
    assert (file.provenance.task, file.provenance.level) == (task, level)


@pytest.mark.parametrize("task", ["chat", "general"])
def test_the_default_level_is_of_the_same_weights_on_every_machine(task):
    file = read_prompt(SEEDS / f"{task}.w3g64.safetensors")
    assert file.provenance.weights == derived_weights(WEIGHTS, "w3g64", QUANTISER)


@pytest.mark.parametrize(("task", "level"), SHIPPED)
def test_a_seed_says_how_it_was_learned_and_carries_its_self_test(task, level):
    file = read_prompt(SEEDS / f"{task}.{level}.safetensors")
    train = file.provenance.train
    assert (train["method"], train["parents"], train["dense"]) == ("learn", [], WEIGHTS)
    assert {"data", "steps", "tokens_seen", "lr", "seed", "divergence", "run"} <= train.keys()
    assert file.provenance.golden is not None
    assert len(file.provenance.golden.ids) == 64
