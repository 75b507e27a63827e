"""What is served, as `EngineInfo` tells it: the model on the device, its pages and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from engine.api import EngineInfo, Tokenizer
from engine.attention import KVPages
from engine.options import EngineOptions
from llama.model import Llama


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the model on the device is. Digests as in EngineInfo; `weight_bytes` are resident ones."""

    name: str
    base: str
    level: str
    weights: str
    weight_bytes: int
    compute: str | None = None  # what its linears multiply; None: the dtype


def info_of(
    model: Llama, tokenizer: Tokenizer, served: ServedModel, options: EngineOptions, num_pages: int
) -> EngineInfo:
    """Of an engine with so many pages."""
    config, dtype = model.config, str(model.dtype).removeprefix("torch.")
    return EngineInfo(
        model=served.name,
        base=served.base,
        level=served.level,
        weights=served.weights,
        dtype=dtype,
        kv_dtype=dtype,
        device=str(model.device),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_model_len=options.context(model, num_pages),
        max_virtual_tokens=options.max_virtual_tokens,
        page_size=options.page_size,
        num_pages=num_pages,
        chat_template=tokenizer.chat_template_digest,
        weight_bytes=served.weight_bytes,
        kv_bytes=num_pages * KVPages.bytes_per_page(config, options.page_size, model.dtype),
        compute=served.compute or dtype,
    )
