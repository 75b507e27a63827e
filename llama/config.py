"""The model's configuration: the one reader of a Hub `config.json`.

Everything after this module works with the frozen LlamaConfig. Knows no tensors and no quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama.errors import BrokenCheckpoint, ModelError, UnsupportedModel

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
ARCHITECTURES = ("LlamaForCausalLM",)
_SIZES = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_len",
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding (Su et al. 2021) and how it is stretched. Lengths in tokens; unused fields keep their zero."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 0.0  # llama3
    high_freq_factor: float = 0.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn; 0 = derived from mscale and factor
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shapes of a LLaMA. `max_len` is the context in tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_len: int
    rms_norm_eps: float
    rope: RopeConfig
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Read the dictionary of a `config.json`. Raises UnsupportedModel, BrokenCheckpoint."""
        architectures = raw.get("architectures") or ["LlamaForCausalLM"]
        if raw.get("model_type") != "llama" or not all(name in ARCHITECTURES for name in _listed(architectures)):
            raise UnsupportedModel(
                f"config.json describes {architectures} (model_type {raw.get('model_type')!r}); "
                f"supported: {', '.join(ARCHITECTURES)} (model_type 'llama')"
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act is {raw['hidden_act']!r}; supported: 'silu'")
        try:
            heads = int(raw["num_attention_heads"])
            hidden = int(raw["hidden_size"])
            config = cls(
                hidden_size=hidden,
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                intermediate_size=int(raw["intermediate_size"]),
                vocab_size=int(raw["vocab_size"]),
                max_len=_max_len(raw),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope=_rope(raw),
                tied=bool(raw.get("tie_word_embeddings", False)),
                attention_bias=bool(raw.get("attention_bias", False)),
                mlp_bias=bool(raw.get("mlp_bias", False)),
            )
        except KeyError as missing:
            raise BrokenCheckpoint(f"config.json lacks the field {missing}") from missing
        except ModelError:
            raise
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise BrokenCheckpoint(f"config.json holds a value that cannot be read: {error}") from error
        config._check()
        return config

    def _check(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise BrokenCheckpoint(f"config.json: {name} comes to {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise BrokenCheckpoint(
                f"config.json: {self.num_heads} heads of {self.head_dim} cannot share {self.num_kv_heads} KV heads"
            )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rope_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` beside it (before)."""
    return {
        "rope_theta": raw.get("rope_theta", 10000.0),
        **(raw.get("rope_scaling") or {}),
        **(raw.get("rope_parameters") or {}),
    }


def _max_len(raw: Mapping[str, Any]) -> int:
    return int(raw.get("max_position_embeddings") or 2048)


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    fields = _rope_fields(raw)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(f"rope_type is {kind!r}; supported: {', '.join(ROPE_TYPES)}")
    if float(fields.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0) != 1.0:
        raise UnsupportedModel("partial_rotary_factor other than 1 is not supported")
    theta = float(fields["rope_theta"])
    if not 0 < theta < math.inf or (kind == "yarn" and theta == 1):
        raise BrokenCheckpoint(f"config.json: rope_theta is {theta:g}; it must be above 0, and of yarn not 1")
    if kind == "default":
        return RopeConfig(theta)
    optional = (
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    )
    over_length = kind in ("llama3", "yarn")  # others do not look at it
    original = int(fields.get("original_max_position_embeddings") or _max_len(raw))
    rope = RopeConfig(
        theta,
        kind=kind,
        factor=float(fields["factor"]),
        original_max_len=original if over_length else 0,
        truncate=bool(fields.get("truncate", True)),
        **{name: float(fields[name]) for name in optional if fields.get(name) is not None},
    )
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wrong = {
        "factor": not 0 < rope.factor < math.inf,
        "original_max_position_embeddings": over_length and original < 1,
        "low_freq_factor, high_freq_factor": kind == "llama3" and not 0 < low < high < math.inf,
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise BrokenCheckpoint(f"config.json: {names[0]} of rope_type {kind} is missing or cannot be: {dict(fields)}")
    return rope
