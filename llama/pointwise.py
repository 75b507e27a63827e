"""What stands between the products: norm, rotation, SwiGLU. By our kernels where they compute, else by torch.

In fp32 the kernels are taken where a gradient is asked for, which they give, too: learning spends a third of its time
here. Knows no layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llama.native import LANES, Kernels, differentiated, fused


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, H), weight (H,) → x / rms(x) * weight (Zhang & Sennrich 2019), in fp32 inside."""
    kernels = fused(x)
    if kernels is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _apply(_Norm, x, kernels, weight, eps) if differentiated(x) else kernels.norm(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, D), cos and sin (T, 1, D), of sin the first half negated → each head turned by its position."""
    kernels = fused(x) if x.shape[-1] % (2 * LANES) == 0 else None
    if kernels is None:
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    return _apply(_Rotate, x, kernels, cos, sin) if differentiated(x) else kernels.rotate(x, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (T, 2 I) → silu(gate) * up (T, I) (Shazeer 2020)."""
    kernels = fused(gate_up)
    if kernels is None:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    return _apply(_SwiGLU, gate_up, kernels) if differentiated(gate_up) else kernels.swiglu(gate_up)


def _apply(function: Any, *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernels, ctx.eps = kernels, eps
        return kernels.norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.kernels.norm_slope(dy, *ctx.saved_tensors, ctx.eps), None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors  # the transposed rotation has the halves of its sines exchanged
        return ctx.kernels.rotate(dy, cos, sin.roll(sin.shape[-1] // 2, -1)), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        return kernels.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.kernels.swiglu_slope(dy, *ctx.saved_tensors), None
