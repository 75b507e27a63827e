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
from llama.model import Llama
from prompts_store.errors import InvalidArtifact
from prompts_store.file import read_prompt
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


def start(kind: Kind, init: str, n: int, base: str, model: Llama, tokenizer: Tokenizer, seed: int) -> Start:
    """N positions of this kind for the model. Raises LearnError."""
    parents: tuple[str, ...] = ()
    if init in ("first", "random") or init.partition(":")[0] == "text":
        tensors: Mapping[str, Tensor] = {"prompt_embeddings": _table_rows(init, n, model, tokenizer, seed)}
    else:
        prompt = _parent(Path(init).expanduser(), kind, n, base)
        tensors, parents = prompt.first(n).tensors, (prompt.digest,)
    if kind == "kv" and "keys" not in tensors:
        tensors = own_kv(model, tensors)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    _check_shapes(init, model, tensors)
    return Start(tensors, parents)


def _table_rows(init: str, n: int, model: Llama, tokenizer: Tokenizer, seed: int) -> Tensor:
    """(N, H) of the embedding table."""
    size = model.config.vocab_size
    if init == "first":
        if n > size:
            raise LearnError(f"positions is {n}, but the embedding table has only {size} rows")
        ids = torch.arange(n)
    elif init == "random":
        ids = torch.randint(size, (n,), generator=torch.Generator().manual_seed(seed))
    else:
        words = init.partition(":")[2] or WORDS
        told = tokenizer.encode(words, "none")
        if not told:
            raise LearnError("init is a text without a token; write some words behind text:")
        ids = torch.tensor((told * (n // len(told) + 1))[:n])
    return model.embed(ids.to(model.device))


def _parent(file: Path, kind: Kind, n: int, base: str) -> SoftPrompt:
    if not file.is_file():
        raise LearnError(f"init is {str(file)!r}: neither first, random, text, text:WORDS nor a prompt file")
    try:
        prompt = read_prompt(file, default_base=base).prompt
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


def _check_shapes(init: str, model: Llama, tensors: Mapping[str, Tensor]) -> None:
    config = model.config
    for name, tensor in tensors.items():
        n = tensor.shape[0] if name == "prompt_embeddings" else tensor.shape[2]
        rows, kv = (n, config.hidden_size), (config.num_layers, config.num_kv_heads, n, config.head_dim)
        wanted = rows if name == "prompt_embeddings" else kv
        if tuple(tensor.shape) != wanted:
            raise LearnError(f"init {init}: {name} is {tuple(tensor.shape)}, this model needs {wanted}")
