"""The same shape as transformers runs it with bitsandbytes: random weights in NF4, one token after another.

Knows transformers and bitsandbytes; of ours it knows the shape alone.
"""

from __future__ import annotations

import statistics
import time

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

from llama.config import LlamaConfig

TOKENS = 16


def nf4_model(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """Its linears as `load_in_4bit` leaves them, in NF4 with bf16 compute; embedding and head in bf16."""
    shape = HubConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_len,
    )
    with device:
        model = LlamaForCausalLM(shape).to(torch.bfloat16).eval()
    for name, layer in [each for each in model.model.named_modules() if isinstance(each[1], nn.Linear)]:
        model.model.set_submodule(name, _quantised(layer, device))
    return model


def seconds_a_token(model: LlamaForCausalLM, text: int, tries: int) -> float:
    """Median time of a token behind `text` others, the text's own time taken off."""
    device = model.device
    ids = torch.arange(text, device=device)[None] % model.config.vocab_size

    def took(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )[0, -1].item()  # waits for the device
        return time.perf_counter() - began

    took(1 + TOKENS)  # warm
    return statistics.median((took(1 + TOKENS) - took(1)) / TOKENS for _ in range(tries))


def _quantised(layer: nn.Linear, device: torch.device) -> Linear4bit:
    codes = Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    codes.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=codes)
    return codes.to(device)  # quantises
