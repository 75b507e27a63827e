"""The compressed-tensors layout `pack-quantized`: integers of 2 to 8 bits, what `vllm` and `transformers` read.

Beside each module: `weight_packed` (N, words) int32, K values packed along each row, stored as value + 2**(bits - 1);
`weight_scale` (N, K / group), or (N, 1) for one scale a row; `weight_shape` = [N, K]; for asymmetric grids
`weight_zero_point` (words, K / group), packed along N; from older versions with act-order `weight_g_idx` (K,), the
group of each input, -1 if not used. Where 32 is no multiple of the bits, values cross words (current versions) or leave
a gap at the top of each word (older ones); the width tells which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llama.bits import padded_words, stream_words, unpack_padded, unpack_stream
from llama.checkpoint import Checkpoint
from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.formats.matrix import FLOATS, DenseMatrix, IntMatrix, Matrix, Rows, Zeros, group_order
from llama.level import weight_schemes
from llama.shards import json_object

BITS = range(2, 9)
STRATEGIES = ("group", "channel")
ACTIVATIONS = ("input_activations", "output_activations")


class PackQuantizedFormat:
    """Raises UnsupportedModel for schemes that also quantise activations, or otherwise go beyond packed integers."""

    def __init__(self, checkpoint: Checkpoint, quantisation: Mapping[str, Any]) -> None:
        groups = quantisation["config_groups"].values()
        if any(group.get(field) for group in groups for field in ACTIVATIONS):
            raise UnsupportedModel("compressed-tensors with quantised activations is not supported; supported: weights")
        schemes = weight_schemes(quantisation)
        for scheme in schemes:
            _check_scheme(scheme)
        for field in ("kv_cache_scheme", "transform_config"):
            if quantisation.get(field):
                raise UnsupportedModel(f"compressed-tensors with {field} is not supported")
        if json_object(quantisation.get("sparsity_config"), "sparsity_config").get("format", "dense") != "dense":
            raise UnsupportedModel("compressed-tensors with sparse storage is not supported; supported: pack-quantized")
        grids = [(scheme["num_bits"], scheme.get("group_size") or -1) for scheme in schemes]
        self._grids: list[tuple[int, int]] = list(dict.fromkeys(grids))
        self._checkpoint = checkpoint

    def matrix(self, module: str, shape: tuple[int, int]) -> Matrix:
        if f"{module}.weight_packed" not in self._checkpoint:
            return DenseMatrix(self._checkpoint, f"{module}.weight", shape)
        bits, group = self._grid(module, shape[1])
        return PackQuantizedMatrix(self._checkpoint, module, shape, bits, group)

    def _grid(self, module: str, k: int) -> tuple[int, int]:
        """Bits and group. Where layers differ their tensors' widths tell, so no pattern of names is ever run."""
        grids = [(bits, group if group > 0 else k) for bits, group in self._grids]
        if len(grids) > 1:
            words = self._checkpoint.shape(f"{module}.weight_packed")[-1]
            groups = self._checkpoint.shape(f"{module}.weight_scale")[-1]
            grids = [(b, g) for b, g in grids if words in (stream_words(k, b), padded_words(k, b)) and g * groups == k]
        if len(grids) != 1:
            raise BrokenCheckpoint(
                f"{module}: weight_packed and weight_scale must have the widths of just one of the grids of "
                "config_groups"
            )
        return grids[0]


class PackQuantizedMatrix(IntMatrix):
    """One module's tensors."""

    def __init__(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int], bits: int, group: int) -> None:
        n, k = shape
        if k % group:
            raise UnsupportedModel(f"{module}: {k} inputs cannot be cut into groups of {group}")
        self.shape, self.bits, self.group = shape, bits, group
        self._checkpoint, self._module = checkpoint, module
        if f"{module}.weight_shape" in checkpoint and checkpoint.tensor(f"{module}.weight_shape").tolist() != [n, k]:
            raise BrokenCheckpoint(f"{module}.weight_shape is not {[n, k]}")
        widths = (stream_words(k, bits), padded_words(k, bits))
        width = checkpoint.shape(f"{module}.weight_packed")[-1]
        checkpoint.expect(f"{module}.weight_packed", (n, width if width in widths else widths[0]), ("I32",))
        self._unpack = unpack_stream if width == widths[0] else unpack_padded
        checkpoint.expect(f"{module}.weight_scale", (n, k // group), FLOATS)
        self._zeros = Zeros(bits, self._zero_points())
        self.has_offsets = self._zeros.offset_needed
        if f"{module}.weight_g_idx" in checkpoint:
            checkpoint.expect(f"{module}.weight_g_idx", (k,), ("I32", "I64"))
            g_idx = checkpoint.tensor(f"{module}.weight_g_idx")
            self.order = None if bool((g_idx == -1).all()) else group_order(module, g_idx, group)

    def rows(self, start: int, stop: int) -> Rows:
        words = self._checkpoint.rows(f"{self._module}.weight_packed", start, stop)
        codes = self._unpack(words, self.bits, self.shape[1])
        if self.order is not None:
            codes = codes.index_select(1, self.order)
        scales = self._checkpoint.rows(f"{self._module}.weight_scale", start, stop)
        return self._zeros.centred(start, stop, codes.contiguous(), scales)

    def _zero_points(self) -> Tensor | None:
        """(N, K / group) uint8, or None for a symmetric grid."""
        name = f"{self._module}.weight_zero_point"
        if name not in self._checkpoint:
            return None
        n, groups = self.shape[0], self.shape[1] // self.group
        count = stream_words if self._unpack is unpack_stream else padded_words
        self._checkpoint.expect(name, (count(n, self.bits), groups), ("I32",))
        words = self._checkpoint.tensor(name).t()
        return self._unpack(words, self.bits, n).t().contiguous()


def _check_scheme(weights: Mapping[str, Any]) -> None:
    bits, group = weights.get("num_bits"), weights.get("group_size") or -1
    kind, strategy = weights.get("type", "int"), weights.get("strategy", "group")
    if bits not in BITS or not isinstance(group, int) or kind != "int" or strategy not in STRATEGIES:
        raise UnsupportedModel(
            f"compressed-tensors weights of {bits!r} bits, group_size {group!r}, type {kind!r}, strategy {strategy!r}; "
            f"supported: {BITS.start} to {BITS.stop - 1} bits, type 'int', strategy {' or '.join(STRATEGIES)}"
        )
