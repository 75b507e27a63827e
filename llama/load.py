"""From a checkpoint's folder to a model that is ready to serve, score or learn.

Every layer is allocated once, in the form in which it will be used, and filled from memory-mapped files about a million
weights at a time: the peak of anonymous memory is the resident model and a few pieces. Knows no scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from llama import native
from llama.assemble import Assembly
from llama.build import Target
from llama.checkpoint import Checkpoint
from llama.config import LlamaConfig
from llama.errors import UnsupportedModel
from llama.formats import format_at_load, stored_format
from llama.identity import Identity, identify
from llama.level import of_integers
from llama.linear import DenseLinear
from llama.model import Llama
from llama.rtn import Grid

Progress = Callable[[str, int, int], None]  # step, bytes done, bytes in all

COMPUTES = ("auto", "bf16", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and who it is. Bytes are real ones: tensors in memory (scales and copies counted), files on disk.

    `compute` is what its linears multiply: `int8`, or the compute dtype.
    """

    model: Llama
    identity: Identity
    resident_bytes: int
    disk_bytes: int
    compute: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What can be told without loading. `parameters` are those of the dense model."""

    config: LlamaConfig
    identity: Identity
    parameters: int
    disk_bytes: int


def load(
    directory: Path,
    *,
    level: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    base: str | None = None,
    identity: Identity | None = None,
    compute: str | None = None,
    prepare: bool = True,
    progress: Progress | None = None,
) -> LoadedModel:
    """The checkpoint in `directory`, quantised to `level` on the way if it is dense and a level is given.

    `dtype` is one of DTYPES or auto, `device` cpu, cuda, cuda:<i> or auto; `base` as in `identify`; `identity` is what
    `info` told of this directory, level and base, so that a checkpoint without a manifest is hashed once; `compute` as
    in `choose_compute`; `prepare` rearranges dense weights for faster products, at the price of a second copy of tied
    embeddings. Raises ModelError.
    """
    identity = identity or identify(directory, level, base)
    target = _target(dtype, device, compute, identity.level)
    checkpoint = Checkpoint(directory)
    stored = stored_format(checkpoint)
    weights = stored if identity.at_load is None else format_at_load(checkpoint, identity.at_load)
    disk_bytes = checkpoint.disk_bytes()
    report = progress or (lambda step, done, total: None)
    model = Assembly(checkpoint, weights, target, prepare).model(
        lambda share: report("load", int(share * disk_bytes), disk_bytes)
    )
    computes = "int8" if target.integers else str(target.dtype).removeprefix("torch.")
    return LoadedModel(model, identity, resident_bytes(model), disk_bytes, computes)


def _target(dtype: str, device: str, compute: str | None, level: str) -> Target:
    place = choose_device(device)
    chosen = choose_dtype(dtype, place, compute)
    return Target(chosen, place, integers=choose_compute(compute, chosen, place, level) == "int8")


def info(directory: Path, *, level: str | None = None, base: str | None = None) -> ModelInfo:
    """What `load` would give, without loading. Raises ModelError."""
    checkpoint = Checkpoint(directory)
    stored_format(checkpoint)
    identity = identify(directory, level, base)
    if identity.at_load and (grid := Grid.of_level(identity.at_load)):
        for width in row_widths(checkpoint.config):
            grid.check(width)
    return ModelInfo(checkpoint.config, identity, parameters(checkpoint.config), checkpoint.disk_bytes())


def row_widths(config: LlamaConfig) -> tuple[int, ...]:
    """Inputs of the linears of a block."""
    return config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size


def parameters(config: LlamaConfig) -> int:
    """Weights of the dense model, tied embeddings counted once."""
    h, heads = config.hidden_size, (config.num_heads + config.num_kv_heads) * config.head_dim
    per_layer = 2 * h * heads + 3 * h * config.intermediate_size + 2 * h
    per_layer += config.attention_bias * (heads + config.num_kv_heads * config.head_dim + h)
    per_layer += config.mlp_bias * (2 * config.intermediate_size + h)
    tables = config.vocab_size * h * (1 if config.tied else 2)
    return tables + config.num_layers * per_layer + h


def expected_bytes(
    directory: Path, identity: Identity, *, dtype: str = "auto", device: str = "auto", compute: str | None = None
) -> int:
    """`resident_bytes` of what `load` would give, without reading a weight.

    Exact but where oneDNN rearranges dense weights, which may fill them up to whole tiles. Raises ModelError.
    """
    target = replace(_target(dtype, device, compute, identity.level), hollow=True)
    checkpoint, at_load = Checkpoint(directory), identity.at_load
    weights = stored_format(checkpoint) if at_load is None else format_at_load(checkpoint, at_load)
    model = Assembly(checkpoint, weights, target, prepare=False).model(lambda share: None)
    if not rearranges(target.dtype, target.device):
        return resident_bytes(model)
    dense = [layer for layer in model.modules() if isinstance(layer, DenseLinear)]
    padding = sum(-layer.out_features % native.PANEL * layer.in_features for layer in dense)
    copied = model.head.in_features * model.head.out_features if model.head in dense and checkpoint.config.tied else 0
    return resident_bytes(model) + (padding + copied) * target.dtype.itemsize


def rearranges(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `DenseLinear.prepare` does anything to such weights."""
    ours_or_onednn = native.product() is not None or (
        torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    return (dtype, device.type) == (torch.bfloat16, "cpu") and ours_or_onednn


def resident_bytes(model: nn.Module) -> int:
    """Bytes of every tensor of the model, shared ones counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    plain = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_mkldnn}
    blocked = sum(int(torch.ops.mkldnn._nbytes(t)) for t in tensors if t.is_mkldnn)
    return sum(plain.values()) + blocked


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one. Raises UnsupportedModel."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedModel(f"device is {name!r}; supported: auto, cpu, cuda, cuda:<i>") from error
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModel(f"device is {name!r}; supported: auto, cpu, cuda, cuda:<i>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedModel(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def choose_compute(name: str | None, dtype: torch.dtype, device: torch.device, level: str) -> str:
    """What linears multiply: `int8`, inputs rounded to 8 bits and weights to 8 where they have more, or the `dtype`.

    `bf16` is the dtype bf16, None whichever it is. `auto` is int8 where that is faster and the weights are integers
    already, so that only inputs lose; NF4's 16 values lose 1/15 of what NF4 itself does. Raises UnsupportedModel.
    """
    plain = str(dtype).removeprefix("torch.")
    if name not in (None, *COMPUTES):
        raise UnsupportedModel(f"compute is {name!r}; supported: {', '.join(COMPUTES)}")
    if name == "bf16" and dtype != torch.bfloat16:
        raise UnsupportedModel(f"compute bf16 contradicts dtype {plain}; leave one of them out")
    if name not in ("auto", "int8"):
        return plain
    kernels = native.kernels() if (device.type, dtype) == ("cpu", torch.bfloat16) else None
    if kernels is not None and kernels.multiplies_integers:
        return "int8" if name == "int8" or of_integers(level) else plain
    if name == "int8":
        raise UnsupportedModel(
            "compute int8 needs dtype bfloat16, a CPU with AVX-512 VNNI, or AVX2 alone, and the package's kernels"
        )
    return plain


def choose_dtype(name: str, device: torch.device, compute: str | None = None) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it, else fp32; where a `compute` is asked for, as for serving, whose
    every product is then one of ours, our kernels are enough. Raises UnsupportedModel."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        ours = compute is not None and device.type == "cpu" and native.kernels() is not None
        return torch.bfloat16 if fast or ours else torch.float32
    if name not in DTYPES:
        raise UnsupportedModel(f"dtype is {name!r}; supported: auto, {', '.join(DTYPES)}")
    return DTYPES[name]
