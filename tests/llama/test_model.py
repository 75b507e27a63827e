"""The forward pass is transformers' own: every shape, bias and rotation, behind a kv prefix, and backwards."""

import json

import pytest
import torch
from support.checkpoints import model, save
from support.exact import kv_cache
from support.tiny import kv
from transformers import LlamaForCausalLM

from llama.load import load
from llama.model import CausalAttention
from llama.rope import rotate

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "every head its own keys": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "head_dim of its own": {"head_dim": 32},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 0.05},
}
ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, attention factor": YARN | {"attention_factor": 1.7},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
    "yarn, one mscale": YARN | {"mscale": 0.7},
    "yarn, untruncated": YARN | {"truncate": False},
    "yarn, factor 1": YARN | {"factor": 1.0},
}


def token_ids(batch, length):
    return torch.randint(260, (batch, length), generator=torch.Generator().manual_seed(1))


def from_embedded(model, x, batch, length, prefix=None):
    """x (B * T, H) → logits (B, T, V)."""
    start = 0 if prefix is None else prefix[0].shape[2]
    positions = torch.arange(start, start + length).repeat(batch)
    return model.logits(model(x, positions, CausalAttention(batch, prefix))).view(batch, length, -1)


def our_logits(model, ids, prefix=None):
    """ids (B, T) → logits (B, T, V), behind a kv prefix as CausalAttention takes it."""
    return from_embedded(model, model.embed(ids.flatten()), *ids.shape, prefix)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.fixture
def both(tmp_path):
    """both(**config) -> (our model read from the folder that the other one was saved in, transformers' model)."""

    def make(shard="1GB", **config):
        theirs = model(**config)
        save(tmp_path / "model", theirs, max_shard_size=shard)
        return load(tmp_path / "model", dtype="float32", device="cpu").model, theirs

    return make


@torch.inference_mode()
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_logits_of_a_batch(both, config):
    ours, theirs = both(**config)
    ids = token_ids(2, 48)
    same(our_logits(ours, ids), theirs(ids).logits)


@torch.inference_mode()
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_every_rotation(both, rope):
    ours, theirs = both(rope_parameters=rope, max_position_embeddings=256)
    ids = token_ids(2, 200)
    same(our_logits(ours, ids), theirs(ids).logits)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama3", "yarn", "linear"])
def test_rotations_as_older_files_declare_them(tmp_path, name):
    """`rope_theta` at the top, `type` or `rope_type` in `rope_scaling`, and a null among its fields."""
    save(tmp_path, model(max_position_embeddings=256))
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    scaling = {field: value for field, value in ROPES[name].items() if field != "rope_theta"}
    if name == "linear":
        scaling["type"] = scaling.pop("rope_type")
    raw |= {"rope_theta": 700.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = token_ids(1, 200)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    same(our_logits(load(tmp_path, dtype="float32", device="cpu").model, ids), theirs(ids).logits)


@torch.inference_mode()
def test_the_context_matters_and_the_rotation_matters(both):
    """The comparisons above would be idle if the logits did not depend on them."""
    ours, _ = both(rope_parameters=ROPES["yarn"])
    other, _ = both(rope_parameters=ROPES["theta"])
    ids = token_ids(1, 48)
    assert (our_logits(ours, ids) - our_logits(other, ids)).abs().max() > 0.1
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 260
    assert (our_logits(ours, ids) - our_logits(ours, changed))[0, -1].abs().max() > 0.01


@torch.inference_mode()
def test_shards(both, tmp_path):
    ours, theirs = both(shard="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    ids = token_ids(2, 24)
    same(our_logits(ours, ids), theirs(ids).logits)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_kv_prefix_is_seen_whole_and_the_rest_causally(both, length, tokens):
    """Keys come unrotated in a prompt and are turned for positions 0..N-1; each of the batch sees the same prefix."""
    ours, theirs = both()
    prompt = kv(tokens, ours.config)
    table = ours.rope.tables(torch.arange(tokens))
    keys = torch.stack([rotate(k.transpose(0, 1), table).transpose(0, 1) for k in prompt.tensors["keys"]])
    ids = token_ids(2, length)
    logits = our_logits(ours, ids, (keys, prompt.tensors["values"]))
    for row, text in zip(logits, ids, strict=True):
        same(row, theirs(text[None], past_key_values=kv_cache(theirs, prompt)).logits[0])
    assert (logits - our_logits(ours, ids)).abs().max() > 0.01


@torch.inference_mode()
def test_soft_rows_are_embeddings_like_others(both):
    ours, theirs = both()
    x = torch.randn(2, 30, 128, generator=torch.Generator().manual_seed(5)) * 0.2
    same(from_embedded(ours, x.flatten(0, 1), 2, 30), theirs(inputs_embeds=x).logits)


@pytest.mark.parametrize("config", [{}, {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}])
def test_the_gradient_of_the_input(both, config):
    ours, theirs = both(**config)
    start = torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(5)) * 0.2
    weights = torch.randn(2, 20, 260, generator=torch.Generator().manual_seed(6))
    mine, yours = start.clone().requires_grad_(), start.clone().requires_grad_()
    (from_embedded(ours, mine.flatten(0, 1), 2, 20) * weights).mean().backward()
    (theirs(inputs_embeds=yours).logits * weights).mean().backward()
    assert yours.grad.abs().max() > 1e-3
    torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_the_gradient_of_a_kv_prefix(both):
    ours, theirs = both()
    prompt = kv(5, ours.config)
    values = prompt.tensors["values"].clone().requires_grad_()
    table = ours.rope.tables(torch.arange(5))
    keys = torch.stack([rotate(k.transpose(0, 1), table).transpose(0, 1) for k in prompt.tensors["keys"]])
    ids = token_ids(1, 9)
    our_logits(ours, ids, (keys, values)).square().mean().backward()
    cache = kv_cache(theirs, prompt)
    leaves = [layer.values.clone().requires_grad_() for layer in cache.layers]
    for layer, leaf in zip(cache.layers, leaves, strict=True):
        layer.values = leaf
    theirs(ids, past_key_values=cache).logits.square().mean().backward()
    torch.testing.assert_close(values.grad, torch.cat([leaf.grad for leaf in leaves]), rtol=1e-4, atol=1e-6)
