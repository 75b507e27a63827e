"""PEFT's prefix tuning in and out: served, it says what PEFT's own generate says."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from support import tiny
from support.drive import ask

from engine.engine import LocalEngine
from engine.options import EngineOptions
from engine.served import ServedModel
from llama.config import LlamaConfig
from llama.rope import Rope, rotate, unrotate
from prompts_store.file import PromptFile, read_prompt, write_prompt
from prompts_store.peft import read_peft_directory

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]
N, NEW = 9, 24
TEXTS = [list(b"Once upon a time"), list(b"x"), list(b"The capital of France is")]
FILED = ("--task", "deep", "--level", "dense")


@pytest.fixture
def engine(base):
    torch.set_num_threads(1)
    served = ServedModel("tiny", base, "dense", "sha256:" + "c" * 64, 0)
    made = LocalEngine(tiny.ours(tiny.reference()), tiny.ByteTokenizer(), served, EngineOptions(kv_bytes=1 << 21))
    yield made
    made.close()


def spoken(model, text: list[int]) -> list[int]:
    """PEFT's own greedy continuation."""
    ids = torch.tensor([text])
    whole = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 259, "do_sample": False}
    told = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **whole)
    return told[0, len(text) :].tolist()


def served(engine, text: list[int], prompt) -> list[int]:
    return ask(engine, text, prompt, temperature=0, max_tokens=NEW).wait().tokens[0]


def learner(projection: bool):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=projection, encoder_hidden_size=16
    )
    model = peft.get_peft_model(tiny.reference(), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 0.7)
    return model.eval()


@pytest.mark.parametrize("projection", [False, True])
def test_what_peft_learned_is_served_as_peft_generates(answer, model, base, engine, tmp_path, projection):
    theirs = learner(projection)
    theirs.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "deep.safetensors"
    told = answer("prompts", "import-peft", tmp_path / "adapter", *FILED, "--model", model, "--out", out)
    assert (told["kind"], told["num_virtual_tokens"], told["base"]) == ("kv", N, base)
    prompt = read_prompt(out).prompt
    sent = read_peft_directory(
        tmp_path / "adapter", default_base=base, unrotate=engine.unrotate
    )  # as an upload is read
    assert sent.prompt.digest == prompt.digest
    for text in TEXTS:
        assert served(engine, text, prompt) == spoken(theirs, text) != served(engine, text, None)


def test_what_goes_out_peft_generates_with_as_we_serve_it(answer, model, base, engine, tmp_path):
    prompt = tiny.kv(N, LlamaConfig.from_hf(tiny.reference().config.to_dict()), base=base)
    write_prompt(tmp_path / "deep.safetensors", PromptFile(prompt))
    out = tmp_path / "adapter"
    answer("prompts", "export-peft", tmp_path / "deep.safetensors", out, "--model", model)
    theirs = peft.PeftModel.from_pretrained(tiny.reference(), out).eval()
    for text in TEXTS:
        assert spoken(theirs, text) == served(engine, text, prompt) != served(engine, text, None)
    back = tmp_path / "back.safetensors"
    answer("prompts", "import-peft", out, "--model", model, "--out", back)
    torch.testing.assert_close(dict(read_prompt(back).prompt.tensors), dict(prompt.tensors), atol=1e-6, rtol=0)


def test_a_prefix_is_pushed_like_any_adapter(answer, cli, model, tmp_path):
    learner(False).save_pretrained(tmp_path / "adapter")
    place = ("--store", tmp_path / "store")
    refused = cli("prompts", "import-peft", tmp_path / "adapter", *FILED, *place)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "--model" in refused.stderr
    pushed = answer("prompts", "import-peft", tmp_path / "adapter", *FILED, "--model", model, *place)
    assert (pushed["kind"], pushed["task"], pushed["level"], pushed["new"]) == ("kv", "deep", "dense", True)
    assert pushed["train"]["peft"]["type"] == "PREFIX_TUNING"
    refused = cli("prompts", "export-peft", "deep", tmp_path / "out", *place)
    assert "--model" in refused.stderr


def test_a_kv_prompt_goes_out_through_its_own_base_alone(answer, cli, model, tmp_path):
    prompt = tiny.kv(N, LlamaConfig.from_hf(tiny.reference().config.to_dict()), base="sha256:" + "0b" * 32)
    write_prompt(tmp_path / "deep.safetensors", PromptFile(prompt))
    refused = cli("prompts", "export-peft", tmp_path / "deep.safetensors", tmp_path / "out", "--model", model)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "base" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 256},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    ],
    ids=lambda scaling: scaling.get("rope_type", "default"),
)  # fmt: skip
def test_a_turn_undone_is_no_turn(scaling):
    rope = {"rope_theta": 10_000.0, "rope_type": "default", **scaling}
    config = LlamaConfig.from_hf(json.loads(json.dumps(tiny.reference(rope_parameters=rope).config.to_dict())))
    keys = torch.randn(300, 4, config.head_dim, generator=torch.Generator().manual_seed(0))
    tables = Rope(config.rope, config.head_dim, torch.device("cpu"), torch.float32).tables(torch.arange(300))
    turned = rotate(keys, tables)
    assert (turned - keys).abs().max() > 0.5
    torch.testing.assert_close(unrotate(turned, tables), keys, atol=2e-6, rtol=0)
