"""The prompt that ships belongs to the model that ships, at the level that is served by default."""

from pathlib import Path

import prompts_store
from llama.fingerprint import derived_weights
from llama.rtn import QUANTISER
from prompts_store.file import read_prompt

SEED = Path(prompts_store.__file__).parent / "seeds" / "general.w3g64.safetensors"
BASE = "sha256:91dfa36327b121cf7e46f2d3c86f9d4846e52d6b9c390b21c1fd4b9fb46c6209"
WEIGHTS = "sha256:70fa9eed7436c4229701fbb798691c237f1ab1d6bd4cbfce6e6892dbfe5fd216"


def test_the_seed_names_the_embedded_model_and_the_weights_it_was_learned_through():
    file = read_prompt(SEED)
    assert (file.prompt.kind, file.prompt.num_virtual_tokens) == ("kv", 32)
    assert (file.prompt.base, file.prompt.bos, file.prompt.chat_template) == (BASE, "tokenizer", "none")
    assert (file.provenance.task, file.provenance.level) == ("general", "w3g64")
    assert file.provenance.weights == derived_weights(WEIGHTS, "w3g64", QUANTISER)
    assert SEED.stat().st_size <= 1_600_000


def test_the_seed_says_how_it_was_learned_and_carries_its_self_test():
    file = read_prompt(SEED)
    train = file.provenance.train
    assert (train["method"], train["parents"], train["dense"]) == ("learn", [], WEIGHTS)
    assert {"data", "steps", "tokens_seen", "lr", "seed", "divergence", "run"} <= train.keys()
    assert file.provenance.golden is not None
    assert len(file.provenance.golden.ids) == 64
