"""How a job is put to each kind of server: the most favourable form of the same work that it takes.

Each form is a function from a job to the JSON body of POST /v1/completions. Knows bodies, sends nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from bench.workload import Job, sampled_text

Form = Callable[[Job], dict[str, Any]]
EMBEDDING_TABLE = "model.embed_tokens.weight"


def named(model: str) -> Form:
    """The server holds the prompts and stitches the one that `model` names; `model` itself is the bare one."""
    return lambda job: {"model": job.prompt or model, "prompt": job.text}


def text_prefix(model: str, tokenizer: Tokenizer, tokens: int = 64) -> Form:
    """Stored soft prompts do not exist: a text of the same length stands in, kept in the server's prompt cache."""

    def prefix(prompt: str) -> str:
        words = sampled_text(2 * tokens, prompt)
        offsets = tokenizer.encode(words, add_special_tokens=False).offsets
        return words[: offsets[tokens - 2][1]] + "\n"  # the newline is the last token

    def body(job: Job) -> dict[str, Any]:
        text = prefix(job.prompt) + job.text if job.prompt else job.text
        return {"model": model, "prompt": text, "cache_prompt": True}

    return body


def prompt_embeds(
    model: str, tokenizer: Tokenizer, checkpoint: Path, prompts: Path, dtype: torch.dtype = torch.bfloat16
) -> Form:
    """Every request carries its whole input as vectors: soft rows, then the embedded text (`torch.save`, base64).

    `prompts` holds one `{name}.safetensors` for each prompt, `checkpoint` the embedding table. A job without a prompt
    goes as text.
    """
    table = embedding_table(checkpoint).to(dtype)  # (V, H)

    def body(job: Job) -> dict[str, Any]:
        if job.prompt is None:
            return {"model": model, "prompt": job.text}
        rows = load_file(prompts / f"{job.prompt}.safetensors")["prompt_embeddings"].to(dtype)  # (N, H)
        text = table[tokenizer.encode(job.text).ids]  # (T, H)
        buffer = io.BytesIO()
        torch.save(torch.cat([rows, text]), buffer)
        return {"model": model, "prompt_embeds": base64.b64encode(buffer.getvalue()).decode()}

    return body


def embedding_table(checkpoint: Path) -> torch.Tensor:
    """The input embeddings (V, H) as stored. Raises FileNotFoundError if no shard holds them."""
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            names = tensors.keys()
            if EMBEDDING_TABLE in names:
                table: torch.Tensor = tensors.get_tensor(EMBEDDING_TABLE)
                return table
    raise FileNotFoundError(f"no safetensors file in {checkpoint} holds {EMBEDDING_TABLE}")
