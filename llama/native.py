"""Our own kernels for the CPU, as functions of tensors.

The C sources stand in `llama/kernels` and are built with the package. They share the thread pool of torch, since both
use the OpenMP library that torch has loaded by then. Everything here has a plain equivalent in torch, which is what
runs where the kernels do not. Knows no layers.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

LIBRARIES = ("_kernels", "_kernels_avx2")  # the faster first
PANEL = 32  # outputs of a panel of weights
GROUP = 64  # inputs that share a scale in `llama.integers`
SHARE = 32  # what the groups of a product of integers are multiples of
SCALES = (torch.bfloat16, torch.float32, torch.float16)  # what scales may be kept in, as the product numbers them
MATRIX_INPUTS = 32  # bf16 inputs that a matrix unit takes at once
DOT_GAIN = 1.2  # of the bf16 dot product over fp32's multiply-add: from here on it is taken
LANES = 16  # what page sizes and head widths must be multiples of
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "panels": (POINTER, LONG, LONG, POINTER),
    "pairs": (POINTER, LONG, LONG, POINTER),
    "dots": (*[POINTER] * 3, LONG, LONG, LONG, POINTER),
    "gemm": (INT, INT, INT, *[POINTER] * 5, LONG, POINTER, LONG, LONG, LONG, POINTER),
    "step": (POINTER,) * 7,
    "integers": (INT, INT, INT, *[POINTER] * 5, LONG, POINTER, LONG, LONG, LONG, POINTER),
    "norm": (INT, POINTER, POINTER, FLOAT, LONG, LONG, POINTER),
    "norm_slope": (POINTER, POINTER, POINTER, FLOAT, LONG, LONG, POINTER),
    "rotate": (INT, POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG, POINTER),
    "swiglu": (INT, POINTER, LONG, LONG, POINTER),
    "swiglu_slope": (POINTER, POINTER, LONG, LONG, POINTER),
    "write": (INT, POINTER, LONG, POINTER, LONG, POINTER, LONG, LONG, POINTER, POINTER),
    "attention": (INT, POINTER, LONG, *[POINTER] * 3, LONG, *[POINTER] * 2, *[LONG] * 5, FLOAT, POINTER),
}


class Product(ctypes.Structure):
    """y = x Wᵀ + b of one layer in bf16, as `step.c` has it: addresses, which the layer must outlive."""

    _fields_ = [
        *((name, POINTER) for name in ("weights", "scales", "offsets", "values", "bias")),
        *((name, LONG) for name in ("outputs", "inputs", "group")),
        *((name, INT) for name in ("kind", "bits", "kept", "unused")),  # kind: gemm, integers, dots
    ]


@dataclass(frozen=True, slots=True)
class Coded:
    """Packed weights as `Kernels.coded` reads them: for each 32 outputs, and each input in turn, their codes.

    codes (panels, K, 16) uint8, 4 bits each, output i in the low half of byte i and output i + 16 in the high one, or
    (panels, K, 32) int8; scales and offsets (panels, groups, 32) in one of SCALES; values (16,) fp32, what a 4-bit
    code means. W = value * scale + offset.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    values: Tensor | None


