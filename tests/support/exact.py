"""The plain reference: transformers over the same weights, with soft prompts as `inputs_embeds` or a cache.

An answer is judged by one teacher-forced forward over our own output: every token must be the reference's argmax. A
place where the reference's best two logits lie within `TIE` is a tie; what comes after a tie taken the other way is
judged on our own continuation all the same, so nothing behind a tie goes unchecked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaForCausalLM

from prompts_store.prompt import SoftPrompt

TIE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """Positions of an answer that are ties taken the other way, and that are plainly wrong."""

    ties: tuple[int, ...]
    wrong: tuple[int, ...]


@torch.inference_mode()
def teacher_forced(
    model: LlamaForCausalLM, text: Sequence[int], answer: Sequence[int], prompt: SoftPrompt | None
) -> torch.Tensor:
    """Logits (len(answer), V) that the reference gives before each token of our answer."""
    ids = torch.tensor([[*text, *answer]])
    embeds, cache, soft = model.get_input_embeddings()(ids), None, 0
    if prompt is not None and prompt.kind == "rows":
        embeds = torch.cat((prompt.tensors["prompt_embeddings"][None].to(embeds.dtype), embeds), 1)
        soft = prompt.num_virtual_tokens
    elif prompt is not None:
        cache = kv_cache(model, prompt)
    logits = model(inputs_embeds=embeds, past_key_values=cache).logits[0].float()
    start = soft + len(text) - 1
    return logits[start : start + len(answer)]


def kv_cache(model: LlamaForCausalLM, prompt: SoftPrompt) -> DynamicCache:
    """A kv prompt as transformers' own cache: keys rotated for positions 0..N-1 by transformers' own code."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.arange(prompt.num_virtual_tokens)[None]
    cos, sin = model.model.rotary_emb(prompt.tensors["keys"], positions)
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(prompt.tensors["keys"], prompt.tensors["values"], strict=True)):
        rotated, _ = apply_rotary_pos_emb(k[None], k[None], cos, sin)
        cache.update(rotated, v[None], layer)
    return cache


def judge(model: LlamaForCausalLM, text: Sequence[int], answer: Sequence[int], prompt: SoftPrompt | None) -> Verdict:
    logits = teacher_forced(model, text, answer, prompt)
    best = logits.max(-1).values
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    off = (logits.argmax(-1) != torch.tensor(answer)).nonzero()[:, 0].tolist()
    ties = tuple(i for i in off if best[i] - chosen[i] <= TIE)
    return Verdict(ties, tuple(i for i in off if i not in ties))
