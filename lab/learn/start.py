"""What learning starts from: rows of the embedding table, the rows of a text, or another prompt.

    first        the first N rows of the table, as the paper has it
    random       N rows of the table, drawn by the seed
    text         a text on what good text is; `text:WORDS` your own, repeated to N tokens
    FILE         a prompt file: its first N positions; rows also for a kv prompt

A `kv` prompt starts as the keys and values that such rows have in the model, so both kinds start with one loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lab.data.windows import Tokenizer
from lab.evaluate.forward import own_kv
from lab.learn.recipe import LearnError
from llama.config import LlamaConfig
from llama.model import Llama
from prompts_store.errors import InvalidArtifact
from prompts_store.file import Limits, read_prompt
from prompts_store.prompt import Kind, SoftPrompt

WORDS = (
    "The following is a text from the web, written by a person who knows the subject well. It is clear, correct "
    "and complete, and every sentence follows from the one before. The words are chosen with care, the facts are "
    "right, the names and the numbers are kept, and what is said at the end fits what was said at the beginning. "
)


@dataclass(frozen=True)
class Start:
    """Tensors as `SoftPrompt.tensors` names them, fp32, and the digests of the prompts that they come from."""

    tensors: Mapping[str, Tensor]
    parents: tuple[str, ...] = ()


def start(
    kind: Kind, init: str, n: int, parent: SoftPrompt | None, model: Llama, tokenizer: Tokenizer, seed: int
) -> Start:
    """N positions of this kind for the model; `parent` as `parent_of` gave it. Raises LearnError."""
    if parent is None:
        tensors: Mapping[str, Tensor] = {"prompt_embeddings": _table_rows(init, n, model, tokenizer, seed)}
    else:
        tensors = parent.first(n).tensors
    if kind == "kv" and "keys" not in tensors:
        tensors = own_kv(model, tensors)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    return Start(tensors, () if parent is None else (parent.digest,))


def parent_of(kind: Kind, init: str, n: int, base: str, config: LlamaConfig) -> SoftPrompt | None:
    """The prompt that `init` names, found to fit before a model is read; None if it names none. Raises LearnError."""
    if init in ("first", "random", "text") or init.startswith("text:"):
        if init == "first" and n > config.vocab_size:
            raise LearnError(f"positions is {n}, but the embedding table has only {config.vocab_size} rows")
        return None
    file = Path(init).expanduser()
    if not file.is_file():
        raise LearnError(f"init is {init!r}: neither first, random, text, text:WORDS nor a prompt file")
    shapes = Limits(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    try:
        prompt = read_prompt(file, shapes, default_base=base).prompt
    except InvalidArtifact as error:
        raise LearnError(f"init {file}: {error.message}") from error
    if prompt.base != base:
        raise LearnError(
            f"init {file} belongs to base {prompt.base}, the model's is {base}; take a prompt of this base"
        )
    if prompt.kind == "kv" and kind == "rows":
        raise LearnError(f"init {file} is a kv prompt, which has no rows; learn --kind kv, or start from rows")
    if prompt.num_virtual_tokens < n:
        raise LearnError(f"init {file} has {prompt.num_virtual_tokens} positions; ask for as many at most, not {n}")
    return prompt


def _table_rows(init: str, n: int, model: Llama, tokenizer: Tokenizer, seed: int) -> Tensor:
    """(N, H) of the embedding table."""
    if init == "first":
        ids = torch.arange(n)
    elif init == "random":
        ids = torch.randint(model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))
    else:
        words = init.partition(":")[2] or WORDS
        told = tokenizer.encode(words, "none")
        if not told:
            raise LearnError("init is a text without a token; write some words behind text:")
        ids = torch.tensor((told * (n // len(told) + 1))[:n])
    return model.embed(ids.to(model.device))
