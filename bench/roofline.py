"""How near its roof a device comes at the shape of LLaMA-7B, with random weights: speed does not depend on them.

    python -m bench.roofline --device cuda --out runs/roofline.json [--vllm PYTHON]

To decode one sequence every weight must be read once, so its roof is the rate at which this device copies memory;
of 64 sequences, and of prefill, it is that or the rate of a large product, whichever takes longer. Both are measured in
the same run, and so are transformers with bitsandbytes, and vLLM where a Python that has it is named. What is timed is
what the engine does for a step, from token ids to logits. Knows models and pages; knows no server.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.machine import describe
from bench.quantised_peer import nf4_model, seconds_a_token
from engine.attention import KVPages, Span, attend
from engine.device import select
from engine.graphs import decode_graphs
from engine.runner import Runner
from llama.config import LlamaConfig, RopeConfig
from llama.embedding import DenseEmbedding
from llama.linear import DenseLinear, Linear
from llama.load import resident_bytes
from llama.model import Block, Llama, RMSNorm
from llama.packed import TWOS_COMPLEMENT, CodebookLinear

LLAMA_7B = LlamaConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096, 1e-5, RopeConfig(1e4), False, False, False)
PAGE, GROUP = 16, 128
TEXT, ROWS = 512, 64  # positions behind which tokens are decoded, and those of a soft prompt before them
TRIES = 20


@dataclass(frozen=True, slots=True)
class Figure:
    """`share` of the roof that is reached, or one speed over another; `must` be at least."""

    what: str
    level: str
    milliseconds: float
    share: float
    must: float


def random_model(config: LlamaConfig, packed: bool, device: torch.device) -> Llama:
    """Of bf16 weights, or of 4-bit codes beside a dense embedding and head."""

    def dense(n: int, k: int) -> DenseLinear:
        return DenseLinear(torch.randn(n, k, dtype=torch.bfloat16, device=device) * k**-0.5)

    def linear(n: int, k: int) -> Linear:
        if not packed:
            return dense(n, k)
        layer = CodebookLinear((n, k), TWOS_COMPLEMENT, GROUP, torch.bfloat16, torch.bfloat16, device)
        layer.codes.random_(0, 256)
        layer.scales.fill_(0.2 * k**-0.5)
        return layer

    def norm() -> RMSNorm:
        return RMSNorm(torch.ones(config.hidden_size, dtype=torch.bfloat16, device=device), config.rms_norm_eps)

    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    fused = heads + 2 * config.num_kv_heads * config.head_dim
    blocks = [
        Block(config, i, norm(), linear(fused, hidden), linear(hidden, heads), norm(), linear(2 * inner, hidden),
              linear(hidden, inner))
        for i in range(config.num_layers)
    ]  # fmt: skip
    table = torch.randn(config.vocab_size, hidden, dtype=torch.bfloat16, device=device)
    return Llama(config, DenseEmbedding(table), blocks, norm(), dense(config.vocab_size, hidden))


@dataclass(frozen=True, slots=True)
class Roof:
    """Bytes that are copied in a second, read and written ones both, and operations of a product in bf16."""

    copied: float
    multiplied: float

    @classmethod
    def measured(cls, device: torch.device, side: int) -> Roof:
        large = torch.ones(side * side * 8, dtype=torch.bfloat16, device=device)
        other, square = torch.empty_like(large), torch.randn(side, side, dtype=torch.bfloat16, device=device)
        copying = timed(lambda: other.copy_(large), device)
        return cls(2 * large.nbytes / copying, 2 * side**3 / timed(lambda: square @ square, device))

    def seconds(self, read: float, operations: float) -> float:
        """The least that such a step takes."""
        return max(read / self.copied, operations / self.multiplied)


def measure(config: LlamaConfig, device: torch.device, side: int = 8192, text: int = TEXT) -> list[Figure]:
    """All figures, dense and in 4 bits."""
    roof, found = Roof.measured(device, side), []
    for level, alone in (("bf16", 0.7), ("w4g128", 0.4)):
        model = random_model(config, level != "bf16", device)
        weights = resident_bytes(model) - model.embedding.dense().nbytes
        each = sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, Linear))

        def least(tokens: int, read: float, weights: int = weights, each: int = each) -> float:
            return roof.seconds(weights + read, 2.0 * each * tokens)

        pages = KVPages.bytes_per_page(config, PAGE, model.dtype) / PAGE  # of a position
        speeds = {}
        for batch, must in ((1, alone), (64, 0.5)):
            took = _decode(model, batch, text)
            speeds[batch] = took
            share = least(batch, batch * text * pages) / took
            found.append(Figure(f"decode, {batch} at once", level, took * 1e3, share, must))
        if level != "bf16":
            theirs = seconds_a_token(nf4_model(config, device), text, min(TRIES, 5))
            what = "1 at once beside transformers with bitsandbytes"
            found.append(Figure(what, "nf4", theirs * 1e3, theirs / speeds[1], 10.0))
        stitched = _decode(model, 64, text + ROWS)
        found.append(Figure(f"64 at once behind {ROWS} rows", level, stitched * 1e3, speeds[64] / stitched, 0.97))
        took = _prefill(model, 4 * text)
        share = least(4 * text, 4 * text * pages) / took
        found.append(Figure(f"prefill of {4 * text} tokens", level, took * 1e3, share, 0.5))
    return found


def beside_vllm(
    config: LlamaConfig, ours: Sequence[Figure], python: Path, device: str, text: int = TEXT
) -> list[Figure]:
    """Our steps in bf16 beside vLLM's on the same device, one after the other; no figure that must be reached. Raises
    CalledProcessError."""
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.rms_norm_eps,
        "torch_dtype": "bfloat16",
    }
    card = {}
    if device.startswith("cuda"):
        number, seen = int(device.partition(":")[2] or 0), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        card = {"CUDA_VISIBLE_DEVICES": seen.split(",")[number] if seen else str(number)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        command = [str(python), str(Path(__file__).with_name("vllm_peer.py")), folder, str(text), "1", "64"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | card).stdout
    lines = [line for line in said.splitlines() if line.startswith("{")]  # vLLM writes its log there, too
    theirs: dict[str, float] = json.loads(lines[-1])
    mine = {f.what: f.milliseconds for f in ours if f.level == "bf16"}
    found = []
    for batch, seconds in theirs.items():
        ratio = 1e3 * seconds / mine[f"decode, {batch} at once"]
        found.append(Figure(f"{batch} at once beside vLLM", "bf16", 1e3 * seconds, ratio, 0.0))
    return found


def _decode(model: Llama, batch: int, positions: int) -> float:
    """Seconds of a step, as the engine carries it out: replayed where that is possible."""
    kv, tables = pages_for(model, batch, positions)
    spans = [Span(table, positions - 1, 1) for table in tables]
    graphs = decode_graphs(model, kv, batch, positions)
    ids = list(range(batch))
    if graphs is not None:
        return timed(lambda: graphs.logits(ids, spans), model.device)
    return timed(lambda: model.logits(_hidden(model, kv, spans, ids)).float(), model.device)


def _prefill(model: Llama, tokens: int) -> float:
    kv, [table] = pages_for(model, 1, tokens)
    spans, ids = [Span(table, 0, tokens)], [i % 100 for i in range(tokens)]
    return timed(lambda: model.logits(_hidden(model, kv, spans, ids)[-1:]), model.device)


def _hidden(model: Llama, kv: KVPages, spans: Sequence[Span], ids: Sequence[int]) -> torch.Tensor:
    at = torch.tensor([i for span in spans for i in range(span.start, span.end)], device=model.device)
    return Runner(model, kv).hidden(torch.tensor(ids, device=model.device), at, attend(kv, spans))


def pages_for(model: Llama, batch: int, positions: int) -> tuple[KVPages, list[range]]:
    """Blank pages, and a block table for each of so many sequences of so many positions."""
    each = -(-positions // PAGE)
    kv = KVPages(model.config, 1 + batch * each, PAGE, model.dtype, model.device)
    kv.blank(range(1 + batch * each))
    return kv, [range(1 + i * each, 1 + (i + 1) * each) for i in range(batch)]


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds, the device idle before and after."""
    took = []
    for _ in range(TRIES + 3):  # the first ones compile
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(
    device: Annotated[str, typer.Option(help="Where to measure: cuda, cuda:1.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Everything, as JSON.")] = Path("runs/roofline.json"),
    vllm: Annotated[Path | None, typer.Option(metavar="PYTHON", help="Of an environment with vLLM.")] = None,
) -> None:
    """Measure, and exit 1 where a share is too small."""
    select(torch.device(device))
    with torch.inference_mode():
        found = measure(LLAMA_7B, torch.device(device))
    if vllm is not None:
        torch.cuda.empty_cache()
        found += beside_vllm(LLAMA_7B, found, vllm, device)
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    told = {"machine": describe(), "device": card, "torch": torch.__version__, "figures": [asdict(f) for f in found]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=2) + "\n")
    table = Table("what", "level", "ms", "reached", "must be", "", title=f"LLaMA-7B's shape on {card}")
    for f in found:
        ok = "ok" if f.share >= f.must else "MISSED"
        table.add_row(f.what, f.level, f"{f.milliseconds:.2f}", f"{f.share:.2f}", f">= {f.must}", ok)
    Console().print(table)
    raise typer.Exit(any(f.share < f.must for f in found))


if __name__ == "__main__":
    typer.run(main)
