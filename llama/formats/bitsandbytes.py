"""The two quantisations of bitsandbytes, NF4 and LLM.int8: made at load, or read from a checkpoint that has them.

NF4 (Dettmers et al. 2023): `weight` (N * K / 2, 1) bytes of two codes, the first in the high half; `weight.absmax`, one
for each block of a row-major walk; `weight.quant_map`, the 16 values; `weight.quant_state.bitsandbytes__nf4`, JSON in
bytes. If nested, `absmax` holds bytes that index `nested_quant_map`, scaled by `nested_absmax`.
LLM.int8 (Dettmers et al. 2022): `weight` (N, K) int8, `SCB` (N,) fp32, the absolute maximum of each row.

The arithmetic is that of the library, tested equal; the library itself is not loaded: on import it looks for kernels to
download, and its CPU layers rewrite weights in place and lose gradients.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.formats.matrix import DenseMatrix, IntMatrix, Matrix, Nf4Matrix, Rows

NF4_QUANTISER = "nf4@1"  # parts of the `weights` digest: any change of a single code or scale needs a new version
INT8_QUANTISER = "int8@1"
NF4_BLOCK = 64
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class BitsAndBytesFormat:
    """A checkpoint that bitsandbytes quantised; modules without its tensors are dense."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def matrix(self, module: str, shape: tuple[int, int]) -> Matrix:
        if f"{module}.weight.quant_state.bitsandbytes__nf4" in self._checkpoint:
            return StoredNf4(self._checkpoint, f"{module}.weight", shape)
        if f"{module}.SCB" in self._checkpoint:
            return StoredInt8(self._checkpoint, module, shape)
        return DenseMatrix(self._checkpoint, f"{module}.weight", shape)


class StoredNf4(Nf4Matrix):
    """Read from a checkpoint. Nested absolute maxima are expanded to fp32."""

    def __init__(self, checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> None:
        state = _quant_state(name, checkpoint.tensor(f"{name}.quant_state.bitsandbytes__nf4"))
        if tuple(state["shape"]) != shape:
            raise BrokenCheckpoint(f"{name} has shape {state['shape']}, expected {list(shape)}")
        self.shape, self.block = shape, int(state["blocksize"])
        count = shape[0] * shape[1]
        if count % self.block or count % 2:
            raise UnsupportedModel(f"{name}: {count} weights do not fill NF4 blocks of {self.block}")
        values = checkpoint.tensor(f"{name}.quant_map")
        if not torch.equal(values.float(), torch.tensor(NF4_VALUES)):
            raise UnsupportedModel(f"{name}.quant_map holds other values than those of NF4")
        packed = checkpoint.octets(name)
        if len(packed) != count // 2:
            raise BrokenCheckpoint(f"{name} holds {len(packed)} bytes, expected {count // 2}")
        self._packed = packed
        self._absmax = _absmax(checkpoint, name, state, count // self.block)

    def rows(self, start: int, stop: int) -> Rows:
        k = self.shape[1]
        packed = self._packed[start * k // 2 : stop * k // 2]
        codes = torch.stack((packed >> 4, packed & 15), -1).view(torch.int8).view(stop - start, k)
        return Rows(codes, self._absmax[start * k // self.block : stop * k // self.block])


class MadeNf4(Nf4Matrix):
    """Made from dense weights, in blocks of 64, equal to bitsandbytes.functional.quantize_4bit of them in fp32."""

    block = NF4_BLOCK

    def __init__(self, dense: DenseMatrix) -> None:
        self.shape = dense.shape
        self._dense = dense
        if self.shape[0] * self.shape[1] % self.block:
            raise UnsupportedModel(f"{dense.name}: weights {list(self.shape)} do not fill NF4 blocks of {self.block}")

    def rows(self, start: int, stop: int) -> Rows:
        weights = self._dense.rows(start, stop).float()
        blocks = weights.reshape(-1, self.block)
        absmax = blocks.abs().amax(-1)
        scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
        codes = torch.zeros(blocks.shape, dtype=torch.int8, device=weights.device)
        for lower, upper in pairwise(NF4_VALUES):  # 15 times faster than bucketize
            middle = (torch.tensor(lower) + torch.tensor(upper)) / 2
            codes += (scaled > middle).view(torch.int8)
        return Rows(codes.view(weights.shape), absmax)


class StoredInt8(IntMatrix):
    """Read from a checkpoint."""

    bits = 8

    def __init__(self, checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> None:
        checkpoint.expect(f"{module}.weight", shape, ("I8",))
        checkpoint.expect(f"{module}.SCB", shape[:1], ("F32", "F16", "BF16"))
        layout = f"{module}.weight_format"
        if layout in checkpoint and int(checkpoint.tensor(layout)) != 0:
            raise UnsupportedModel(f"{layout} is a layout of one kind of GPU; supported: 0 (row)")
        self.shape, self.group = shape, shape[1]
        self._checkpoint, self._module = checkpoint, module

    def rows(self, start: int, stop: int) -> Rows:
        codes = self._checkpoint.rows(f"{self._module}.weight", start, stop)
        absmax = self._checkpoint.rows(f"{self._module}.SCB", start, stop)
        return Rows(codes, absmax.float()[:, None] / 127)


class MadeInt8(IntMatrix):
    """Made from dense weights, through fp16 as bitsandbytes' Int8Params does."""

    bits = 8

    def __init__(self, dense: DenseMatrix) -> None:
        self.shape, self.group = dense.shape, dense.shape[1]
        self._dense = dense

    def rows(self, start: int, stop: int) -> Rows:
        weights = self._dense.rows(start, stop).to(torch.float16)
        absmax = weights.abs().amax(-1, keepdim=True).float()
        codes = torch.round(weights * (127.0 / absmax)).nan_to_num_(0)  # a row of zeros stays one
        return Rows(codes.to(torch.int8), absmax / 127)


def _quant_state(name: str, octets: Tensor) -> Mapping[str, Any]:
    try:
        state: Mapping[str, Any] = json.loads(bytes(octets.to(torch.uint8).tolist()))
        blocksize, (n, k) = state["blocksize"], state["shape"]
        nested = "nested_blocksize" not in state or state["nested_blocksize"] > 0
        if not (isinstance(blocksize, int) and blocksize > 0 and isinstance(n, int) and isinstance(k, int) and nested):
            raise ValueError("sizes must be whole positive numbers")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenCheckpoint(f"{name}: its quant_state cannot be read: {error!r}") from error
    return state


def _absmax(checkpoint: Checkpoint, name: str, state: Mapping[str, Any], count: int) -> Tensor:
    """(count,) fp32."""
    if f"{name}.nested_absmax" not in checkpoint:
        checkpoint.expect(f"{name}.absmax", (count,), ("F32",))
        return checkpoint.tensor(f"{name}.absmax")
    checkpoint.expect(f"{name}.absmax", (count,), ("U8",))
    block = int(state.get("nested_blocksize", 256))
    checkpoint.expect(f"{name}.nested_absmax", (-(-count // block),), ("F32",))
    checkpoint.expect(f"{name}.nested_quant_map", (256,), ("F32",))
    codes = checkpoint.tensor(f"{name}.absmax").int()
    outer = checkpoint.tensor(f"{name}.nested_absmax").repeat_interleave(block)[:count]
    return checkpoint.tensor(f"{name}.nested_quant_map")[codes] * outer + float(state.get("nested_offset", 0.0))
