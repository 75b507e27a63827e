"""Who a loaded model is: the manifest's word, computed fingerprints, and what is derived at load."""

import json

import pytest
import torch
from support import packers
from support.checkpoints import model, packed, save

from llama.errors import ModelError, UnsupportedModel
from llama.fingerprint import base_digest, derived_weights, weights_digest
from llama.identity import identify, names_itself
from llama.load import info, load
from llama.manifest import FILE, Manifest
from llama.pull import pull

BASE, WEIGHTS, OTHER = ("sha256:" + digit * 64 for digit in "123")


def sealed(folder, level="dense"):
    Manifest(BASE, level, WEIGHTS, "a name", "test").write(folder)
    return folder


def quantised(folder, dense):
    """`dense` as a foreign GPTQ checkpoint, without a manifest."""

    def pack(name, weight):
        grid = packers.quantise(weight, 4, 32, False)
        return packers.gptq(name, grid, 4, 1), grid.weight

    packed(folder, model(), {"quant_method": "gptq", "bits": 4, "group_size": 32}, "w4g32", pack)
    (folder / FILE).unlink()
    (folder / "tokenizer.json").write_bytes((dense / "tokenizer.json").read_bytes())
    return folder


def test_the_manifest_is_believed(make_checkpoint):
    identity = identify(sealed(make_checkpoint()))
    assert (identity.name, identity.base, identity.level, identity.weights) == ("a name", BASE, "dense", WEIGHTS)
    assert (identity.at_load, identity.notes) == (None, ())


def test_without_one_fingerprints_are_computed_and_nothing_is_written(make_checkpoint):
    folder = make_checkpoint("foreign")
    before = sorted(folder.iterdir())
    identity = load(folder, device="cpu").identity
    assert (identity.name, identity.level) == ("foreign", "dense")
    assert identity.base == base_digest(folder)
    assert identity.weights == weights_digest(folder)
    assert "promptstitch pull" in identity.notes[0]
    assert len(identity.notes) == 1
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("level", "quantiser"), [("w8g32", "rtn@1"), ("w3g32", "rtn@1"), ("nf4", "nf4@1"), ("int8", "int8@1")]
)
def test_weights_made_at_load_are_known_by_how(make_checkpoint, level, quantiser):
    folder = sealed(make_checkpoint())
    identity = load(folder, level=level, device="cpu").identity
    assert (identity.base, identity.level, identity.at_load) == (BASE, level, level)
    assert identity.weights == derived_weights(WEIGHTS, level, quantiser)
    assert identity == info(folder, level=level).identity


def test_dense_asked_for_is_dense_as_stored(make_checkpoint):
    folder = sealed(make_checkpoint())
    assert identify(folder, level="dense") == identify(folder)


@pytest.mark.parametrize(("stored", "made"), [("s50", "w3g32-s50"), ("s2of4", "w3g32-s2of4")])
def test_a_sparse_checkpoint_stays_sparse(make_checkpoint, stored, made):
    folder = sealed(make_checkpoint(), stored)
    identity = identify(folder, level="w3g32")
    assert (identity.level, identity.at_load) == (made, "w3g32")
    assert identity.weights == derived_weights(WEIGHTS, made, "rtn@1")
    with pytest.raises(UnsupportedModel, match=f"is {stored} and cannot be loaded at dense"):
        identify(folder, level="dense")


def test_dense_tensors_on_a_grid_are_not_put_on_another(make_checkpoint):
    folder = sealed(make_checkpoint(), "w4g128")
    assert load(folder, level="w4g128", device="cpu").identity.at_load is None
    with pytest.raises(UnsupportedModel, match="is w4g128 and cannot be loaded at w3g32"):
        identify(folder, level="w3g32")


def test_a_foreign_quantised_checkpoint_says_that_it_is_on_its_own(make_checkpoint, tmp_path):
    folder = quantised(tmp_path / "gptq", make_checkpoint())
    identity = identify(folder)
    assert identity.level == "w4g32"
    assert identity.base == base_digest(folder)
    assert "its own fingerprint is its base" in identity.notes[1]


def test_it_takes_the_base_of_a_digest_or_a_folder(make_checkpoint, tmp_path):
    dense = make_checkpoint()
    folder = quantised(tmp_path / "gptq", dense)
    assert identify(folder, base=OTHER).base == OTHER
    assert len(identify(folder, base=OTHER).notes) == 1
    assert identify(folder, base=str(dense)).base == base_digest(dense)
    assert identify(folder, base=str(sealed(dense))).base == BASE


@pytest.mark.parametrize("base", ["sha256:12", "/no/such/folder", ""])
def test_a_base_that_is_neither(make_checkpoint, base):
    with pytest.raises(ModelError, match="sha256:<64 hex digits> or the folder"):
        identify(make_checkpoint(), base=base)


def test_a_base_that_contradicts_the_manifest(make_checkpoint):
    folder = sealed(make_checkpoint())
    assert identify(folder, base=BASE).base == BASE
    with pytest.raises(ModelError, match=f"{OTHER}, but .*{FILE} says {BASE}"):
        identify(folder, base=OTHER)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_info_counts_the_dense_model(tmp_path, tied, biased):
    dense = model(tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
    told = info(save(tmp_path, dense), level="w4g32")
    assert told.parameters == sum(p.numel() for p in dense.parameters())
    assert told.disk_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert told.config.tied == tied
    assert told.identity.level == "w4g32"


def test_info_reads_no_weights(tmp_path, monkeypatch):
    save(tmp_path, model())
    monkeypatch.setattr(torch, "empty", None)
    info(tmp_path)


def test_info_refuses_what_load_would(tmp_path):
    save(tmp_path, model())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UnsupportedModel, match="awq"):
        info(tmp_path)


def test_a_base_that_was_not_known_can_be_told_later(tmp_path, make_checkpoint):
    """Its own fingerprint was in the manifest, and whoever named another one then was refused, or not heard."""
    folder = make_checkpoint(config={"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    target = pull(str(folder), tmp_path / "copy")
    assert names_itself(target)
    base = "sha256:" + "a" * 64
    pull(str(folder), target, base=base)
    assert Manifest.read(target).base == base
    assert not names_itself(target)
    with pytest.raises(ModelError, match="--base is sha256:bbbb"):
        pull(str(folder), target, base="sha256:" + "b" * 64)
