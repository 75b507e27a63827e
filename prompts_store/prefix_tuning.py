"""PEFT's layout of a prefix: one row (layers, key and value, heads, D) for each position, keys as a cache holds them.

A cache holds keys after RoPE, a kv prompt holds them before. Turning them takes a model's frequencies, which this
package does not know: the caller brings the function that turns keys (layers, KV heads, N, D) of positions 0 to N-1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from prompts_store.errors import InvalidArtifact
from prompts_store.file import Limits, PromptFile, encode_prompt, read_prompt
from prompts_store.prompt import SoftPrompt

Turn = Callable[[torch.Tensor], torch.Tensor]


def deepen(flat: PromptFile, heads: int, token_dim: int, unrotate: Turn, limits: Limits) -> PromptFile:
    """`flat`: a file of rows (N, layers * 2 * token_dim), as PEFT saves a prefix; heads are KV heads → the kv prompt.

    Raises InvalidArtifact.
    """
    n, width = flat.prompt.shape
    if token_dim % heads or width % (2 * token_dim):
        message = f"rows {width} wide are no pairs of keys and values of {heads} heads, {token_dim} wide together"
        raise InvalidArtifact("shape_mismatch", message, "token_dim")
    pairs = flat.prompt.tensors["prompt_embeddings"].view(n, -1, 2, heads, token_dim // heads)
    keys, values = pairs.permute(2, 1, 3, 0, 4)  # (2, layers, heads, N, D)
    wanted = (limits.num_layers, limits.num_kv_heads, None, limits.head_dim)
    if any(want not in (None, has) for want, has in zip(wanted, keys.shape, strict=True)):
        message = f"layers, KV heads, N, D of the prefix are {tuple(keys.shape)}, the model's are {wanted}"
        raise InvalidArtifact("shape_mismatch", message, "shape")
    tensors = {"keys": unrotate(keys).contiguous(), "values": values.contiguous()}
    prompt = SoftPrompt("kv", flat.prompt.base, tensors, flat.prompt.bos, flat.prompt.chat_template)
    # Once more through the reader of files: what comes in by this door is held to the same rules.
    return replace(read_prompt(encode_prompt(replace(flat, prompt=prompt)), limits), bound=flat.bound)


def flatten(prompt: SoftPrompt, rotate: Turn) -> torch.Tensor:
    """A kv prompt → (N, layers * 2 * KV heads * D) as PEFT loads it."""
    keys, values = rotate(prompt.tensors["keys"]), prompt.tensors["values"]
    return torch.stack((keys, values), 1).permute(3, 0, 1, 2, 4).reshape(prompt.num_virtual_tokens, -1)
