"""Small models and prompts that tests make for themselves: a random LLaMA in transformers and the same one in ours."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from llama.config import LlamaConfig
from llama.embedding import DenseEmbedding
from llama.linear import DenseLinear
from llama.model import Block, Llama, RMSNorm
from prompts_store.prompt import SoftPrompt

BASE = "sha256:" + "b" * 64


def reference(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, GQA 4:2, vocabulary of 256 bytes and a few specials, sharp enough that greedy answers vary."""
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 260,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": 257,
        "eos_token_id": 256,
        "pad_token_id": 259,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(HFConfig(**{**shape, **changes})).eval()


def ours(model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> Llama:
    """Our model over the same weights, without going through a file."""
    config = LlamaConfig.from_hf(model.config.to_dict())
    weights = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}

    def linear(*names: str) -> DenseLinear:
        biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
        return DenseLinear(
            torch.cat([weights[f"{name}.weight"] for name in names]), torch.cat(biases) if biases else None
        )

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights[f"{name}.weight"], config.rms_norm_eps)

    def block(i: int) -> Block:
        at = f"model.layers.{i}"
        qkv = linear(*(f"{at}.self_attn.{x}_proj" for x in "qkv"))
        gate_up = linear(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj")
        return Block(
            config,
            i,
            norm(f"{at}.input_layernorm"),
            qkv,
            linear(f"{at}.self_attn.o_proj"),
            norm(f"{at}.post_attention_layernorm"),
            gate_up,
            linear(f"{at}.mlp.down_proj"),
        )

    blocks = [block(i) for i in range(config.num_layers)]
    embedding = DenseEmbedding(weights["model.embed_tokens.weight"])
    return Llama(config, embedding, blocks, norm("model.norm"), linear("lm_head")).eval()


def rows(n: int, hidden: int, seed: int = 0, scale: float = 0.2, **fields: Any) -> SoftPrompt:
    """A random `rows` prompt."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"prompt_embeddings": torch.randn(n, hidden, generator=generator) * scale}
    return SoftPrompt("rows", fields.pop("base", BASE), tensors, **fields)


def kv(n: int, config: LlamaConfig, seed: int = 0, scale: float = 0.5, **fields: Any) -> SoftPrompt:
    """A random `kv` prompt."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_layers, config.num_kv_heads, n, config.head_dim)
    tensors = {name: torch.randn(shape, generator=generator) * scale for name in ("keys", "values")}
    return SoftPrompt("kv", fields.pop("base", BASE), tensors, **fields)


class ByteTokenizer:
    """Ids 0..255 are bytes, then EOS, BOS, a role mark and padding."""

    bos_token_id: int | None = 257
    eos_token_ids = frozenset({256})
    special_token_ids = frozenset({256, 257, 258, 259})
    chat_template_digest = "sha256:" + hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str, bos: str = "tokenizer") -> list[int]:
        ids = list(text.encode())
        return [257, *ids] if bos == "after_prompt" else ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [258, *f"{message['role']}: {message['content']}\n".encode()]
        return [*ids, 258, *b"assistant: "]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return (
            bytes([token_id]) if token_id < 256 else {256: b"<eos>", 257: b"<bos>", 258: b"<role>"}.get(token_id, b"")
        )
