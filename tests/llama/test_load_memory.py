"""Loading never holds two models: the peak of anonymous memory is little more than what stays."""

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from llama.formats.promptstitch import sparse_quantisation, with_q8_tables
from llama.manifest import Manifest
from llama.sparse import SparseLayout

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
LAYER = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (5632, 2048),
    "mlp.up_proj": (5632, 2048),
    "mlp.down_proj": (2048, 5632),
    "input_layernorm": (2048,),
    "post_attention_layernorm": (2048,),
}
CASES = {  # stored, level, computed in, layers
    "fp32 to bf16": ("F32", None, "bfloat16", 6),
    "fp32 to w4g64": ("F32", "w4g64", "bfloat16", 6),
    "bf16 to bf16": ("BF16", None, "bfloat16", 12),
    "bf16 to fp32": ("BF16", None, "float32", 12),
    "fp32 to nf4": ("F32", "nf4", "bfloat16", 6),
    "s50 to bf16": ("s50", None, "bfloat16", 10),
    "w4g64-s50 to 4 bits": ("w4g64-s50", None, "bfloat16", 24),
    "w8g64-s50 to 8 bits": ("w8g64-s50", None, "bfloat16", 12),
    "tables in 8 bits": ("Q8", None, "bfloat16", 1),
}
HALF_KEPT = b"\x55"  # of 8 inputs
VOCABULARY = {"Q8": 1 << 18}  # where it is not 8192: such that tables outweigh the rest
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I8": 1}
SLACK = 1.15

# The child prints [peak above the baseline, bytes that stay]. Torch lets go of the interpreter while it works, so that
# a thread sees every copy of some size.
CHILD = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from llama.load import load

torch.set_num_threads(1)
torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()  # the libraries' own buffers are no part of loading
folder, level, dtype = sys.argv[1:]

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

baseline, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
loaded = load(Path(folder), level=level or None, dtype=dtype, device="cpu")
done.set()
watcher.join()
print(json.dumps([peak - baseline, anonymous() - baseline, loaded.resident_bytes]))
"""


def described(stored: str, layers: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of every tensor of a checkpoint that stores what it stores so."""
    plain = stored if stored in BYTES else "F32"
    vocabulary = VOCABULARY.get(stored, 8192)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.norm.weight": (plain, (2048,))}
    for table in ("model.embed_tokens", "lm_head"):
        if stored == "Q8":
            tensors[f"{table}.weight"] = ("I8", (vocabulary, 64, 32))
            tensors[f"{table}.weight_scale"] = ("F16", (vocabulary, 64))
        else:
            tensors[f"{table}.weight"] = (plain, (vocabulary, 2048))
    layout = SparseLayout.of_level(stored)
    for layer, (name, shape) in product(range(layers), LAYER.items()):
        module = f"model.layers.{layer}.{name}"
        if layout is None or len(shape) == 1:
            tensors[f"{module}.weight"] = (plain, shape)
            continue
        dtypes = {"weight": "F32" if layout.bits is None else "I32", "weight_kept": "I64", "weight_scale": "BF16"}
        tensors |= {f"{module}.{key}": (dtypes[key], size) for key, size in layout.shapes(*shape).items()}
    return tensors


def write_holes(folder: Path, stored: str, layers: int) -> None:
    """A checkpoint of zeros whose file has all its length and hardly a block on the disk, but for bitmaps."""
    header, end = {}, 0
    for name, (dtype, shape) in described(stored, layers).items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    assert end > (1e9 if SparseLayout.of_level(stored) is None else 4e8)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, entry in header.items():
            if name.endswith("weight_kept"):
                start, stop = entry["data_offsets"]
                file.seek(8 + len(text) + start)
                file.write(HALF_KEPT * (stop - start))
    config = CONFIG | {"num_hidden_layers": layers, "vocab_size": VOCABULARY.get(stored, 8192)}
    if stored == "Q8":
        config["quantization_config"] = with_q8_tables(None)
    elif stored not in BYTES:
        config["quantization_config"] = sparse_quantisation(stored)
    (folder / "config.json").write_text(json.dumps(config))
    Manifest("sha256:" + "0" * 64, "dense", "sha256:" + "0" * 64, "holes", "test").write(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_the_resident_model(case, tmp_path, full):
    if not (full or case in list(CASES)[:2]):
        pytest.skip("under make test-all")
    stored, level, dtype, layers = CASES[case]
    write_holes(tmp_path, stored, layers)
    command = [sys.executable, "-c", CHILD, str(tmp_path), level or "", dtype]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peak, left, resident = json.loads(told.stdout)
    print(f"{case}: resident {resident >> 20} MiB, left {left / resident:.3f}, peak {peak / resident:.3f}")
    assert peak <= SLACK * resident
    assert left == pytest.approx(resident, rel=0.1)  # what is called resident is what there is
