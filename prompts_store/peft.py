"""PEFT adapters in and out: PROMPT_TUNING and P_TUNING as rows, PREFIX_TUNING as kv.

`adapter_config.json` is read as data, a few scalar fields of it; PEFT itself is never called, because its loader turns
fields of the config into imports, downloads and allocations. Knows no database and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from prompts_store.errors import InvalidArtifact
from prompts_store.file import ANY, Limits, PromptFile, read_prompt, write_prompt, write_whole
from prompts_store.prefix_tuning import Turn, deepen, flatten
from prompts_store.prompt import Bos, SoftPrompt
from prompts_store.strict_json import load_object

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 64 * 1024
MAX_COUNT = 1 << 24
MAX_TEXT = 512
ROWS_TYPES = ("PROMPT_TUNING", "P_TUNING")
PREFIX_TYPE = "PREFIX_TUNING"
_NEEDS_MODEL = (
    "its keys are stored after RoPE, and undoing that takes the model's config: say --model, the one it was learned on"
)
_REFUSED = {
    "MULTITASK_PROMPT_TUNING": "its rows are a product with a task's factors; save the product as PROMPT_TUNING",
    "CPT": "its rows are a sum with token embeddings; save the sum as PROMPT_TUNING",
    "CARTRIDGE": "its keys and values belong to one cache layout; it cannot be imported",
}


@dataclass(frozen=True, slots=True)
class _Config:
    """The fields that matter. A count that is None was not given."""

    peft_type: str
    base_model_name_or_path: str | None
    revision: str | None
    num_virtual_tokens: int | None
    token_dim: int | None
    num_attention_heads: int | None  # of a prefix: the KV heads

    @classmethod
    def parse(cls, data: bytes) -> _Config:
        if len(data) > MAX_CONFIG_BYTES:
            raise _bad(CONFIG_NAME, f"has {len(data)} bytes, at most {MAX_CONFIG_BYTES} are read")
        fields = load_object(data.strip(), field=CONFIG_NAME, code="invalid_adapter_config")
        peft_type = _text(fields, "peft_type")
        if peft_type in _REFUSED:
            raise InvalidArtifact("unsupported_peft_type", f"{peft_type}: {_REFUSED[peft_type]}", "peft_type")
        if peft_type is None or peft_type not in (*ROWS_TYPES, PREFIX_TYPE):
            message = f"peft_type must be {', '.join(ROWS_TYPES)} or {PREFIX_TYPE}, not {peft_type!a}"
            raise InvalidArtifact("unsupported_peft_type", message, "peft_type")
        if _text(fields, "task_type") not in (None, "CAUSAL_LM"):
            raise _bad("task_type", "must be CAUSAL_LM: only language models are served")
        if _count(fields, "num_transformer_submodules") not in (None, 1):
            raise _bad("num_transformer_submodules", "must be 1: encoder-decoder models are not served")
        return cls(
            peft_type,
            _text(fields, "base_model_name_or_path"),
            _text(fields, "revision"),
            _count(fields, "num_virtual_tokens"),
            _count(fields, "token_dim"),
            _count(fields, "num_attention_heads"),
        )

    def as_recipe(self) -> Mapping[str, Any]:
        origin = {"type": self.peft_type, "base_model": self.base_model_name_or_path, "revision": self.revision}
        return {"peft": {key: value for key, value in origin.items() if value}}


def read_peft(
    config: bytes,
    weights: Path | bytes | BufferedIOBase,
    limits: Limits = ANY,
    *,
    default_base: str | None = None,
    bos: Bos | None = None,
    unrotate: Turn | None = None,
) -> PromptFile:
    """The rows of an adapter, bit for bit, or its prefix, whose keys `unrotate` turns back.

    Raises InvalidArtifact, for a prefix without `unrotate` too, and OSError for a path that cannot be read.
    """
    parsed = _Config.parse(config)
    deep = parsed.peft_type == PREFIX_TYPE
    if deep and unrotate is None:
        raise InvalidArtifact("unsupported_peft_type", f"{PREFIX_TYPE}: {_NEEDS_MODEL}", "peft_type")
    file = read_prompt(
        weights, replace(limits, hidden_size=None) if deep else limits, default_base=default_base, bos=bos
    )
    if file.prompt.kind != "rows":
        raise InvalidArtifact("unexpected_tensor", f"{parsed.peft_type} has one tensor, prompt_embeddings", "tensors")
    for name, declared, has in (
        ("num_virtual_tokens", parsed.num_virtual_tokens, file.prompt.num_virtual_tokens),
        ("token_dim", None if deep else parsed.token_dim, file.prompt.hidden_size),
    ):
        if declared not in (None, has):
            raise InvalidArtifact("shape_mismatch", f"{name} is {declared}, but the tensor has {has}", name)
    if unrotate is not None and deep:
        if parsed.num_attention_heads is None or parsed.token_dim is None:
            raise _bad("num_attention_heads and token_dim", "must be there to tell how a prefix is laid out")
        file = deepen(file, parsed.num_attention_heads, parsed.token_dim, unrotate, limits)
    if file.provenance.train is not None:
        return file
    return replace(file, provenance=replace(file.provenance, train=parsed.as_recipe()))


def read_peft_directory(
    directory: Path,
    limits: Limits = ANY,
    *,
    default_base: str | None = None,
    bos: Bos | None = None,
    unrotate: Turn | None = None,
) -> PromptFile:
    """What PEFT's `save_pretrained` wrote. Raises what `read_peft` raises."""
    weights = directory / WEIGHTS_NAME
    if not weights.exists():
        found = "only a pickle" if (directory / "adapter_model.bin").exists() else "none"
        message = f"{WEIGHTS_NAME} is needed, there is {found}; save the adapter with safe_serialization=True"
        raise InvalidArtifact("unsupported_format", message, WEIGHTS_NAME)
    return read_peft(read_config(directory), weights, limits, default_base=default_base, bos=bos, unrotate=unrotate)


