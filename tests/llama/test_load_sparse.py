"""Sparse checkpoints, and tables on the 8-bit grid: logits and gradients of the weights that the bits mean."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import packers
from support.checkpoints import LINEARS, logits, model, packed, relative, save, write
from transformers import AutoModelForCausalLM

from llama import native
from llama.embedding import DenseEmbedding, Q8Embedding
from llama.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from llama.fingerprint import base_digest
from llama.formats.promptstitch import q8_tensors, sparse_quantisation, with_q8_tables
from llama.identity import identify
from llama.int4 import Int4Linear, kernel_block
from llama.linear import DenseLinear
from llama.load import load
from llama.model import CausalAttention, Llama
from llama.packed import CodebookLinear, Int8Linear
from llama.panels import PanelLinear
from llama.q8 import Q8Linear, q8_grid, q8_nearest, q8_table
from llama.rtn import BITS, dequantise, quantise
from llama.sparse import SparseLayout

IDS = torch.randint(0, 260, (60,), generator=torch.Generator().manual_seed(1))
BF16 = 2.5e-2  # relative error of a dense bf16 model of this size is 1.3e-2
UP = "model.layers.1.mlp.up_proj"
KINDS = {
    "s50": DenseLinear,
    "s2of4": DenseLinear,
    "s75": DenseLinear,
    "w4g64-s50": CodebookLinear,
    "w3g32-s2of4": CodebookLinear,
    "w2-s50": CodebookLinear,
    "w8g64-s50": Int8Linear,
    "w5-s60": Int8Linear,
}


def sparse(level: str):
    """A `Pack` of tests that keeps the largest weights."""
    layout = SparseLayout.of_level(level)

    def pack(name, weight):
        pieces = weight.abs().view(len(weight), -1, layout.of)
        kept = (pieces.argsort(-1, descending=True).argsort(-1) < layout.keep).view_as(weight)
        if layout.bits is None:
            values, scales, meant = weight * kept, None, weight * kept
        else:
            bits, width = layout.bits, layout.width(weight.shape[1])
            made = bits if bits in BITS else 4  # fewer codes than there is room for are as good a test
            codes, scales = quantise(weight * kept, made, width)
            values, meant = codes * kept, dequantise(codes * kept, scales, torch.float32)
        return {f"{name}.{key}": tensor for key, tensor in layout.pack(values, kept, scales).items()}, meant

    return pack


def on_the_grid(reference, tied: bool) -> dict[str, torch.Tensor]:
    """The model's tensors with its tables put on the 8-bit grid, and the model itself left with what they mean."""
    state = dict(reference.state_dict())
    for module in ("model.embed_tokens", *(() if tied else ("lm_head",))):
        table = state.pop(f"{module}.weight")
        table.copy_(q8_table(*q8_nearest(table)))
        state |= q8_tensors(module, *q8_grid(table))
    if tied:
        state.pop("lm_head.weight")
    return state


def with_linears(state: dict[str, torch.Tensor], pack) -> dict[str, torch.Tensor]:
    """The tensors with every linear packed, and the model that they are of left with what they mean."""
    packed_too = {}
    for name, tensor in state.items():
        if name.split(".")[-2] in LINEARS and name.endswith(".weight"):
            stored, meant = pack(name.removesuffix(".weight"), tensor)
            tensor.copy_(meant)
            packed_too |= stored
        else:
            packed_too[name] = tensor
    return packed_too


def gradient(model: Llama) -> torch.Tensor:
    """Of a loss with respect to the embedded tokens, fp32."""
    rows = model.embed(IDS).requires_grad_()
    hidden = model(rows, torch.arange(len(IDS)), CausalAttention(1))
    torch.nn.functional.cross_entropy(model.logits(hidden[:-1]).float(), IDS[1:]).backward()
    return rows.grad.float()


@pytest.mark.parametrize("level", KINDS)
def test_a_sparse_checkpoint_is_its_dense_form(tmp_path, level):
    reference = model()
    folder = packed(tmp_path / "sparse", reference, sparse_quantisation(level), level, sparse(level))
    dense = load(save(tmp_path / "dense", reference), dtype="float32", device="cpu").model
    loaded = load(folder, dtype="float32", device="cpu")
    assert loaded.identity.level == level
    assert type(loaded.model.blocks[0].qkv) is KINDS[level]
    torch.testing.assert_close(logits(loaded.model, IDS), logits(reference, IDS), atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient(loaded.model), gradient(dense), atol=1e-5, rtol=1e-4)
    half = load(folder, dtype="bfloat16", device="cpu").model
    for few in (IDS, IDS[:1], IDS[:20]):  # the kernels of few rows
        assert relative(logits(half, few), logits(reference, few)) < BF16


