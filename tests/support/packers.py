"""Writers of packed checkpoints for tests, in numpy and with nothing in common with the readers.

Each takes a dense weight W (N, K), and gives the tensors that a real writer would store and the weights that they mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


def bit_stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned (R, C) → int32 (R, words): one bit after another, nothing left between values."""
    ones = (values[..., None].astype(np.int64) >> np.arange(bits)) & 1
    flat = ones.reshape(len(values), -1).astype(np.uint8)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def gapped_words(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned (R, C) → int32 (R, words) with 32 // bits values in each word."""
    per = 32 // bits
    padded = np.pad(values.astype(np.uint32), ((0, 0), (0, -values.shape[1] % per)))
    words = padded.reshape(len(values), -1, per) << (np.arange(per, dtype=np.uint32) * bits)
    return np.bitwise_or.reduce(words, axis=2).astype("<u4").view("<i4")


@dataclass(frozen=True)
class Grid:
    """Unsigned codes (N, K), scales and zero points (N, groups), the group (K,) of each input."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray

    @property
    def weight(self) -> torch.Tensor:
        """What they mean, fp32."""
        zeros, scales = self.zeros[:, self.g_idx].astype(np.float32), self.scales[:, self.g_idx].astype(np.float32)
        return torch.from_numpy((self.codes.astype(np.float32) - zeros) * scales)


def quantise(weight: torch.Tensor, bits: int, group: int, symmetric: bool, seed: int | None = None) -> Grid:
    """Round to a min-max grid with fp16 scales; a seed deals the inputs to their groups out of order."""
    w = weight.double().numpy()
    n, k = w.shape
    g_idx = np.arange(k) // group
    if seed is not None:
        g_idx = np.random.default_rng(seed).permutation(g_idx)
    groups, top = k // group, 2**bits - 1
    scales, zeros = np.empty((n, groups), np.float16), np.empty((n, groups), np.int64)
    for g in range(groups):
        part = w[:, g_idx == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[:, g] = (high - low) / top
        zeros[:, g] = 2 ** (bits - 1) if symmetric else np.round(-low / scales[:, g])
    zeros = zeros.clip(0, top)
    codes = np.round(w / scales[:, g_idx].astype(np.float64)) + zeros[:, g_idx]
    return Grid(codes.clip(0, top).astype(np.int64), scales, zeros, g_idx)


def gptq(name: str, grid: Grid, bits: int, version: int) -> dict[str, torch.Tensor]:
    """AutoGPTQ's tensors of the module `name`; version 1 stores zero points less one."""
    top = 2**bits - 1
    stored = (grid.zeros - 1) & top if version == 1 else grid.zeros
    return {
        f"{name}.qweight": torch.from_numpy(np.ascontiguousarray(bit_stream(grid.codes, bits).T)),
        f"{name}.qzeros": torch.from_numpy(bit_stream(np.ascontiguousarray(stored.T), bits).copy()),
        f"{name}.scales": torch.from_numpy(np.ascontiguousarray(grid.scales.T)),
        f"{name}.g_idx": torch.from_numpy(grid.g_idx.astype(np.int32)),
    }


def pack_quantized(
    name: str, grid: Grid, bits: int, *, gapped: bool = False, zeros: bool = False, g_idx: bool = False
) -> dict[str, torch.Tensor]:
    """compressed-tensors' tensors of the module `name`; `gapped` as its older versions packed."""
    pack = gapped_words if gapped else bit_stream
    tensors = {
        f"{name}.weight_packed": torch.from_numpy(pack(grid.codes, bits).copy()),
        f"{name}.weight_scale": torch.from_numpy(grid.scales.copy()),
        f"{name}.weight_shape": torch.tensor(grid.codes.shape),
    }
    if zeros:
        packed = pack(np.ascontiguousarray(grid.zeros.T), bits).T
        tensors[f"{name}.weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(packed))
    if g_idx:
        tensors[f"{name}.weight_g_idx"] = torch.from_numpy(grid.g_idx.astype(np.int32))
    return tensors
