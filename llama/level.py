"""What a checkpoint's `config.json` says was done to its weights, as a canonical level name.

Knows the names only; a format that cannot be served is refused where its tensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llama.errors import UnsupportedModel
from llama.shards import json_object
from llama.sparse import SparseLayout

SUPPORTED = "dense; bitsandbytes nf4 and int8; compressed-tensors pack-quantized; gptq; promptstitch"
METHOD = "promptstitch"  # our own layouts, `llama.formats.promptstitch`
SPARSE_FORMAT = "promptstitch-sparse"
TABLES = {"bits": 8, "group_size": 32}
CLASS = "Linear"  # what compressed-tensors calls all layers that are not named


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
    if method == METHOD:
        _check_tables(quantisation)
        if quantisation.get("format") == "dense":
            return "dense"
        if quantisation.get("format") == SPARSE_FORMAT:
            return _sparse(quantisation.get("level"))
    if method in ("compressed-tensors", METHOD) and quantisation.get("format") == "pack-quantized":
        return _most(quantisation)
    raise UnsupportedModel(
        f"quantization_config says {method!r} {quantisation.get('format', '')!r}; supported: {SUPPORTED}"
    )


def of_integers(level: str) -> bool:
    """Whether the weights of a level are as good as integers times scales: `w4g64`, `w4g64-s50`, `int8`, `nf4`; not
    `s50`."""
    return level in ("int8", "nf4") or re.match("w[0-9]", level) is not None


def has_q8_tables(raw: Mapping[str, Any]) -> bool:
    """Whether `config.json` says that embedding and head are on the grid of `llama.q8`."""
    quantisation = json_object(raw.get("quantization_config"), "quantization_config")
    return quantisation.get("quant_method") == METHOD and quantisation.get("tables") == TABLES


def weight_schemes(quantisation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`config_groups.*.weights` of a compressed-tensors configuration. Raises BrokenCheckpoint."""
    groups = json_object(quantisation.get("config_groups"), "config_groups")
    return [json_object(json_object(groups[name], name).get("weights"), f"{name}.weights") for name in groups]


def _check_tables(quantisation: Mapping[str, Any]) -> None:
    if quantisation.get("tables") not in (None, TABLES):
        raise UnsupportedModel(f"quantization_config.tables is {quantisation['tables']!r}; supported: {TABLES}")


def _most(quantisation: Mapping[str, Any]) -> str:
    """The grid of all layers; where some have one of their own, that of all others."""
    groups = json_object(quantisation.get("config_groups"), "config_groups").values()
    grids = [_grid(grid.get("num_bits"), grid.get("group_size")) for grid in weight_schemes(quantisation)]
    if len(set(grids)) > 1:
        grids = [grid for grid, group in zip(grids, groups, strict=True) if CLASS in (group.get("targets") or ())]
    if len(set(grids)) == 1:
        return grids[0]
    raise UnsupportedModel(
        f"quantization_config.config_groups is not supported as it is; supported: one grid, or one whose targets are "
        f"{[CLASS]} beside those of layers that are named"
    )


def _sparse(level: Any) -> str:
    if isinstance(level, str) and SparseLayout.of_level(level):
        return level
    raise UnsupportedModel(f"quantization_config.level is {level!r}; {SPARSE_FORMAT} holds such as s50, w4g64-s2of4")


def _grid(bits: Any, group: Any) -> str:
    if not isinstance(bits, int):
        raise UnsupportedModel(f"quantization_config gives {bits!r} bits; supported: {SUPPORTED}")
    return f"w{bits}g{group}" if isinstance(group, int) and group > 0 else f"w{bits}"
