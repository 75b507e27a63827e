"""Identity: what changes `base` and `weights`, and what does not."""

import hashlib
import json

import pytest
import torch

from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.fingerprint import base_digest, derived_weights, text_digest, weights_digest

EMBEDDING = "model.embed_tokens.weight"


def edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_digests_are_written_one_way(make_checkpoint):
    folder = make_checkpoint()
    for digest in (
        base_digest(folder),
        weights_digest(folder),
        derived_weights("a", "b", "c"),
        text_digest(""),
    ):
        assert digest.startswith("sha256:")
        assert len(digest) == 71


@pytest.mark.parametrize("shards", [2, 5])
def test_sharding_changes_nothing(make_checkpoint, shards):
    one, many = make_checkpoint("one"), make_checkpoint("many", shards=shards)
    assert weights_digest(one) == weights_digest(many)
    assert base_digest(one) == base_digest(many)


def test_weights_is_every_tensor_with_name_dtype_shape_and_bytes(make_checkpoint, state):
    """Against the definition written down a second time."""
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.bfloat16)
    digest = hashlib.sha256(b"promptstitch.weights.v1\0")
    for name in sorted(state):
        tensor = state[name]
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        digest.update(json.dumps([name, dtype, list(tensor.shape)], separators=(",", ":")).encode() + b"\0")
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    assert weights_digest(make_checkpoint(state=state)) == f"sha256:{digest.hexdigest()}"


def test_weights_sees_a_single_bit_a_name_a_dtype_and_a_shape(make_checkpoint, state):
    digests = {weights_digest(make_checkpoint("plain"))}
    name = "model.layers.1.mlp.up_proj.weight"
    bit = state[name].clone()
    bit.view(torch.int32)[-1, -1] ^= 1
    for i, changed in enumerate(
        [
            {**state, name: bit},
            {**{k: v for k, v in state.items() if k != name}, name + "_": state[name]},
            {**state, name: state[name].view(torch.int32)},
            {**state, name: state[name].T.contiguous().view(32, 64)},
            {**state, "extra": torch.tensor(1.0)},
            {**state, "extra": torch.empty(0, 4)},
        ]
    ):
        digests.add(weights_digest(make_checkpoint(f"changed{i}", state=changed)))
    assert len(digests) == 7


def test_base_stays_for_what_a_prompt_does_not_feel(make_checkpoint, state):
    plain = make_checkpoint("plain")
    other = {**state, "model.layers.0.mlp.up_proj.weight": state["model.layers.0.mlp.up_proj.weight"] * 2}
    same = make_checkpoint(
        "same",
        state=other,
        config={
            "rms_norm_eps": 1.0000001e-5,
            "_name_or_path": "x",
            "transformers_version": "9",
            "dtype": "bfloat16",
        },
    )
    assert base_digest(plain) == base_digest(same)
    assert weights_digest(plain) != weights_digest(same)


def test_base_is_over_fp32_whatever_the_table_is_stored_in(make_checkpoint, state):
    state[EMBEDDING] = state[EMBEDDING].to(torch.bfloat16)
    half = make_checkpoint("half", state=state)
    full = make_checkpoint("full", state={**state, EMBEDDING: state[EMBEDDING].float()})
    assert base_digest(half) == base_digest(full)


def test_base_reads_old_and_new_spellings_alike(make_checkpoint):
    old = make_checkpoint("old")
    new = make_checkpoint("new", config={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    edit(new / "config.json", lambda raw: [raw.pop(key) for key in ("rope_theta", "head_dim")])

    def spell_merges_as_strings(raw):
        raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
        raw["model"]["vocab"] = dict(reversed(raw["model"]["vocab"].items()))
        raw["version"] = "2.0"

    edit(new / "tokenizer.json", spell_merges_as_strings)
    assert base_digest(old) == base_digest(new)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda raw: raw.update(rope_theta=500000.0)),
        ("config.json", lambda raw: raw.update(rope_scaling={"rope_type": "linear", "factor": 2.0})),
        ("config.json", lambda raw: raw.update(num_hidden_layers=3)),
        ("config.json", lambda raw: raw.update(tie_word_embeddings=False)),
        ("tokenizer.json", lambda raw: raw["model"]["merges"].reverse()),
        ("tokenizer.json", lambda raw: raw["added_tokens"].append({"id": 300, "content": "<new>"})),
    ],
)
def test_base_changes_with_what_a_prompt_feels(make_checkpoint, file, change):
    folder = make_checkpoint()
    before = base_digest(folder)
    edit(folder / file, change)
    assert base_digest(folder) != before


def test_base_changes_with_one_embedding(make_checkpoint, state):
    before = base_digest(make_checkpoint("before"))
    state[EMBEDDING][-1, -1] += 1e-3
    assert base_digest(make_checkpoint("after", state=state)) != before


def test_big_tables_are_read_in_pieces(make_checkpoint, monkeypatch):
    folder = make_checkpoint()
    whole = base_digest(folder), weights_digest(folder)
    monkeypatch.setattr("llama.shards.chunks.__defaults__", (500,))  # bytes: three rows of the table
    assert (base_digest(folder), weights_digest(folder)) == whole


def test_derived_weights_tells_source_level_and_quantiser_apart():
    digests = {
        derived_weights(*parts) for parts in [("a", "b", "c"), ("ab", "", "c"), ("a", "bc", ""), ("b", "a", "c")]
    }
    assert len(digests) == 4
    assert derived_weights("a", "b", "c") == derived_weights("a", "b", "c")


def test_broken_checkpoints_are_named(make_checkpoint, state, tmp_path):
    folder = make_checkpoint("a")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BrokenCheckpoint, match=r"tokenizer\.json"):
        base_digest(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"tokenizer\.json"):
        base_digest(folder)
    with pytest.raises(BrokenCheckpoint, match=r"neither model\.safetensors nor"):
        weights_digest(tmp_path)
    with pytest.raises(BrokenCheckpoint, match=r"shape \[10, 32\]"):
        base_digest(make_checkpoint("b", state={**state, EMBEDDING: state[EMBEDDING][:10].clone()}))
    del state[EMBEDDING]
    with pytest.raises(BrokenCheckpoint, match=EMBEDDING):
        base_digest(make_checkpoint("c", state=state))
    with pytest.raises(UnsupportedModel, match="supported"):
        base_digest(make_checkpoint("d", config={"model_type": "mistral"}))


def test_an_index_may_not_point_elsewhere(make_checkpoint):
    folder = make_checkpoint(shards=2)
    index = folder / "model.safetensors.index.json"
    edit(index, lambda raw: raw["weight_map"].update({"model.norm.weight": "../other.safetensors"}))
    with pytest.raises(BrokenCheckpoint, match="beside the index"):
        weights_digest(folder)
    edit(index, lambda raw: raw["weight_map"].update({"model.norm.weight": "model-00009-of-00002.safetensors"}))
    with pytest.raises(BrokenCheckpoint, match="model-00009"):
        weights_digest(folder)


def test_a_torn_shard_is_named(make_checkpoint):
    folder = make_checkpoint()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(BrokenCheckpoint, match="torn"):
        weights_digest(folder)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_base_of_stretched_positions_does_not_follow_the_context(make_checkpoint, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    digests = {
        base_digest(
            make_checkpoint(f"{kind}{length}", config={"max_position_embeddings": length, "rope_parameters": rope})
        )
        for length in (256, 512)
    }
    assert len(digests) == 1