def test_four_bits_and_fewer_take_the_four_bit_kernel(tmp_path):
    if native.kernels() is None and kernel_block() is None:
        pytest.skip("torch's kernel of this CPU has another layout")
    folder = packed(tmp_path, model(), sparse_quantisation("w3g64-s50"), "w3g64-s50", sparse("w3g64-s50"))
    kind = Int4Linear if native.kernels() is None else PanelLinear
    assert type(load(folder, dtype="bfloat16", device="cpu").model.blocks[0].qkv) is kind


@pytest.mark.parametrize("level", KINDS)
def test_the_bytes_on_the_disk_are_those_of_the_layout(tmp_path, level):
    reference, layout = model(), SparseLayout.of_level(level)
    folder = packed(tmp_path, reference, sparse_quantisation(level), level, sparse(level))
    expected = 0
    for name, parameter in reference.named_parameters():
        if name.split(".")[-2] not in LINEARS or parameter.ndim == 1:
            expected += 4 * parameter.numel()
            continue
        (n, k), bits = parameter.shape, layout.bits or 32
        per_row = -(-layout.kept(k) * bits // 32) * 4 + k // 8 + (2 * k // layout.width(k) if layout.bits else 0)
        expected += n * per_row
    assert sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_tables_on_the_grid_lose_nothing(tmp_path, tied):
    reference = model(tie_word_embeddings=tied)
    config = reference.config.to_dict() | {"quantization_config": with_q8_tables(None)}
    folder = write(tmp_path / "q8", config, on_the_grid(reference, tied))
    plain = save(tmp_path / "plain", reference)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
        loaded, dense = (load(f, dtype=dtype, device="cpu", prepare=False) for f in (folder, plain))
        ours, theirs = loaded.model, dense.model
        assert isinstance(ours.embedding, Q8Embedding)
        assert isinstance(theirs.embedding, DenseEmbedding)
        assert isinstance(ours.head, Q8Linear)
        assert torch.equal(ours.embed(IDS), theirs.embed(IDS))
        assert torch.equal(ours.embedding.dense(), theirs.embedding.dense())
        assert torch.equal(ours.head.dense(), theirs.head.dense())
        for few in (IDS, IDS[:3]):
            torch.testing.assert_close(logits(ours, few), logits(theirs, few), atol=tolerance, rtol=0.02)
        torch.testing.assert_close(
            gradient(ours), gradient(theirs), atol=1e-5 if dtype == "float32" else 1e-2, rtol=0.1
        )
        table = reference.model.embed_tokens.weight
        assert dense.resident_bytes - loaded.resident_bytes == (1 if tied else 2) * (
            table.numel() * dense.model.dtype.itemsize - table.numel() * 17 // 16
        )


def test_sparse_linears_go_with_tables_on_the_grid(tmp_path):
    reference = model(tie_word_embeddings=True)
    state = with_linears(on_the_grid(reference, tied=True), sparse("w4g64-s50"))
    quantisation = with_q8_tables(sparse_quantisation("w4g64-s50"))
    config = reference.config.to_dict() | {"quantization_config": quantisation}
    folder = write(tmp_path, config, state, "w4g64-s50")
    loaded = load(folder, dtype="float32", device="cpu").model
    assert isinstance(loaded.embedding, Q8Embedding)
    assert type(loaded.blocks[0].qkv) is CodebookLinear
    torch.testing.assert_close(logits(loaded, IDS), logits(reference, IDS), atol=1e-4, rtol=0)


def test_packed_linears_go_with_tables_on_the_grid(tmp_path):
    """compressed-tensors' layout under our own name, since its readers would not find the tables."""
    reference = model()
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    quantisation = with_q8_tables({"quant_method": "compressed-tensors", "format": "pack-quantized", **groups})

    def pack(name, weight):
        grid = packers.quantise(weight, 4, 64, True)
        return packers.pack_quantized(name, grid, 4), grid.weight

    state = with_linears(on_the_grid(reference, tied=False), pack)
    config = reference.config.to_dict() | {"quantization_config": quantisation}
    folder = write(tmp_path, config, state, "w4g64")
    loaded = load(folder, dtype="float32", device="cpu")
    assert loaded.identity.level == "w4g64"
    torch.testing.assert_close(logits(loaded.model, IDS), logits(reference, IDS), atol=1e-4, rtol=0)


def test_dense_linears_are_quantised_at_load_beside_tables_on_the_grid(tmp_path):
    reference = model(tie_word_embeddings=True)
    config = reference.config.to_dict() | {"quantization_config": with_q8_tables(None)}
    folder = write(tmp_path / "grid", config, on_the_grid(reference, tied=True))
    found = load(folder, level="w4g64", dtype="float32", device="cpu")
    plain = load(save(tmp_path / "plain", reference), level="w4g64", dtype="float32", device="cpu")
    assert found.identity.level == "w4g64"
    torch.testing.assert_close(logits(found.model, IDS), logits(plain.model, IDS), atol=1e-4, rtol=0)


def test_the_base_is_that_of_the_dense_table(make_checkpoint, state):
    state["model.embed_tokens.weight"] = q8_table(*q8_nearest(state["model.embed_tokens.weight"]))
    dense = make_checkpoint("dense", state=state)
    stored = q8_tensors("model.embed_tokens", *q8_grid(state.pop("model.embed_tokens.weight")))
    if "lm_head.weight" in state:
        stored |= q8_tensors("lm_head", *q8_nearest(state.pop("lm_head.weight")))
    grid = make_checkpoint("grid", config={"quantization_config": with_q8_tables(None)}, state=state | stored)
    assert base_digest(grid) == base_digest(dense)
    assert identify(grid).level == "dense"


def change(folder, **tensors):
    state = load_file(folder / "model.safetensors")
    save_file(state | tensors, folder / "model.safetensors")


def refused(folder, error: type[ModelError], *words: str) -> None:
    with pytest.raises(error) as raised:
        load(folder, device="cpu")
    for word in words:
        assert word in str(raised.value)


@pytest.fixture
def sparse_folder(tmp_path):
    return packed(tmp_path, model(), sparse_quantisation("w4g64-s50"), "w4g64-s50", sparse("w4g64-s50"))


def test_a_bitmap_with_a_bit_too_many_is_refused(sparse_folder):
    kept = load_file(sparse_folder / "model.safetensors")[f"{UP}.weight_kept"]
    kept[3, 1] ^= 1
    change(sparse_folder, **{f"{UP}.weight_kept": kept})
    refused(sparse_folder, BrokenCheckpoint, f"{UP}: the bitmap", "32 of every 64")


def test_tensors_of_another_shape_or_kind_are_refused(sparse_folder):
    stored = load_file(sparse_folder / "model.safetensors")
    for name, broken, word in (
        ("weight", stored[f"{UP}.weight"][:, :-1].contiguous(), "shape"),
        ("weight", stored[f"{UP}.weight"].float(), "expected I32"),
        ("weight_kept", stored[f"{UP}.weight_kept"].int(), "expected I64"),
        ("weight_scale", stored[f"{UP}.weight_scale"][:, :1].contiguous(), "shape"),
    ):
        save_file(stored | {f"{UP}.{name}": broken}, sparse_folder / "model.safetensors")
        refused(sparse_folder, BrokenCheckpoint, f"{UP}.{name}", word)


def test_a_scale_that_is_no_number_is_refused(sparse_folder):
    scales = load_file(sparse_folder / "model.safetensors")[f"{UP}.weight_scale"]
    scales[0, 0] = torch.inf
    change(sparse_folder, **{f"{UP}.weight_scale": scales})
    refused(sparse_folder, BrokenCheckpoint, UP, "NaN or infinite")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"level": "s0"}, ("level is 's0'", "s50")),
        ({"level": None}, ("level is None",)),
        ({"format": "promptstitch-other"}, ("promptstitch-other", "supported")),
        ({"tables": {"bits": 4, "group_size": 32}}, ("tables is", "supported")),
        ({"keep": {UP: 64}}, ("quantization_config.keep", UP, "64", "1 to 63")),
        ({"keep": {UP: True}}, ("quantization_config.keep", UP, "True")),
        ({"keep": {UP: "32"}}, ("quantization_config.keep", UP, "'32'")),
    ],
)
def test_declarations_of_another_layout_are_refused(sparse_folder, fields, words):
    file = sparse_folder / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"] |= fields
    file.write_text(json.dumps(raw))
    refused(sparse_folder, UnsupportedModel, *words)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["s50", "w4g64-s50", "tables"])
def test_transformers_refuses_what_it_cannot_read(tmp_path, kind):
    """It only warns of a method that it does not know; shapes that are none of the model's keep it from going on."""
    reference = model(tie_word_embeddings=kind == "tables")
    if kind == "tables":
        config = reference.config.to_dict() | {"quantization_config": with_q8_tables(None)}
        folder = write(tmp_path, config, on_the_grid(reference, tied=True))
    else:
        folder = packed(tmp_path, reference, sparse_quantisation(kind), kind, sparse(kind))
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)mismatch|shape"):
        AutoModelForCausalLM.from_pretrained(folder)
