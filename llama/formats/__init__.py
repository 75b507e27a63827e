"""Checkpoint formats: which one a checkpoint is in, and what a dense one can be made into while it loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama.checkpoint import Checkpoint
from llama.errors import UnsupportedModel
from llama.formats.bitsandbytes import (
    INT8_QUANTISER,
    NF4_QUANTISER,
    BitsAndBytesFormat,
    MadeInt8,
    MadeNf4,
)
from llama.formats.compressed_tensors import PackQuantizedFormat
from llama.formats.gptq import GptqFormat
from llama.formats.matrix import DenseMatrix, Format, Matrix
from llama.formats.promptstitch import SparseFormat
from llama.formats.rtn import MadeInt
from llama.level import METHOD, SPARSE_FORMAT, declared_level
from llama.rtn import QUANTISER, Grid, is_quantised

LOAD_LEVELS = (
    "dense",
    "int8",
    "nf4",
    *(f"w{bits}g{group}" for bits in (8, 4, 3, 2) for group in (32, 64, 128)),
)


class DenseFormat:
    """Plain weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def matrix(self, module: str, shape: tuple[int, int]) -> Matrix:
        return DenseMatrix(self._checkpoint, f"{module}.weight", shape)


@dataclass(frozen=True, slots=True)
class AtLoad:
    """A dense checkpoint whose decoder linears are quantised while they are read."""

    checkpoint: Checkpoint
    make: Callable[[DenseMatrix], Matrix]

    def matrix(self, module: str, shape: tuple[int, int]) -> Matrix:
        dense = DenseMatrix(self.checkpoint, f"{module}.weight", shape)
        return self.make(dense) if is_quantised(dense.name) else dense


def stored_format(checkpoint: Checkpoint) -> Format:
    """The format that config.json declares. Raises UnsupportedModel, naming what is supported."""
    quantisation = checkpoint.raw_config.get("quantization_config") or {}
    declared_level(checkpoint.raw_config)  # refuses what is none of the following
    method, layout = quantisation.get("quant_method"), quantisation.get("format")
    if not quantisation or (method, layout) == (METHOD, "dense"):
        return DenseFormat(checkpoint)
    if (method, layout) == (METHOD, SPARSE_FORMAT):
        return SparseFormat(checkpoint, quantisation)
    if method == "gptq":
        return GptqFormat(checkpoint, quantisation)
    if method in (METHOD, "compressed-tensors"):
        return PackQuantizedFormat(checkpoint, quantisation)
    return BitsAndBytesFormat(checkpoint)


def check_load_level(level: str) -> None:
    """Raise UnsupportedModel unless `level` can be made from a dense checkpoint at load."""
    if level not in LOAD_LEVELS:
        raise UnsupportedModel(f"level {level!r} cannot be made at load; choose one of: {', '.join(LOAD_LEVELS)}")


def format_at_load(checkpoint: Checkpoint, level: str) -> Format:
    """A dense checkpoint read at `level`, one of LOAD_LEVELS."""
    check_load_level(level)
    if grid := Grid.of_level(level):
        return AtLoad(checkpoint, lambda dense: MadeInt(dense, grid))
    if level == "nf4":
        return AtLoad(checkpoint, MadeNf4)
    if level == "int8":
        return AtLoad(checkpoint, MadeInt8)
    return DenseFormat(checkpoint)


def quantiser(level: str) -> str:
    """Name and version of what makes `level` at load, for the `weights` digest."""
    return {"nf4": NF4_QUANTISER, "int8": INT8_QUANTISER}.get(level, QUANTISER)
