"""The checkpoint of integers that vLLM is raced with is the dense one, rounded by output channel."""

import json

import torch
from safetensors.torch import load_file
from support.checkpoints import model, save

from bench.w8a8 import write_w8a8


def test_products_are_rounded_and_the_rest_stays(tmp_path):
    dense = save(tmp_path / "dense", model())
    folder = tmp_path / "w8a8"
    for _ in range(2):  # the second in the first one's place
        write_w8a8(dense, folder)
    before = load_file(dense / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    products = [name for name in before if name.endswith("_proj.weight")]
    assert products
    assert after.keys() == before.keys() | {f"{name}_scale" for name in products}
    for name, weight in before.items():
        if name in products:
            scale = after[f"{name}_scale"]
            assert after[name].dtype is torch.int8
            assert ((after[name] * scale - weight.float()).abs() <= 0.501 * scale).all()
        else:
            assert torch.equal(after[name], weight)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    assert not list(tmp_path.glob("*.making"))