def read_config(directory: Path) -> bytes:
    """The adapter's config, and no more of it than can be one. Raises OSError."""
    with (directory / CONFIG_NAME).open("rb") as stream:
        return stream.read(MAX_CONFIG_BYTES + 1)


def write_peft(directory: Path, file: PromptFile, *, base_model: str, rotate: Turn | None = None) -> None:
    """Write what `PeftModel.from_pretrained` loads; provenance travels in the tensors' metadata, which PEFT ignores.

    Rows become PROMPT_TUNING, a kv prompt PREFIX_TUNING, for which `rotate` turns its keys. `base_model` is the name or
    path of the dense model, for people and for `AutoPeftModel`. Raises ValueError for a kv prompt without `rotate`,
    OSError.
    """
    prompt = file.prompt
    if prompt.kind == "rows":
        layout = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": prompt.hidden_size}
    elif rotate is None:
        raise ValueError("a kv prompt becomes PREFIX_TUNING, which holds keys after RoPE: that takes a model")
    else:
        layers, heads, _, head_dim = prompt.shape
        width = heads * head_dim
        layout = {"peft_type": PREFIX_TYPE, "prefix_projection": False, "num_layers": layers, "token_dim": width}
        layout |= {"num_attention_heads": heads, "encoder_hidden_size": width}
        rows = SoftPrompt(
            "rows", prompt.base, {"prompt_embeddings": flatten(prompt, rotate)}, prompt.bos, prompt.chat_template
        )
        file = replace(file, prompt=rows)
    config = {
        **layout,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "task_type": "CAUSAL_LM",
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / CONFIG_NAME, f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode())
    write_prompt(directory / WEIGHTS_NAME, file)


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= MAX_TEXT):
        raise _bad(name, f"must be a string of at most {MAX_TEXT} characters")
    return value


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and not (type(value) is int and 1 <= value <= MAX_COUNT):
        raise _bad(name, f"must be an integer from 1 to {MAX_COUNT}")
    return value


def _bad(name: str, what: str) -> InvalidArtifact:
    return InvalidArtifact("invalid_adapter_config", f"{name} {what}", name)
