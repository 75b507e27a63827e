"""Checkpoints that contradict themselves, are torn, or are of a kind that is not served: one clear error each."""

import json
import random
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import packers
from support.checkpoints import model, packed, save, seal

from llama.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from llama.formats.bitsandbytes import NF4_VALUES
from llama.load import load

UP = "model.layers.1.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
OTHER = {**WEIGHTS, "num_bits": 8}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def gptq(name, weight):
    grid = packers.quantise(weight, 4, 64, False)
    return packers.gptq(name, grid, 4, 1), grid.weight


def compressed(name, weight):
    grid = packers.quantise(weight, 4, 64, True)
    return packers.pack_quantized(name, grid, 4), grid.weight


@pytest.fixture
def dense(tmp_path):
    return save(tmp_path, model(tie_word_embeddings=True))


@pytest.fixture
def gptq_folder(tmp_path):
    return packed(tmp_path, model(), GPTQ, "w4g64", gptq)


@pytest.fixture
def compressed_folder(tmp_path):
    return packed(tmp_path, model(), COMPRESSED, "w4g64", compressed)


def change(folder, **tensors):
    """Replace tensors; None takes one away."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors")


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(folder, error: type[ModelError], *words: str, **options) -> None:
    with pytest.raises(error) as raised:
        load(folder, device="cpu", **options)
    for word in words:
        assert word in str(raised.value)


def test_a_missing_tensor_is_named(dense):
    change(dense, **{f"{UP}.weight": None})
    refused(dense, BrokenCheckpoint, f"lacks the tensor {UP}.weight")


def test_an_untied_model_needs_its_head(dense):
    change_config(dense, tie_word_embeddings=False)
    refused(dense, BrokenCheckpoint, "lacks the tensor lm_head.weight")


def test_left_over_tensors_are_named(dense):
    change(dense, **{f"model.layers.2.extra{i}": torch.ones(1) for i in range(7)})
    refused(dense, BrokenCheckpoint, "model.layers.2.extra0", "and 2 more")


def test_needless_tensors_are_not(dense):
    table = load_file(dense / "model.safetensors")["model.embed_tokens.weight"]
    extra = {"lm_head.weight": table.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change(dense, **extra, **{f"{UP}.bias": torch.zeros(192)})
    load(dense, device="cpu")


@pytest.mark.parametrize("level", [None, "w4g64"])
def test_a_head_that_is_tied_and_is_another_is_refused(dense, level):
    """It was passed over; transformers serves it."""
    table = load_file(dense / "model.safetensors")["model.embed_tokens.weight"].clone()
    other = table.clone()
    other[-1, -1] += 1
    for head in (other, table[:-1].clone(), torch.empty(0, table.shape[1])):
        change(dense, **{"lm_head.weight": head})
        refused(dense, BrokenCheckpoint, "tie_word_embeddings", **({"level": level} if level else {}))


def test_a_bias_that_says_something_is_left_over(dense):
    change(dense, **{f"{UP}.bias": torch.ones(192)})
    refused(dense, BrokenCheckpoint, f"{UP}.bias")


def test_a_wrong_shape_is_told(dense):
    change(dense, **{f"{UP}.weight": torch.ones(192, 127)})
    refused(dense, BrokenCheckpoint, f"{UP}.weight has shape [192, 127], expected [192, 128]")


def test_a_wrong_dtype_is_told(dense):
    change(dense, **{f"{UP}.weight": torch.ones(192, 128, dtype=torch.int32)})
    refused(dense, BrokenCheckpoint, f"{UP}.weight is I32, expected F32 or F16 or BF16")


@pytest.mark.parametrize("length", [0, 7, 100, 10_000])
def test_a_torn_file(dense, length):
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(dense, BrokenCheckpoint, "model.safetensors is missing, torn or not a safetensors file")


def test_a_missing_shard(tmp_path):
    folder = save(tmp_path, model(), max_shard_size="200KB")
    gone = sorted(folder.glob("model-*"))[1]
    gone.unlink()
    refused(folder, BrokenCheckpoint, gone.name)


def test_a_shard_outside_the_folder(tmp_path):
    folder = save(tmp_path, model(), max_shard_size="200KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../model-00001'))
    refused(folder, BrokenCheckpoint, "a shard is a file beside the index")


def test_a_tensor_in_two_shards(tmp_path):
    """transformers would take whichever shard it reads last, we the one that the index names."""
    folder = save(tmp_path, model(), max_shard_size="200KB")
    first, second = sorted(folder.glob("model-*"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second)
    refused(folder, BrokenCheckpoint, name)


@pytest.mark.parametrize("level", ["w8g64", "int8", "nf4"])
def test_weights_that_are_not_finite_have_no_scale(dense, level):
    weight = load_file(dense / "model.safetensors")[f"{UP}.weight"]
    weight[5, 5] = torch.inf
    change(dense, **{f"{UP}.weight": weight})
    refused(dense, BrokenCheckpoint, UP, level=level)


def test_scales_that_are_not_finite(gptq_folder):
    change(gptq_folder, **{f"{UP}.scales": torch.full((2, 192), torch.nan, dtype=torch.float16)})
    refused(gptq_folder, BrokenCheckpoint, UP, "NaN")


@pytest.mark.parametrize("level", ["w5g64", "w4", "w4g16", "fp8", "W4G64", ""])
def test_a_level_that_cannot_be_made(dense, level):
    refused(dense, UnsupportedModel, "dense, int8, nf4, w8g32, w8g64, w8g128, w4g32", "w2g128", level=level)


@pytest.mark.parametrize("level", ["nf4", "dense", "w3g64"])
def test_a_quantised_checkpoint_is_not_quantised_again(gptq_folder, level):
    refused(gptq_folder, UnsupportedModel, "quantised already (w4g64)", level=level)


def test_its_own_level_may_be_named(gptq_folder):
    assert load(gptq_folder, level="w4g64", device="cpu").identity.at_load is None


@pytest.mark.parametrize(
    ("quantisation", "word"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({**COMPRESSED, "format": "int-quantized"}, "int-quantized"),
        ({**GPTQ, "bits": 5}, "5"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "is_marlin_format": True}, "marlin"),
        ({**GPTQ, "dynamic": {"-:.*up_proj.*": {}}}, "dynamic"),
        ({**COMPRESSED, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-bitmask"}}, "sparse"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": WEIGHTS, "input_activations": WEIGHTS}}}, "activations"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": {**WEIGHTS, "type": "float"}}}}, "float"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": {**WEIGHTS, "strategy": "tensor"}}}}, "tensor"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": {**WEIGHTS, "num_bits": 1}}}}, "1 bits"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": OTHER}}}, "['Linear']"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_formats_that_are_not_served(dense, quantisation, word):
    change_config(dense, quantization_config=quantisation)
    refused(dense, UnsupportedModel, word, "supported")


def test_an_architecture_that_is_not_served(dense):
    change_config(dense, architectures=["MistralForCausalLM"], model_type="mistral")
    refused(dense, UnsupportedModel, "MistralForCausalLM", "LlamaForCausalLM")


def test_gptq_tensors_of_the_wrong_shape(gptq_folder):
    change(gptq_folder, **{f"{UP}.qzeros": torch.zeros(2, 23, dtype=torch.int32)})
    refused(gptq_folder, BrokenCheckpoint, f"{UP}.qzeros has shape [2, 23], expected [2, 24]")


@pytest.mark.parametrize(
    ("g_idx", "error", "word"),
    [
        (torch.full((128,), 2), BrokenCheckpoint, "outside 0..1"),
        (torch.full((128,), -1), BrokenCheckpoint, "outside 0..1"),
        (torch.zeros(128), UnsupportedModel, "unequal size"),
    ],
)
def test_groups_that_make_no_sense(gptq_folder, g_idx, error, word):
    change(gptq_folder, **{f"{UP}.g_idx": g_idx.int()})
    refused(gptq_folder, error, UP, word)


def test_a_layer_that_fits_none_of_several_grids(compressed_folder):
    groups = {"a": {"targets": ["Linear"], "weights": WEIGHTS}, "b": {"targets": [UP], "weights": OTHER}}
    change_config(compressed_folder, quantization_config={**COMPRESSED, "config_groups": groups})
    load(compressed_folder, device="cpu")
    change(compressed_folder, **{f"{UP}.weight_packed": torch.zeros(192, 5, dtype=torch.int32)})
    refused(compressed_folder, BrokenCheckpoint, UP, "just one of the grids of config_groups")


def test_pack_quantized_tensors_of_the_wrong_shape(compressed_folder):
    change(compressed_folder, **{f"{UP}.weight_packed": torch.zeros(192, 15, dtype=torch.int32)})
    refused(compressed_folder, BrokenCheckpoint, f"{UP}.weight_packed has shape [192, 15], expected [192, 16]")


def test_a_shape_tensor_that_contradicts(compressed_folder):
    change(compressed_folder, **{f"{UP}.weight_shape": torch.tensor([128, 192])})
    refused(compressed_folder, BrokenCheckpoint, f"{UP}.weight_shape is not [192, 128]")


NF4_STATE = {"quant_type": "nf4", "blocksize": 64, "shape": [192, 128], "dtype": "float32"}


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (b"\xff{", "quant_state"),
        (b"[]", "quant_state"),
        ({**NF4_STATE, "blocksize": 0}, "quant_state"),
        ({**NF4_STATE, "blocksize": 1e99}, "quant_state"),
        ({**NF4_STATE, "shape": [1]}, "quant_state"),
        ({**NF4_STATE, "shape": [128, 192]}, "expected [192, 128]"),
        ({**NF4_STATE, "blocksize": 100}, "blocks of 100"),
        ({**NF4_STATE, "blocksize": 128}, "absmax has shape [384], expected [192]"),
        ({**NF4_STATE}, ""),
    ],
    ids=str,
)
def test_nf4_states(tmp_path, state, word):
    made = model(tie_word_embeddings=True)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    made.config.quantization_config = config
    folder = save(tmp_path, made)
    octets = state if isinstance(state, bytes) else json.dumps(state).encode()
    change(
        folder,
        **{
            f"{UP}.weight": torch.zeros(192 * 128 // 2, 1, dtype=torch.uint8),
            f"{UP}.weight.absmax": torch.ones(384),
            f"{UP}.weight.quant_map": torch.tensor(NF4_VALUES),
            f"{UP}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(octets), dtype=torch.uint8),
        },
    )
    if word:
        refused(folder, ModelError, UP, word)
    else:
        load(folder, device="cpu")
        change(folder, **{f"{UP}.weight.quant_map": torch.zeros(16)})
        refused(folder, UnsupportedModel, f"{UP}.weight.quant_map")


def mutants(text: str, count: int):
    """The object in `text` with one value anywhere in it replaced by another kind of value."""
    generator = random.Random(0)
    strange = [None, -1, 0, 1.5, 10**30, "", "x", [], {}, [1], {"a": 1}, True]
    for _ in range(count):
        raw = json.loads(text)
        place, key = raw, generator.choice(sorted(raw))
        while isinstance(place[key], dict) and place[key] and generator.random() < 0.7:
            place = place[key]
            key = generator.choice(sorted(place))
        place[key] = generator.choice(strange)
        yield raw, f"{key} = {place[key]!r}"


@pytest.mark.parametrize("kind", ["gptq_folder", "compressed_folder"])
def test_mutated_configurations_load_or_are_refused(kind, request, full):
    folder = request.getfixturevalue(kind)
    config = folder / "config.json"
    for raw, what in mutants(config.read_text(), 2000 if full else 300):
        config.write_text(json.dumps(raw))
        try:
            load(folder, device="cpu", dtype="float32")
        except ModelError:
            pass
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error


def test_mutated_headers_load_or_are_refused(gptq_folder, full):
    file = gptq_folder / "model.safetensors"
    octets = file.read_bytes()
    length = int.from_bytes(octets[:8], "little")
    generator = random.Random(0)
    for _ in range(2000 if full else 300):
        mutant = bytearray(octets)
        for _ in range(generator.randrange(1, 4)):
            mutant[generator.randrange(8 + length)] = generator.randrange(256)
        file.write_bytes(mutant)
        with suppress(ModelError):
            load(gptq_folder, device="cpu", dtype="float32")


def test_a_folder_without_a_model(tmp_path):
    refused(tmp_path, BrokenCheckpoint, "config.json")
    model().config.save_pretrained(tmp_path)
    refused(seal(tmp_path), BrokenCheckpoint, "model.safetensors")
