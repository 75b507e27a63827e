"""From a soft prompt to prefix pages: the one place where prompts meet the model.

Both kinds end as the same pages. Knows pages and prompts; knows no requests, no texts, no names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from engine.attention import KVPages, Span, attend
from engine.pages import BLANK_PAGE
from llama.model import Llama
from llama.rope import rotate
from prompts_store.prompt import SoftPrompt

EMBEDDED_AT_ONCE = 4096  # token ids
PROBED = (4, 64)  # positions: few rows and many may be multiplied by different kernels


@torch.inference_mode()
def largest_norm(model: Llama) -> float:
    """The largest norm of a row of the embedding table: the scale of what the model is used to read."""
    ids = torch.arange(model.config.vocab_size, device=model.device)
    return max(float(model.embed(part).float().norm(dim=-1).max()) for part in torch.split(ids, EMBEDDED_AT_ONCE))


def mismatch(
    prompt: SoftPrompt, model: Llama, base: str, max_virtual_tokens: int, max_norm: float
) -> tuple[str, str] | None:
    """(code, why) this model cannot serve the prompt, or None. `max_norm` is that of a row."""
    config, n = model.config, prompt.num_virtual_tokens
    if prompt.base != base:
        return "base_model_mismatch", f"the prompt belongs to base {prompt.base}, this model's is {base}"
    if n > max_virtual_tokens:
        return "too_many_virtual_tokens", f"the prompt takes {n} positions, this server allows {max_virtual_tokens}"
    rows, kv = (n, config.hidden_size), (config.num_layers, config.num_kv_heads, n, config.head_dim)
    expected = rows if prompt.kind == "rows" else kv
    if prompt.shape != expected:
        return "hidden_size_mismatch", f"the prompt's shape is {prompt.shape}, this model needs {expected}"
    if not all(tensor.to(model.dtype).isfinite().all() for tensor in prompt.tensors.values()):
        return "non_finite", f"the prompt holds values that are not finite in {model.dtype}, which is served here"
    if prompt.kind == "rows" and (norm := float(prompt.tensors["prompt_embeddings"].norm(dim=-1).max())) > max_norm:
        return "norm_too_large", f"a row's norm is {norm:.3g}, this server allows {max_norm:.3g} (--max-prompt-norm)"
    return None


@torch.inference_mode()
def fingerprint(model: Llama, kv: KVPages, positions: int) -> bytes:
    """Of all that pages depend on besides the prompt: what two probes of up to so many positions come to.

    That is the weights and how they are multiplied: the compute dtype, 8-bit integers or not, which kernels this CPU
    was found to be fastest with, and what an upgrade does to them. Before any page is in use: it overwrites some.
    """
    digest = hashlib.blake2b(repr(kv.keys[:, BLANK_PAGE].shape).encode())
    for n in (min(probed, positions) for probed in PROBED):
        pages = range(BLANK_PAGE + 1, BLANK_PAGE + 1 - (-n // kv.page_size))
        rows = model.embed(torch.arange(n, device=model.device) % model.config.vocab_size)
        kv.blank(pages)
        fill(model, kv, SoftPrompt("rows", "", {"prompt_embeddings": rows.float().cpu()}), pages)
        digest.update(kv.dump(pages))
    return digest.digest()


def fill(model: Llama, kv: KVPages, prompt: SoftPrompt, pages: Sequence[int]) -> None:
    """Compute the KV of positions 0..N-1 into `pages`."""
    n = prompt.num_virtual_tokens
    positions = torch.arange(n, device=model.device)
    if prompt.kind == "rows":
        rows = prompt.tensors["prompt_embeddings"].to(model.device, model.dtype)
        model(rows, positions, attend(kv, [Span(pages, 0, n)]))
        return
    keys, values = (prompt.tensors[name].to(model.device, model.dtype) for name in ("keys", "values"))
    rotation = model.rope.tables(positions)
    slots = torch.tensor([pages[i // kv.page_size] * kv.page_size + i % kv.page_size for i in range(n)])
    for layer in range(model.config.num_layers):
        kv.write(
            layer, slots.to(model.device), rotate(keys[layer].transpose(0, 1), rotation), values[layer].transpose(0, 1)
        )
