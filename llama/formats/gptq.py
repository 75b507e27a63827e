"""The GPTQ layout (Frantar et al. 2023), as AutoGPTQ and its successors write it, v1 and v2.

Beside each module: `qweight` (K * bits / 32, N) int32, values packed along K; `qzeros` (K / group, N * bits / 32)
int32, packed along N; `scales` (K / group, N); `g_idx` (K,), the group of each input, out of order after act-order
(`desc_act`). v1 stores zero points less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llama.bits import stream_words, unpack_stream
from llama.checkpoint import Checkpoint
from llama.errors import UnsupportedModel
from llama.formats.matrix import FLOATS, DenseMatrix, IntMatrix, Matrix, Rows, Zeros, group_order

BITS = (2, 3, 4, 8)
ZERO_LESS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is missing from a stored zero point


class GptqFormat:
    """Raises UnsupportedModel for variants of another layout."""

    def __init__(self, checkpoint: Checkpoint, quantisation: Mapping[str, Any]) -> None:
        layout = quantisation.get("checkpoint_format") or "gptq"
        bits, group = quantisation.get("bits"), quantisation.get("group_size", -1)
        if quantisation.get("is_marlin_format"):
            layout = "marlin"
        if not isinstance(layout, str) or layout not in ZERO_LESS:
            raise UnsupportedModel(f"checkpoint_format is {layout!r}; supported: {', '.join(ZERO_LESS)}")
        if bits not in BITS or not isinstance(group, int):
            raise UnsupportedModel(f"gptq with bits {bits!r} and group_size {group!r}; supported bits: {BITS}")
        if quantisation.get("dynamic"):
            raise UnsupportedModel("gptq with 'dynamic' (bits that differ by module) is not supported")
        self._bits, self._group = bits, group
        self._checkpoint, self._less = checkpoint, ZERO_LESS[layout]

    def matrix(self, module: str, shape: tuple[int, int]) -> Matrix:
        if f"{module}.qweight" not in self._checkpoint:
            return DenseMatrix(self._checkpoint, f"{module}.weight", shape)
        group = self._group if self._group > 0 else shape[1]
        return GptqMatrix(self._checkpoint, module, shape, self._bits, group, self._less)


class GptqMatrix(IntMatrix):
    """One module's tensors."""

    def __init__(
        self, checkpoint: Checkpoint, module: str, shape: tuple[int, int], bits: int, group: int, less: int
    ) -> None:
        n, k = shape
        if k % group:
            raise UnsupportedModel(f"{module}: {k} inputs cannot be cut into groups of {group}")
        checkpoint.expect(f"{module}.qweight", (stream_words(k, bits), n), ("I32",))
        checkpoint.expect(f"{module}.qzeros", (k // group, stream_words(n, bits)), ("I32",))
        checkpoint.expect(f"{module}.scales", (k // group, n), FLOATS)
        self.shape, self.bits, self.group = shape, bits, group
        self._checkpoint, self._module = checkpoint, module
        self._zeros = Zeros(bits, self._zero_points(less))
        self.has_offsets = self._zeros.offset_needed
        if f"{module}.g_idx" in checkpoint:
            checkpoint.expect(f"{module}.g_idx", (k,), ("I32", "I64"))
            self.order = group_order(module, checkpoint.tensor(f"{module}.g_idx"), group)

    def rows(self, start: int, stop: int) -> Rows:
        words = self._checkpoint.columns(f"{self._module}.qweight", start, stop).t()
        codes = unpack_stream(words, self.bits, self.shape[1])
        if self.order is not None:
            codes = codes.index_select(1, self.order)
        scales = self._checkpoint.columns(f"{self._module}.scales", start, stop).t()
        return self._zeros.centred(start, stop, codes.contiguous(), scales)

    def _zero_points(self, less: int) -> Tensor | None:
        """(N, K / group) uint8, or None if all are the middle of the range."""
        words = self._checkpoint.tensor(f"{self._module}.qzeros")
        # Less one wraps inside its bits: writers stored zero points of 0 as all ones.
        points = (unpack_stream(words, self.bits, self.shape[0]) + less) & (2**self.bits - 1)
        middle = 2 ** (self.bits - 1)
        return None if bool((points == middle).all()) else points.t().contiguous()
