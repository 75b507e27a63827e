"""Layouts of our own: sparse linears, and the tables of embedding and head on an 8-bit grid.

`quantization_config` of config.json says so by `quant_method: promptstitch`, which other engines do not know. `format`
is how the linears of the decoder blocks are stored: `promptstitch-sparse` with the `level` that tells how much is kept
(`s50`, `w4g64-s50`; `llama.sparse` has the tensors) and, for modules of which more or less of every 64 inputs is kept,
how many, `keep: {model.layers.0.mlp.down_proj: 40}`; or `pack-quantized` with the fields of compressed-tensors, or
`dense`. `tables: {bits: 8, group_size: 32}` is there if embedding and head are on the grid of `llama.q8`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.formats.matrix import FLOATS, DenseMatrix, IntMatrix, Matrix, Q8Matrix, Rows
from llama.level import METHOD, SPARSE_FORMAT, TABLES, has_q8_tables
from llama.q8 import GROUP, q8_table
from llama.shards import json_object
from llama.sparse import WORD, SparseLayout


def sparse_quantisation(level: str, keep: Mapping[str, int] | None = None) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose linears `SparseLayout.of_level(level)` packed.

    `keep` tells of modules that keep another number of every 64 inputs.
    """
    return {"quant_method": METHOD, "format": SPARSE_FORMAT, "level": level, **({"keep": dict(keep)} if keep else {})}


def with_q8_tables(quantisation: Mapping[str, Any] | None) -> dict[str, Any]:
    """`quantization_config` of linears stored as before (None: dense), with embedding and head on the 8-bit grid."""
    return {**(quantisation or {"format": "dense"}), "quant_method": METHOD, "tables": TABLES}


def q8_tensors(module: str, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """How the table of `module` (`model.embed_tokens`, `lm_head`) is stored on the grid of `llama.q8`."""
    return {f"{module}.weight": codes, f"{module}.weight_scale": scales}


class SparseFormat:
    """Every linear of the decoder blocks in one sparse layout; modules without a bitmap are dense."""

    def __init__(self, checkpoint: Checkpoint, quantisation: Mapping[str, Any]) -> None:
        layout = SparseLayout.of_level(str(quantisation.get("level")))
        assert layout is not None  # `declared_level` has refused what is none
        self._checkpoint, self._layout = checkpoint, layout
        self._keep = json_object(quantisation.get("keep"), "quantization_config.keep")

    def matrix(self, module: str, shape: tuple[int, int]) -> Matrix:
        if f"{module}.weight_kept" not in self._checkpoint:
            return DenseMatrix(self._checkpoint, f"{module}.weight", shape)
        stored = StoredSparse(self._checkpoint, module, shape, self._kept(module))
        return SparseMatrix(stored) if self._layout.bits is None else SparseIntMatrix(stored)

    def _kept(self, module: str) -> SparseLayout:
        keep = self._keep.get(module, self._layout.keep)
        if keep == self._layout.keep:
            return self._layout
        if type(keep) is not int or not 0 < keep < WORD or self._layout.of != WORD:
            raise UnsupportedModel(
                f"quantization_config.keep: {module} keeps {keep!r}; it must be 1 to {WORD - 1} of {WORD}"
            )
        return replace(self._layout, keep=keep)


class StoredSparse:
    """The tensors of one module. Raises UnsupportedModel, BrokenCheckpoint, naming it."""

    def __init__(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int], layout: SparseLayout) -> None:
        self.module, self.shape, self.layout = module, shape, layout
        self._checkpoint = checkpoint
        try:
            shapes = layout.shapes(*shape)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{module}: {error}") from error
        dtypes = {
            "weight": FLOATS if layout.bits is None else ("I32",),
            "weight_kept": ("I64",),
            "weight_scale": FLOATS,
        }
        for name, expected in shapes.items():
            checkpoint.expect(f"{module}.{name}", expected, dtypes[name])

    def rows(self, start: int, stop: int) -> Tensor:
        """What `SparseLayout.unpack` makes of some rows."""
        names = ("weight", "weight_kept")
        tensors = {name: self._checkpoint.rows(f"{self.module}.{name}", start, stop) for name in names}
        try:
            return self.layout.unpack(tensors)
        except BrokenCheckpoint as error:
            raise BrokenCheckpoint(f"{self.module}: {error}") from error

    def scales(self, start: int, stop: int) -> Tensor:
        return self._checkpoint.rows(f"{self.module}.weight_scale", start, stop)


class SparseMatrix(DenseMatrix):
    """Floats; what is not kept reads as zero."""

    def __init__(self, stored: StoredSparse) -> None:
        self.name, self.shape = f"{stored.module}.weight", stored.shape
        self._stored = stored

    def rows(self, start: int, stop: int) -> Tensor:
        return self._stored.rows(start, stop)


class SparseIntMatrix(IntMatrix):
    """Codes of a symmetric grid; what is not kept has code 0."""

    def __init__(self, stored: StoredSparse) -> None:
        layout = stored.layout
        assert layout.bits is not None
        self.shape, self.bits, self.group = stored.shape, layout.bits, layout.width(stored.shape[1])
        self._stored = stored

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(self._stored.rows(start, stop), self._stored.scales(start, stop))


class StoredQ8(Q8Matrix):
    """Read from a checkpoint. Raises BrokenCheckpoint."""

    def __init__(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> None:
        n, k = shape
        if k % GROUP:
            raise UnsupportedModel(f"{module}: {k} inputs cannot be cut into groups of {GROUP}")
        checkpoint.expect(f"{module}.weight", (n, k // GROUP, GROUP), ("I8",))
        checkpoint.expect(f"{module}.weight_scale", (n, k // GROUP), ("F16",))
        self.shape = shape
        self._checkpoint, self._module = checkpoint, module

    def rows(self, start: int, stop: int) -> Rows:
        codes = self._checkpoint.rows(f"{self._module}.weight", start, stop)
        return Rows(codes.flatten(1), self._checkpoint.rows(f"{self._module}.weight_scale", start, stop))


def stored_table(checkpoint: Checkpoint, module: str) -> DenseMatrix | Q8Matrix:
    """The table (V, H) of `model.embed_tokens`, or of a head where tables are on the grid, in any checkpoint."""
    shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
    if has_q8_tables(checkpoint.raw_config):
        return StoredQ8(checkpoint, module, shape)
    return DenseMatrix(checkpoint, f"{module}.weight", shape)


def table_rows(table: DenseMatrix | Q8Matrix, start: int, stop: int) -> Tensor:
    """Rows start..stop of a table (n, H), fp32."""
    if isinstance(table, DenseMatrix):
        return table.rows(start, stop).float()
    codes, scales, _ = table.rows(start, stop)
    return q8_table(codes.view(len(codes), -1, GROUP), scales)
