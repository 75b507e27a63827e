"""How compressed layers are stored, and the tables: as packed integers, as sparse rows, or plain as what they mean.

Knows tensors' names and the field `quantization_config`; knows no solver and no folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lab.compress.level import Bits, Level
from lab.compress.methods import KEPT
from lab.compress.solve import Solution
from llama.bits import pack_stream
from llama.checkpoint import Checkpoint
from llama.errors import UnsupportedModel
from llama.formats.promptstitch import q8_tensors, sparse_quantisation
from llama.level import CLASS
from llama.q8 import q8_grid, q8_nearest, q8_table
from llama.sparse import SparseLayout


class Storage(Protocol):
    """A layout of a compressed checkpoint."""

    def tensors(self, module: str, layer: Solution, level: Level) -> dict[str, Tensor]:
        """What is stored for the layer of a module (`model.layers.0.mlp.up_proj`), which has this level."""

    def quantisation(self, others: Mapping[str, Level]) -> dict[str, Any] | None:
        """`quantization_config` of config.json; None for plain weights. `others`: modules of another level."""


class DenseStorage:
    """Plain weights in `dtype`, as what they mean after compression."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def tensors(self, module: str, layer: Solution, level: Level) -> dict[str, Tensor]:
        return {f"{module}.weight": layer.weight.to(self._dtype)}

    def quantisation(self, others: Mapping[str, Level]) -> None:
        return None


class PackedStorage:
    """compressed-tensors' `pack-quantized`, symmetric: what transformers and vLLM read, too."""

    def __init__(self, grid: Bits) -> None:
        self._grid = grid

    def tensors(self, module: str, layer: Solution, level: Level) -> dict[str, Tensor]:
        assert layer.codes is not None
        assert layer.grid is not None
        bits = layer.grid.bits
        return {
            f"{module}.weight_packed": pack_stream((layer.codes.short() + 2 ** (bits - 1)).to(torch.uint8), bits),
            f"{module}.weight_scale": layer.grid.scales,
            f"{module}.weight_shape": torch.tensor(layer.codes.shape),
        }

    def quantisation(self, others: Mapping[str, Level]) -> dict[str, Any]:
        named: dict[Bits, list[str]] = {}
        for module, level in others.items():
            assert level.grid is not None
            named.setdefault(level.grid, []).append(module)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",  # without it transformers loads, and computes nonsense
            "ignore": ["lm_head"],
            "config_groups": {
                f"group_{number}": _group(grid, targets)
                for number, (grid, targets) in enumerate([(self._grid, [CLASS]), *named.items()])
            },
        }


def _group(grid: Bits, targets: list[str]) -> dict[str, Any]:
    """One of `config_groups`."""
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grid.group else "channel",
        "group_size": grid.group,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


class SparseStorage:
    """Our own layout: what is kept, and a bitmap that tells where."""

    def __init__(self, level: str) -> None:
        layout = SparseLayout.of_level(level)
        if layout is None:
            raise ValueError(f"{level} is no sparse level")
        self._level, self._layout = level, layout

    def tensors(self, module: str, layer: Solution, level: Level) -> dict[str, Tensor]:
        assert layer.kept is not None
        assert level.sparsity is not None
        values = layer.weight.to(KEPT) if layer.codes is None else layer.codes
        packed = replace(self._layout, keep=level.sparsity.keep).pack(
            values, layer.kept, layer.grid.scales if layer.grid else None
        )
        return {f"{module}.{name}": tensor for name, tensor in packed.items()}

    def quantisation(self, others: Mapping[str, Level]) -> dict[str, Any]:
        keep = {module: level.sparsity.keep for module, level in others.items() if level.sparsity}
        return sparse_quantisation(self._level, keep)


@dataclass(frozen=True, slots=True)
class Table:
    """The table (V, H) of `module` (`model.embed_tokens`, `lm_head`), and how it is stored: as it is, or in 8 bits.

    `lossless` tells whether the 8-bit grid holds just what the table holds, as it does for one that came from GGUF.
    """

    module: str
    tensors: dict[str, Tensor]
    lossless: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint, module: str, in_8_bits: bool) -> Table:
        """Raises ModelError."""
        table = checkpoint.tensor(f"{module}.weight")
        if not in_8_bits:
            return cls(module, {f"{module}.weight": table})
        try:
            grid, lossless = q8_grid(table), True
        except UnsupportedModel:
            grid, lossless = q8_nearest(table), False
        return cls(module, q8_tensors(module, *grid), lossless)

    def rows(self, ids: Tensor) -> Tensor:
        """ids (…) → what is meant (…, H), fp32."""
        stored = self.tensors[f"{self.module}.weight"][ids]
        if stored.dtype.is_floating_point:
            return stored.float()
        scales = self.tensors[f"{self.module}.weight_scale"][ids]
        return q8_table(stored.flatten(0, -3), scales.flatten(0, -2)).view(*ids.shape, -1)
