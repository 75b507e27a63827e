"""Who a model is: the digests `base` and `weights`.

`base` says what a soft prompt must match: the numbers of the configuration, the vocabulary, the input embeddings of
the dense model. `weights` says which very tensors are served. Knows files; knows no level, no format and no forward.
All digests are `sha256:<hex>`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import Checkpoint
from llama.config import LlamaConfig
from llama.errors import BrokenCheckpoint
from llama.formats.promptstitch import stored_table, table_rows
from llama.shards import chunks, open_shard, read_json, tensor_files

BASE_DOMAIN = b"promptstitch.base.v1\0"
WEIGHTS_DOMAIN = b"promptstitch.weights.v1\0"
DERIVED_DOMAIN = b"promptstitch.weights.derived.v1\0"
EMBEDDING = "model.embed_tokens"
HASH_ROWS = 4096  # of the embedding, at once

_CONFIG_FIELDS = (  # names, context length and epsilon are no part: the same prompt fits
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tied",
)
_ROPE_FIELDS = (
    "theta",
    "kind",
    "factor",
    "original_max_len",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


def base_digest(directory: Path) -> str:
    """The fingerprint of the dense checkpoint in `directory`: config numbers, vocabulary and merges, embeddings.

    The embedding table is hashed as fp32 whatever it is stored in. Raises ModelError.
    """
    config = LlamaConfig.from_hf(read_json(directory / "config.json"))
    digest = hashlib.sha256(BASE_DOMAIN)
    digest.update(_canonical(_numbers(config)) + b"\0")
    digest.update(_canonical(_vocabulary(read_json(directory / "tokenizer.json"))) + b"\0")
    table = stored_table(Checkpoint(directory), EMBEDDING)
    digest.update(_canonical(table.shape) + b"\0")
    for start in range(0, table.shape[0], HASH_ROWS):
        rows = table_rows(table, start, min(start + HASH_ROWS, table.shape[0]))
        digest.update(rows.contiguous().numpy().astype("<f4", copy=False).data)
    return f"sha256:{digest.hexdigest()}"


def weights_digest(directory: Path) -> str:
    """The digest of every tensor as stored on disk, whatever the sharding: name, dtype, shape, bytes, by name.

    Raises BrokenCheckpoint.
    """
    assert sys.byteorder == "little"  # safetensors' own order, and that of every machine torch is built for
    files = tensor_files(directory)
    shards = {path: open_shard(path) for path in set(files.values())}
    digest = hashlib.sha256(WEIGHTS_DOMAIN)
    for name in sorted(files):
        shard = shards[files[name]]
        piece = shard.get_slice(name)
        digest.update(_canonical([name, piece.get_dtype(), piece.get_shape()]) + b"\0")
        for rows in chunks(shard, name):
            digest.update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def derived_weights(source: str, level: str, quantiser: str) -> str:
    """The `weights` of a model that is quantised at load: of the source's `weights`, the level, quantiser@version."""
    parts = b"\0".join(part.encode() for part in (source, level, quantiser))
    return f"sha256:{hashlib.sha256(DERIVED_DOMAIN + parts).hexdigest()}"


def text_digest(text: str) -> str:
    """The digest of a text, as of a chat template."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _numbers(config: LlamaConfig) -> dict[str, Any]:
    rope = asdict(config.rope)
    return {
        **{name: getattr(config, name) for name in _CONFIG_FIELDS},
        "rope": {name: rope[name] for name in _ROPE_FIELDS},
    }


def _vocabulary(raw: dict[str, Any]) -> dict[str, Any]:
    """Token -> id and the merges in order, free of how a library version happens to write them."""
    try:
        model = raw["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):  # unigram: [piece, score] in the order of ids
            pairs = {piece: index for index, (piece, _) in enumerate(vocab)}
        else:
            pairs = {str(token): int(index) for token, index in vocab.items()}
        pairs |= {added["content"]: int(added["id"]) for added in raw.get("added_tokens") or ()}
        merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.get("merges") or ()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BrokenCheckpoint(f"tokenizer.json holds no vocabulary that could be read: {error!r}") from error
    return {"vocab": sorted(pairs.items(), key=lambda pair: (pair[1], pair[0])), "merges": merges}
