"""A GGUF file turned into a checkpoint in the Hub's layout.

Knows transformers' GGUF reader, which does the reading; knows no download. Values are kept to the last bit: what the
file's blocks stand for, in fp32, so that the grid they once were put on is still there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama.config import LlamaConfig
from llama.errors import UnsupportedModel

TIED_HEAD = "lm_head.weight"


def convert(source: Path, target: Path) -> None:
    """Write config, fp32 safetensors, tokenizer and generation config of the GGUF `source` into the folder `target`.

    Raises UnsupportedModel if the file is no LLaMA.
    """
    where = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModel(f"{source} is not a GGUF file of a LLaMA that transformers reads: {error}") from error
    config = model.config.to_diff_dict()
    for inner in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(inner, None)
    config["architectures"] = [type(model).__name__]
    tied = LlamaConfig.from_hf(config).tied
    state = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == TIED_HEAD)}
    save_torch_state_dict(state, target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