@dataclass(frozen=True, slots=True)
class Integers:
    """Weights as `Kernels.integers` reads them: of four inputs at a time the codes of a panel's 32 outputs.

    codes (panels, K / 4, 32, 4) uint8, 128 above their value, or (panels, K / 4, 16, 4) uint8, 8 above it, output i in
    the low half and output i + 16 in the high one; scales and offsets as in `Coded`, groups multiples of SHARE. With
    values (16,) uint8, 128 above what a half means, halves are indices of them.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    values: Tensor | None = None


class Kernels:
    """The functions of the library. Tensors are on the CPU, bf16 or fp32, and alike unless said."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._call = {name: getattr(library, f"promptstitch_{name}") for name in SIGNATURES}
        for name, signature in SIGNATURES.items():
            self._call[name].argtypes, self._call[name].restype = signature, None

        self._dot_gain = library.promptstitch_dot_gain
        self._dot_gain.restype = ctypes.c_double
        self.multiplies_integers = bool(library.promptstitch_integers_supported())
        self.dots = bool(library.promptstitch_dots_supported())  # whether the CPU has the bf16 dot product
        self.matrix_units = bool(library.promptstitch_matrix_units())

    def dot_gain(self) -> float:
        """Products a second of the bf16 dot product, which this CPU must have, over those of fp32's multiply-add."""
        return float(self._dot_gain())

    def product_of(self, weights: Tensor | Coded | Integers, bias: Tensor | None, outputs: int, inputs: int) -> Product:
        """What `linear` (panels), `coded` or `integers` would do, for `step`."""
        if isinstance(weights, Tensor):
            kind, at = 2 if weights.shape[2] == PANEL else 0, weights.data_ptr()
            return Product(at, None, None, None, _address(bias), outputs, inputs, inputs, kind, 16, 0)
        packed = (weights.codes, weights.scales, weights.offsets, weights.values, bias)
        group, integers = inputs // weights.scales.shape[1], isinstance(weights, Integers)
        bits = weights.codes.shape[2] // (PANEL // 8)
        kept = SCALES.index(weights.scales.dtype)
        return Product(*map(_address, packed), outputs, inputs, group, integers, bits, kept)

    def step(self, *addresses: ctypes.Structure | ctypes.Array[Any] | Tensor) -> None:
        """Of `llama.step`, which says what they are."""
        self._call["step"](*(a.data_ptr() if isinstance(a, Tensor) else ctypes.addressof(a) for a in addresses))

    def panels(self, weight: Tensor) -> Tensor:
        """W (N, K) → (ceil(N / 32), K, 16) int32, as `linear` reads it."""
        return self._laid_out("panels", weight, weight.shape[1], PANEL // 2)

    def pairs(self, weight: Tensor) -> Tensor:
        """W (N, K), K even → (ceil(N / 32), K / 2, 32) int32, as `linear` reads it where `in_pairs` says so."""
        return self._laid_out("pairs", weight, weight.shape[1] // 2, PANEL)

    def _laid_out(self, layout: str, weight: Tensor, rows: int, width: int) -> Tensor:
        (n, k), weight = weight.shape, weight.contiguous()
        panels = torch.empty(-(-n // PANEL), rows, width, dtype=torch.int32)
        self._call[layout](weight.data_ptr(), n, k, panels.data_ptr())
        return panels

    def linear(self, x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        """x (T, K) bf16 → x Wᵀ + b (T, N), summed in fp32; over `panels` fp32, too."""
        if panels.shape[2] < PANEL:
            return self._product(16, x, panels, None, None, None, x.shape[1], bias, out_features)
        assert x.dtype == torch.bfloat16
        x = x.contiguous()
        (m, k), y = x.shape, x.new_empty(x.shape[0], out_features)
        self._call["dots"](x.data_ptr(), panels.data_ptr(), _address(bias), m, out_features, k, y.data_ptr())
        return y

    def coded(self, x: Tensor, weights: Coded, bias: Tensor | None, out_features: int) -> Tensor:
        """x (T, K) bf16 or fp32, bias alike → x Wᵀ + b (T, N), summed in fp32."""
        codes, scales, offsets = weights.codes, weights.scales, weights.offsets
        group = codes.shape[1] // scales.shape[1]
        bits = codes.shape[2] // (PANEL // 8)
        return self._product(bits, x, codes, scales, offsets, weights.values, group, bias, out_features)

    def _product(
        self,
        bits: int,
        x: Tensor,
        panels: Tensor,
        scales: Tensor | None,
        offsets: Tensor | None,
        values: Tensor | None,
        group: int,
        bias: Tensor | None,
        out_features: int,
    ) -> Tensor:
        x = x.contiguous()
        (m, k), y = x.shape, x.new_empty(x.shape[0], out_features)
        packed = [None if t is None else t.data_ptr() for t in (panels, scales, offsets, values)]
        b = None if bias is None else bias.data_ptr()
        kept = 0 if scales is None else SCALES.index(scales.dtype)
        self._call["gemm"](bits, kept, _wide(x), x.data_ptr(), *packed, group, b, m, out_features, k, y.data_ptr())
        return y

    def integers(self, x: Tensor, weights: Integers, bias: Tensor | None, out_features: int) -> Tensor:
        """x (T, K) bf16 or fp32, bias alike → x Wᵀ + b (T, N). Where `multiplies_integers` says so.

        x is rounded to 8 bits, 32 or 64 neighbours to a scale. A row is the same to the last bit in any batch.
        """
        x, codes, scales = x.contiguous(), weights.codes, weights.scales
        (m, k), y = x.shape, x.new_empty(x.shape[0], out_features)
        bits, kept = codes.shape[2] // (PANEL // 8), SCALES.index(scales.dtype)
        packed = [None if t is None else t.data_ptr() for t in (codes, scales, weights.offsets, weights.values)]
        b = None if bias is None else bias.data_ptr()
        group = k // scales.shape[1]
        self._call["integers"](bits, kept, _wide(x), x.data_ptr(), *packed, group, b, m, out_features, k, y.data_ptr())
        return y

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (T, H) → (T, H)."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._call["norm"](_wide(x), x.data_ptr(), weight.data_ptr(), eps, *x.shape, y.data_ptr())
        return y

    def norm_slope(self, dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """dy (T, H) fp32, x and weight as in `norm` → dx (T, H)."""
        x, dy = x.contiguous(), dy.contiguous()
        dx = torch.empty_like(x)
        self._call["norm_slope"](dy.data_ptr(), x.data_ptr(), weight.data_ptr(), eps, *x.shape, dx.data_ptr())
        return dx

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (T, heads, D), D a multiple of 32, cos and sin (T, 1, D) → (T, heads, D)."""
        x = x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
        y = x.new_empty(x.shape)
        tables = (cos.data_ptr(), sin.data_ptr())
        self._call["rotate"](_wide(x), x.data_ptr(), x.stride(0), *tables, *x.shape, y.data_ptr())
        return y

    def swiglu(self, x: Tensor) -> Tensor:
        """x (T, 2 I), gate beside up → silu(gate) * up (T, I)."""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], x.shape[1] // 2)
        self._call["swiglu"](_wide(x), x.data_ptr(), *y.shape, y.data_ptr())
        return y

    def swiglu_slope(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy (T, I) fp32, x as in `swiglu` → dx (T, 2 I)."""
        x, dy = x.contiguous(), dy.contiguous()
        dx = torch.empty_like(x)
        self._call["swiglu_slope"](dy.data_ptr(), x.data_ptr(), *dy.shape, dx.data_ptr())
        return dx

    def write(self, k: Tensor, v: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """k, v (T, KV heads, D) bf16 or fp32 → slots (T,) int64 of keys and values (pages, page size, KV heads, D)."""
        width = k.shape[1] * k.shape[2]
        at = (k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), slots.data_ptr())
        self._call["write"](_wide(k), *at, len(k), width, keys.data_ptr(), values.data_ptr())

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, rows: Tensor, lengths: Tensor
    ) -> Tensor:
        """q (T, heads, D) bf16 or fp32, keys and values as in `write` → (T, heads * D).

        Token t sees the first lengths[t] positions of the block table tables[rows[t]]; all three int32.
        """
        (tokens, heads, dim), (_, page, kv_heads, _) = q.shape, keys.shape
        out = q.new_empty(tokens, heads * dim)
        where = (keys.data_ptr(), values.data_ptr(), tables.data_ptr(), tables.shape[1], rows.data_ptr())
        shape = (tokens, kv_heads, heads // kv_heads, dim, page)
        kind = 1 if _wide(q) else self.attention_kind(dim)
        self._call["attention"](
            kind, q.data_ptr(), q.stride(0), *where, lengths.data_ptr(), *shape, dim**-0.5, out.data_ptr()
        )
        return out

    def attention_kind(self, dim: int) -> int:
        """How attention of heads of D multiplies bf16, as `attention.c` numbers it."""
        if self.matrix_units and self.dots and dim % MATRIX_INPUTS == 0:
            return 3
        return 2 * dot_is_faster()


def unpanelled(panels: Tensor, out_features: int) -> Tensor:
    """What `Kernels.panels` or `Kernels.pairs` was given: W (N, K) bf16."""
    halves = panels.view(torch.bfloat16).view(*panels.shape, 2)
    if panels.shape[2] == PANEL:  # (panels, K / 2, 32, which input)
        return halves.transpose(1, 2).reshape(-1, 2 * panels.shape[1])[:out_features]
    return halves.permute(0, 3, 2, 1).reshape(-1, panels.shape[1])[:out_features]  # (panels, K, 16, which half)


@cache
def kernels() -> Kernels | None:
    """The best kernels for this CPU, or None where none were built or it runs none."""
    return next((found for name in LIBRARIES if (found := built(name))), None)


def built(name: str) -> Kernels | None:
    """Those of one library, or None where it was not built or this CPU does not run it."""
    spec = importlib.util.find_spec(f"llama.{name}")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    return Kernels(library) if library.promptstitch_kernels_supported() else None


def fused(x: Tensor) -> Kernels | None:
    """The kernels if they take x between the products: on the CPU, bf16, or fp32 where a gradient is asked for."""
    if x.device.type != "cpu" or x.dtype != (torch.float32 if differentiated(x) else torch.bfloat16):
        return None
    return kernels()


def differentiated(x: Tensor) -> bool:
    """Whether somebody asks for a gradient by x."""
    return x.requires_grad and torch.is_grad_enabled()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _wide(x: Tensor) -> bool:
    return x.dtype == torch.float32


def product() -> Kernels | None:
    """The kernels, or None where oneDNN has matrix units for bf16 and they were built without."""
    ours = kernels()
    return ours if ours and (ours.matrix_units or not torch.cpu._is_amx_tile_supported()) else None


@cache
def dot_is_faster() -> bool:
    """Whether this CPU's bf16 dot product beats its fp32 multiply-add."""
    ours = kernels()
    return ours is not None and ours.dots and ours.dot_gain() >= DOT_GAIN


def in_pairs(inputs: int) -> bool:
    """Whether bf16 weights of so many inputs lie in `pairs`: for matrix units, or where the dot product is faster."""
    ours = kernels()
    on_matrix_units = ours is not None and ours.matrix_units and inputs % MATRIX_INPUTS == 0
    return on_matrix_units or (dot_is_faster() and inputs % 2 == 0)
