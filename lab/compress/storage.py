"""How compressed layers are stored: as packed integers, as sparse rows, or dense as what they mean.

Knows tensors' names and the field `quantization_config`; knows no solver and no folder.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lab.compress.level import Bits
from lab.compress.solve import Solution


class Storage(Protocol):
    """A layout of a compressed checkpoint."""

    def tensors(self, module: str, layer: Solution) -> dict[str, Tensor]:
        """What is stored for the layer of a module (`model.layers.0.mlp.up_proj`)."""

    def quantisation(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json; None for plain weights."""


class DenseStorage:
    """Plain weights in `dtype`, as what they mean after compression."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def tensors(self, module: str, layer: Solution) -> dict[str, Tensor]:
        return {f"{module}.weight": layer.weight.to(self._dtype)}

    def quantisation(self) -> None:
        return None


class PackedStorage:
    """compressed-tensors' `pack-quantized`, symmetric: what transformers and vLLM read, too."""

    def __init__(self, grid: Bits) -> None:
        self._grid = grid

    def tensors(self, module: str, layer: Solution) -> dict[str, Tensor]:
        assert layer.codes is not None
        assert layer.grid is not None
        unsigned = (layer.codes.short() + 2 ** (self._grid.bits - 1)).to(torch.uint8)
        return {
            f"{module}.weight_packed": pack_stream(unsigned, self._grid.bits),
            f"{module}.weight_scale": layer.grid.scales,
            f"{module}.weight_shape": torch.tensor(layer.codes.shape),
        }

    def quantisation(self) -> dict[str, Any]:
        weights = {
            "num_bits": self._grid.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if self._grid.group else "channel",
            "group_size": self._grid.group,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",  # without it transformers loads, and computes nonsense
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        }


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """values (R, C) uint8 → (R, words) int32, as `llama.bits.unpack_stream` reads them."""
    octets = values.cpu().numpy()
    stream = np.unpackbits(octets[..., None], axis=-1, count=bits, bitorder="little").reshape(len(octets), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i4"))
