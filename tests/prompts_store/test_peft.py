"""PEFT and back: what its library saves we read bit for bit, what we write it loads bit for bit."""

import json
import sys

import peft
import pytest
import torch
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from prompts_store.errors import InvalidArtifact
from prompts_store.file import ANY, Limits, PromptFile, Provenance
from prompts_store.peft import read_peft, read_peft_directory, write_peft

BASE = "sha256:" + "ba" * 32
N, H = 5, 16
PEFT_OF_ITSELF = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning", "ignore::UserWarning:peft.*")


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": H,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "name_or_path": "tiny",
    }
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    ).eval()


def peft_config(kind: str) -> peft.PeftConfig:
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}
    if kind == "PROMPT_TUNING":
        return peft.PromptTuningConfig(**shared)
    return peft.PromptEncoderConfig(**shared, encoder_hidden_size=8)


@PEFT_OF_ITSELF
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_what_peft_saves_is_read_bit_for_bit(llama, tmp_path, kind):
    model = peft.get_peft_model(llama, peft_config(kind))
    with torch.no_grad():
        rows = model.get_prompt_embedding_to_save("default").clone()
    model.save_pretrained(tmp_path)
    file = read_peft_directory(tmp_path, default_base=BASE)
    assert torch.equal(file.prompt.tensors["prompt_embeddings"], rows)
    assert (file.prompt.shape, file.prompt.base, file.bound) == ((N, H), BASE, True)
    assert file.provenance.train == {"peft": {"type": kind, "base_model": "tiny"}}


@PEFT_OF_ITSELF
def test_what_we_write_peft_loads_bit_for_bit_and_generates_with(llama, rows, tmp_path):
    prompt = rows(1, N, H)
    write_peft(tmp_path, PromptFile(prompt), base_model="tiny")
    values = prompt.tensors["prompt_embeddings"]
    text = torch.tensor([[3, 14, 15, 9, 2]])
    embeds = torch.cat([values[None], llama.get_input_embeddings()(text)], dim=1)
    ours = llama.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, pad_token_id=0)
    model = peft.PeftModel.from_pretrained(llama, tmp_path).eval()
    assert torch.equal(model.get_prompt_embedding_to_save("default"), values)
    theirs = model.generate(input_ids=text, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert theirs[0, text.shape[1] :].tolist() == ours[0].tolist()


def test_nothing_is_lost_on_the_way_out_and_in(rows, tmp_path):
    file = PromptFile(rows(1, bos="none"), Provenance("general", "w3g64", BASE, {"steps": 7}, "2026-11-24T05:22:00Z"))
    write_peft(tmp_path / "adapter", file, base_model="some/llama")
    assert read_peft_directory(tmp_path / "adapter") == file


def test_a_kv_prompt_needs_a_model_to_turn_its_keys(kv, tmp_path):
    with pytest.raises(ValueError, match="kv"):
        write_peft(tmp_path, PromptFile(kv()), base_model="x")
    assert list(tmp_path.iterdir()) == []


GOOD = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 4}
WEIGHTS = save({"prompt_embeddings": torch.ones(2, 4)})


def read(config: dict | bytes, weights: bytes = WEIGHTS) -> PromptFile:
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    return read_peft(data, weights, default_base=BASE)


@pytest.mark.parametrize(
    "config", [GOOD, {"peft_type": "P_TUNING"}, {**GOOD, "task_type": None, "num_transformer_submodules": 1}]
)
def test_configs_that_pass(config):
    assert read(config).prompt.shape == (2, 4)
    assert read(b"\n" + json.dumps(config, indent=2).encode() + b"\n").prompt.shape == (2, 4)


@pytest.mark.parametrize(
    "kind", ["PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE", "LORA", "", "prompt_tuning", None]
)
def test_other_kinds_are_refused_by_name(kind):
    with pytest.raises(InvalidArtifact) as refused:
        read({**GOOD, "peft_type": kind})
    assert (refused.value.code, refused.value.field) == ("unsupported_peft_type", "peft_type")
    assert str(kind) in refused.value.message
    assert ("--model" in refused.value.message) == (kind == "PREFIX_TUNING")


PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "num_attention_heads": 2, "token_dim": 8}
PREFIX_WEIGHTS = save({"prompt_embeddings": torch.arange(96, dtype=torch.float32).view(2, 48)})  # 3 layers


def read_prefix(config: dict, limits: Limits = ANY) -> PromptFile:
    def negated(keys: torch.Tensor) -> torch.Tensor:
        return -keys

    return read_peft(json.dumps(config).encode(), PREFIX_WEIGHTS, limits, default_base=BASE, unrotate=negated)


def test_a_prefix_is_read_by_position_layer_and_head_and_its_keys_are_turned():
    file = read_prefix(PREFIX, Limits(hidden_size=16, num_layers=3, num_kv_heads=2, head_dim=4))
    prompt = file.prompt
    assert (prompt.kind, prompt.shape, file.bound) == ("kv", (3, 2, 2, 4), True)
    for layer, head, n, d in ((0, 0, 0, 0), (2, 1, 1, 3), (1, 0, 1, 2)):
        at = n * 48 + layer * 16 + head * 4 + d
        assert prompt.tensors["keys"][layer, head, n, d] == -at
        assert prompt.tensors["values"][layer, head, n, d] == at + 8
    assert file.provenance.train == {"peft": {"type": "PREFIX_TUNING"}}


