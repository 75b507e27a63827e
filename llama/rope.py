"""Rotary position embedding and its stretched forms.

`frequencies` turns a RopeConfig into numbers, `Rope` turns positions into the tables that `rotate` applies. Knows no
attention and no cache. Every form here is static: a key, once rotated, never depends on how long the text becomes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama import pointwise
from llama.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies (D/2,) in fp32 and the factor by which cos and sin are scaled.

    default: Su et al. 2021, eq. 15; linear: Chen et al. 2023 (position interpolation); llama3: Llama 3.1's
    wavelength-dependent interpolation; yarn: Peng et al. 2023, eq. 22-25; dynamic: NTK-aware scaling, whose base does
    not change up to the original context, which is where the context is capped (see `LlamaConfig.max_len`).
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inverse), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inverse, head_dim), _yarn_scale(rope)
    return inverse, 1.0


def _llama3(rope: RopeConfig, inverse: Tensor) -> Tensor:
    wavelength = 2 * math.pi / inverse
    low = rope.original_max_len / rope.low_freq_factor
    high = rope.original_max_len / rope.high_freq_factor
    smooth = (rope.original_max_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    stretched = torch.where(wavelength > low, inverse / rope.factor, blended)
    return torch.where(wavelength < high, inverse, stretched)


def _yarn(rope: RopeConfig, inverse: Tensor, head_dim: int) -> Tensor:
    def dimension(rotations: float) -> float:
        """The axis that turns `rotations` times over the original context."""
        return head_dim * math.log(rope.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # a ramp of no width would divide by zero
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inverse / rope.factor * (1 - keep) + inverse * keep


def _yarn_scale(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Tables for T positions, ready to multiply: `cos` (T, 1, D) and `sin` (T, 1, D) with its first half negated."""

    cos: Tensor
    sin: Tensor


class Rope:
    """Positions to tables, for one model on one device."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        inverse, self._scale = frequencies(rope, head_dim)
        self._inverse = inverse.to(device)
        self._dtype = dtype

    def tables(self, positions: Tensor) -> Rotation:
        """positions (T,) integers → tables in the compute dtype, computed in fp32."""
        angles = positions[:, None].float() * self._inverse
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        return Rotation(
            torch.cat((cos, cos), -1).to(self._dtype)[:, None],
            torch.cat((-sin, sin), -1).to(self._dtype)[:, None],
        )


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (T, heads, D) → the same, each head turned by its position (the half-split layout of the Hub's checkpoints)."""
    return pointwise.rotate(x, rotation.cos, rotation.sin)


def unrotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (T, heads, D) that `rotate` made → what it was made of, to rounding. For files, not for speed."""
    scale = rotation.cos.square() + rotation.sin.square()  # a stretched form scales as it turns
    return rotate(x.double(), Rotation(rotation.cos.double() / scale, -rotation.sin.double() / scale)).to(x.dtype)


def turned(turn: Callable[[Tensor, Rotation], Tensor], keys: Tensor, rope: Rope) -> Tensor:
    """Keys (layers, KV heads, N, D) of positions 0 to N-1, by `rotate` or `unrotate`."""
    by_position = keys.permute(2, 0, 1, 3)
    tables = rope.tables(torch.arange(keys.shape[2], device=keys.device))
    return turn(by_position.flatten(1, 2), tables).view(by_position.shape).permute(1, 2, 0, 3).contiguous()
