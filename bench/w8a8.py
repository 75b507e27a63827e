"""A checkpoint in 8-bit integers that vLLM multiplies as such: weights by output channel, inputs by token as they come
(compressed-tensors, `int-quantized`). Round-to-nearest; embeddings, head and norms stay as they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_EIGHT = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_EIGHT, "strategy": "channel", "dynamic": False},
            "input_activations": {**_EIGHT, "strategy": "token", "dynamic": True},
        }
    },
}


def write_w8a8(checkpoint: Path, folder: Path) -> None:
    """`checkpoint`, dense and in the Hub's layout, in 8-bit integers -> `folder`, which appears whole."""
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            shutil.copy(file, making)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (making / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISATION}), encoding="utf-8")
    tensors: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.endswith("_proj.weight"):
                scale = tensor.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127  # (N, 1)
                tensors[f"{name}_scale"], tensor = scale, (tensor.float() / scale).round().to(torch.int8)
            tensors[name] = tensor
    save_file(tensors, making / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
