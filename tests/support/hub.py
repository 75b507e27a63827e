"""A two-layer LLaMA checkpoint in the Hub's layout, tokenizer and template included, made from a seed."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE of exactly 300 tokens: two special ones, 256 bytes, 42 merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [f"the cat and the hat {i} were there on the mat with that other cat" for i in range(9)]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the model in fp32."""
    generator = torch.Generator().manual_seed(seed)
    h, f, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 16
    shapes = {"model.embed_tokens.weight": (CONFIG["vocab_size"], h), "model.norm.weight": (h,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes |= {block + "input_layernorm.weight": (h,), block + "post_attention_layernorm.weight": (h,)}
        shapes |= {f"{block}self_attn.{n}_proj.weight": (h, h) for n in "qo"}
        shapes |= {f"{block}self_attn.{n}_proj.weight": (kv, h) for n in "kv"}
        shapes |= {f"{block}mlp.{n}_proj.weight": (f, h) for n in ("gate", "up")}
        shapes |= {block + "mlp.down_proj.weight": (h, f)}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def write_checkpoint(folder: Path, config=None, state=None, shards: int = 1, template: str | None = TEMPLATE) -> Path:
    """Fill `folder`; with several shards, tensors are dealt to them in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    state = tensors() if state is None else state
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 7]}))
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[i::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
