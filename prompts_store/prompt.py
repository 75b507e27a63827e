"""The soft prompt as an immutable value, and its identity.

Knows tensors and hashing; knows no file format, no database and no model. Names, versions, tasks and levels are
columns of the registry: they point at a digest and are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch

Kind = Literal["rows", "kv"]
Bos = Literal["tokenizer", "none", "after_prompt"]

DOMAIN = b"promptstitch.soft-prompt.v1"
TENSOR_NAMES: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {"rows": ("prompt_embeddings",), "kv": ("keys", "values")}
)


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """N learned positions that stand in front of a text.

    kind "rows": `tensors["prompt_embeddings"]` (N, H), input vectors.
    kind "kv":   `tensors["keys"]`, `tensors["values"]`, each (layers, KV heads, N, D); keys before RoPE.

    Tensors are fp32, on the CPU and contiguous; nobody may write to them. `base` is the fingerprint of the dense
    model that the prompt belongs to, `bos` the place of a BOS token, `chat_template` the digest of the template
    it was learned with, or "none". Equality and hash are those of `digest`.

    Raises ValueError where kind, names, ranks, dtypes or shapes do not fit together.
    """

    kind: Kind
    base: str
    tensors: Mapping[str, torch.Tensor]
    bos: Bos = "tokenizer"
    chat_template: str = "none"

    def __post_init__(self) -> None:
        if tuple(sorted(self.tensors)) != tuple(sorted(TENSOR_NAMES[self.kind])):
            raise ValueError(
                f"a prompt of kind {self.kind} holds {TENSOR_NAMES[self.kind]}, got {sorted(self.tensors)}"
            )
        rank = 2 if self.kind == "rows" else 4
        for name, tensor in self.tensors.items():
            if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError(f"{name} must be a contiguous fp32 tensor on the CPU")
            if tensor.ndim != rank or tensor.numel() == 0:
                raise ValueError(f"{name} must have {rank} axes, none empty; got {tuple(tensor.shape)}")
        if len({tuple(t.shape) for t in self.tensors.values()}) != 1:
            raise ValueError("keys and values must have one shape")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensors[TENSOR_NAMES[self.kind][0]].shape)

    @property
    def num_virtual_tokens(self) -> int:
        """N, the positions it takes in the context."""
        return self.shape[0] if self.kind == "rows" else self.shape[2]

    @property
    def hidden_size(self) -> int | None:
        """H for rows; a kv prompt has none."""
        return self.shape[1] if self.kind == "rows" else None

    def first(self, n: int) -> SoftPrompt:
        """Its first n positions, 1 to N, as a prompt of their own: whoever serves or caches it sees another digest.

        Attention is causal, so what these positions leave in a cache is the same as in front of the rest of them.
        """
        if not 1 <= n <= self.num_virtual_tokens:
            raise ValueError(f"a prompt of {self.num_virtual_tokens} positions has no first {n}")
        axis = 0 if self.kind == "rows" else 2
        tensors = {name: tensor.narrow(axis, 0, n).contiguous() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` over domain, kind, base, shape, bos, chat template and the fp32 little-endian bytes."""
        digest = hashlib.sha256(DOMAIN)
        shape = ",".join(map(str, self.shape))
        for part in (self.kind, self.base, shape, self.bos, self.chat_template):
            digest.update(b"\0" + part.encode())
        digest.update(b"\0")
        for name in TENSOR_NAMES[self.kind]:
            digest.update(self.tensors[name].numpy().astype("<f4", copy=False).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SoftPrompt) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)