def test_a_prefix_that_goes_out_comes_in_whole(kv, tmp_path):
    file = PromptFile(kv(1), Provenance("general", "w3g64", BASE, {"steps": 7}))
    write_peft(tmp_path, file, base_model="some/llama", rotate=lambda keys: keys + 1)
    again = read_peft_directory(tmp_path, unrotate=lambda keys: keys - 1)
    assert again.provenance == file.provenance
    torch.testing.assert_close(dict(again.prompt.tensors), dict(file.prompt.tensors))


@pytest.mark.parametrize(
    ("change", "limits", "code"),
    [
        ({"num_attention_heads": 3}, ANY, "shape_mismatch"),
        ({"token_dim": 10}, ANY, "shape_mismatch"),
        ({"num_virtual_tokens": 3}, ANY, "shape_mismatch"),
        ({"token_dim": None}, ANY, "invalid_adapter_config"),
        ({"num_attention_heads": 0}, ANY, "invalid_adapter_config"),
        ({}, Limits(num_layers=2), "shape_mismatch"),
        ({}, Limits(num_kv_heads=1), "shape_mismatch"),
        ({}, Limits(head_dim=8), "shape_mismatch"),
        ({}, Limits(max_virtual_tokens=1), "too_many_virtual_tokens"),
        ({}, Limits(base="sha256:" + "0b" * 32), "base_model_mismatch"),
    ],
)
def test_prefixes_that_do_not_fit(change, limits, code):
    with pytest.raises(InvalidArtifact) as refused:
        read_prefix({**PREFIX, **change}, limits)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"num_virtual_tokens": 3}, "shape_mismatch"),
        ({"token_dim": 5}, "shape_mismatch"),
        ({"num_virtual_tokens": 2**62}, "invalid_adapter_config"),
        ({"num_virtual_tokens": -1}, "invalid_adapter_config"),
        ({"num_virtual_tokens": 2.0}, "invalid_adapter_config"),
        ({"num_virtual_tokens": True}, "invalid_adapter_config"),
        ({"num_virtual_tokens": "2"}, "invalid_adapter_config"),
        ({"num_transformer_submodules": 2}, "invalid_adapter_config"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "invalid_adapter_config"),
        ({"peft_type": ["PROMPT_TUNING"]}, "invalid_adapter_config"),
        ({"base_model_name_or_path": "x" * 1000}, "invalid_adapter_config"),
        ({"revision": {"a": 1}}, "invalid_adapter_config"),
    ],
)
def test_scalars_are_bounded(changes, code):
    with pytest.raises(InvalidArtifact) as refused:
        read({**GOOD, **changes})
    assert refused.value.code == code
    assert refused.value.field in changes


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (b"", "invalid_adapter_config"),
        (b"[]", "invalid_adapter_config"),
        (b"\xff{}", "invalid_adapter_config"),
        (b'{"peft_type":"LORA","peft_type":"PROMPT_TUNING"}', "duplicate_key"),
        (b'{"peft_type":"PROMPT_TUNING","token_dim":NaN}', "non_finite"),
        (b'{"a":' + b"[" * 100_000, "invalid_adapter_config"),
        (b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "invalid_adapter_config"),
    ],
)
def test_the_config_is_strict_json(config, code):
    with pytest.raises(InvalidArtifact) as refused:
        read(config)
    assert refused.value.code == code


def test_weights_of_another_shape_or_name():
    for tensors in (
        {"prompt_embeddings": torch.ones(2, 4), "prefix_task_cols": torch.ones(1, 2)},
        {"lora_A": torch.ones(2, 4)},
    ):
        with pytest.raises(InvalidArtifact) as refused:
            read(GOOD, save(tensors))
        assert refused.value.code == "unexpected_tensor"


def test_a_pickle_is_not_even_opened(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InvalidArtifact, match="only a pickle") as refused:
        read_peft_directory(tmp_path)
    assert refused.value.code == "unsupported_format"


HOSTILE = [
    {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
    {
        "tokenizer_kwargs": {"trust_remote_code": True},
        "tokenizer_name_or_path": "evil/repo",
        "prompt_tuning_init": "TEXT",
    },
    {"megatron_core": "os.system", "megatron_config": {"a": 1}},
    {"auto_map": {"AutoConfig": "evil--x.y"}, "trust_remote_code": True},
    {"base_model_name_or_path": "../../../../etc/passwd", "inference_mode": False},
    {"encoder_hidden_size": 2**60, "num_layers": 2**60, "encoder_num_layers": 2**60},
    {"runtime_config": {"ephemeral_gpu_offload": True}, "_module": "subprocess", "__class__": "os"},
]


def test_hostile_fields_are_not_looked_at(tmp_path):
    """No import, no socket and no file but the two that were named. The hook stays in this process, switched off."""
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS)
    seen, watching = [], []

    def hook(event: str, arguments: tuple) -> None:
        if watching and event.partition(".")[0] in ("import", "open", "socket", "subprocess", "os", "exec"):
            seen.append((event, str(arguments[0]) if arguments else ""))

    sys.addaudithook(hook)
    for fields in HOSTILE:
        config = json.dumps({**GOOD, **fields}).encode()
        watching.append(True)
        try:
            file = read_peft(config, tmp_path / "w.safetensors", default_base=BASE)
        finally:
            watching.clear()
        assert file.prompt.shape == (2, 4)
    assert {event for event in seen if event[1] != str(tmp_path / "w.safetensors")} == set()
