"""A GGUF file turned into a checkpoint in the Hub's layout.

Knows transformers' GGUF reader, which does the reading; knows no download. Values are kept to the last bit: what the
file's blocks stand for, in fp32, so that the grid they once were put on is still there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGUFReader
from huggingface_hub import save_torch_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama.config import LlamaConfig
from llama.errors import UnsupportedModel

TIED_HEAD = "lm_head.weight"
# What a file must hold, in llama.cpp's names; and the head, where it is not the embedding.
TENSORS = ("token_embd", "output_norm")
OF_BLOCK = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
HEAD = "output.weight"


def _check(source: Path) -> None:
    """The reader makes up what is missing and passes over what it does not know. Raises UnsupportedModel."""
    try:
        reader = GGUFReader(source)
        family = reader.fields["general.architecture"].contents()
        blocks = int(reader.fields[f"{family}.block_count"].contents())
        scaling = reader.fields.get(f"{family}.rope.scaling.type")
        kind = "none" if scaling is None else str(scaling.contents())
        found = {tensor.name for tensor in reader.tensors}
    except Exception as error:  # a broken file
        raise UnsupportedModel(f"{source} is not a GGUF file that can be read: {error}") from error
    wanted = {f"{name}.weight" for name in TENSORS}
    wanted |= {f"blk.{index}.{name}.weight" for index in range(blocks) for name in OF_BLOCK}
    if missing := sorted(wanted - found):
        raise UnsupportedModel(f"{source} lacks {missing[0]}, of {len(missing)} tensors of a LLaMA that are missing")
    lost = sorted(found - wanted - {HEAD})
    if kind != "none" or lost:  # rope_freqs.weight is how llama3 scales positions
        what = f"positions scaled by {kind}" if kind != "none" else lost[0]
        raise UnsupportedModel(f"{source} has {what}, which its conversion would lose; pull the model's own repository")


def convert(source: Path, target: Path) -> None:
    """Write config, fp32 safetensors, tokenizer and generation config of the GGUF `source` into the folder `target`.

    Raises UnsupportedModel if the file is no LLaMA, or one that would be read as another than it is.
    """
    _check(source)
    where = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    except Exception as error:  # whatever a broken file does to the reader
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
