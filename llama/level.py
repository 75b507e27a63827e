"""What a foreign checkpoint's `config.json` says was done to its weights, as a canonical level name.

Knows the names only; a format that cannot be served is refused where its tensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama.errors import UnsupportedModel
from llama.shards import json_object

SUPPORTED = "dense; bitsandbytes nf4 and int8; compressed-tensors pack-quantized; gptq"


def declared_level(raw: Mapping[str, Any]) -> str:
    """The level of the checkpoint that the dictionary of a `config.json` describes. Raises UnsupportedModel.

    A grid with one scale for a whole row is written without a group: `w4`.
    """
    quantisation = json_object(raw.get("quantization_config"), "quantization_config")
    if not quantisation:
        return "dense"
    method = quantisation.get("quant_method")
    if method == "bitsandbytes" or quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit"):
        if not quantisation.get("load_in_4bit"):
            return "int8"
        if (kind := quantisation.get("bnb_4bit_quant_type", "fp4")) == "nf4":
            return "nf4"
        raise UnsupportedModel(f"quantization_config.bnb_4bit_quant_type is {kind!r}; supported: nf4")
    if method == "gptq":
        return _grid(quantisation.get("bits"), quantisation.get("group_size"))
    if method == "compressed-tensors" and quantisation.get("format") == "pack-quantized":
        levels = {_grid(grid.get("num_bits"), grid.get("group_size")) for grid in weight_schemes(quantisation)}
        if len(levels) == 1:
            return levels.pop()
        raise UnsupportedModel(f"quantization_config.config_groups holds {len(levels)} grids; supported: one")
    raise UnsupportedModel(
        f"quantization_config says {method!r} {quantisation.get('format', '')!r}; supported: {SUPPORTED}"
    )


def weight_schemes(quantisation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`config_groups.*.weights` of a compressed-tensors configuration. Raises BrokenCheckpoint."""
    groups = json_object(quantisation.get("config_groups"), "config_groups")
    return [json_object(json_object(groups[name], name).get("weights"), f"{name}.weights") for name in groups]


def _grid(bits: Any, group: Any) -> str:
    if not isinstance(bits, int):
        raise UnsupportedModel(f"quantization_config gives {bits!r} bits; supported: {SUPPORTED}")
    return f"w{bits}g{group}" if isinstance(group, int) and group > 0 else f"w{bits}"
