"""Where the time of a decode step goes: each part beside its floor on this machine.

    python -m bench.parts --checkpoint models/smollm2-135m --out runs/parts.json

A floor is what it takes to read the part's weights (or keys and values) once, or to multiply them, whichever takes
longer, at the best rates that PyTorch reaches here: a sum over a large array, and square products of bf16 or of 8-bit
integers, or of fp32 where that is faster. Parts are timed in whole steps, block by block, so that each finds its
weights where a step finds them; the time between parts is Python's, norms' and SwiGLU's. What is served is one call
for all blocks, which is the last line. Knows models and pages; knows no server.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.machine import describe
from bench.roofline import PAGE, pages_for
from engine.attention import KVPages, Span, attend
from engine.runner import Runner
from llama.linear import Linear
from llama.load import load, resident_bytes
from llama.model import Attend, Block, Llama
from llama.panels import IntegerPanelLinear

POSITIONS = 176  # that a token sees: W1's prompt of 64 rows, and a text with its answer in the middle
TRIES = 30
PATIENCE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine does in a second."""

    read: float  # bytes
    bf16: float  # multiplications and additions, two for each weight and row
    int8: float

    @classmethod
    def measured(cls, side: int = 1536) -> Rates:
        """On all threads that torch uses."""
        floats = torch.randn(side, side)
        halves = floats.bfloat16()
        codes = torch.randint(-100, 100, (side, side), dtype=torch.int8)
        large = torch.ones(1 << 27)
        products = (lambda: floats @ floats, lambda: halves @ halves, lambda: torch._int_mm(codes, codes))
        fp32, bf16, int8 = (2 * side**3 / _best(each) for each in products)
        return cls(large.nbytes / _best(large.sum), max(fp32, bf16), max(fp32, int8))


@dataclass(frozen=True, slots=True)
class Part:
    """Milliseconds of a part in a step of so many sequences, all layers together; `bound`: what makes the floor."""

    level: str
    sequences: int
    name: str
    took: float
    floor: float | None
    bound: str = ""


@dataclass(slots=True)
class _Clock:
    """Seconds by part, of the step under way."""

    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    began: float = 0.0

    def watch(self, name: str, module: nn.Module) -> None:
        """Count what calls of a module take."""
        module.register_forward_pre_hook(lambda *_: self.start())
        module.register_forward_hook(lambda *_: self.stop(name))

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self, name: str) -> None:
        self.spent[name] += time.perf_counter() - self.began


def parts(checkpoint: Path, level: str | None, sequences: int, rates: Rates) -> list[Part]:
    """Of a model at a level (None: in bf16), each part's median over the steps. Raises what loading it raises."""
    loaded = load(checkpoint, level=level, dtype="bfloat16", device="cpu", compute="auto" if level else "bf16")
    model, told = loaded.model, level or "bf16"
    whole, kv, spans = _step(model, sequences)
    served = _best(whole) * 1e3
    clock, floors = _Clock(), _floors(model, kv, sequences, rates)
    for block in model.blocks:
        assert isinstance(block, Block)
        for name in ("qkv", "o", "gate_up", "down"):
            clock.watch(name, getattr(block, name))
    clock.watch("head", model.head)
    steps = [_by_block(model, kv, spans, clock) for _ in range(TRIES)]
    found = [Part(told, sequences, name, _median(steps, name), *floors[name]) for name in floors]
    between = Part(told, sequences, "between them, through Python", _median(steps, "between"), None)
    floor = sum(each.floor or 0.0 for each in found)
    return [*found, between, Part(told, sequences, "all, as served", served, floor, "sum")]


def _step(model: Llama, sequences: int) -> tuple[Callable[[], object], KVPages, list[Span]]:
    """A step as the engine carries it out, and where its keys and values lie."""
    kv, tables = pages_for(model, sequences, POSITIONS)
    spans = [Span(table, POSITIONS - 1, 1) for table in tables]
    runner, (ids, positions) = Runner(model, kv), _inputs(sequences)
    return lambda: model.logits(runner.hidden(ids, positions, attend(kv, spans))), kv, spans


def _inputs(sequences: int) -> tuple[Tensor, Tensor]:
    return torch.arange(100, 100 + sequences), torch.full((sequences,), POSITIONS - 1)


def _by_block(model: Llama, kv: KVPages, spans: list[Span], clock: _Clock) -> dict[str, float]:
    """Seconds of each part in one step, and between them."""
    ids, positions = _inputs(len(spans))
    clock.spent = defaultdict(float)
    began = time.perf_counter()
    model.logits(model(model.embed(ids), positions, _watched(attend(kv, spans), clock)))
    clock.spent["between"] = time.perf_counter() - began - sum(clock.spent.values())
    return clock.spent


def _watched(inner: Attend, clock: _Clock) -> Attend:
    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        clock.start()
        out = inner(layer, q, k, v)
        clock.stop("attention")
        return out

    return attention


def _floors(model: Llama, kv: KVPages, sequences: int, rates: Rates) -> dict[str, tuple[float, str]]:
    """Milliseconds, and what takes them."""

    def floor(read: float, operations: float, rate: float) -> tuple[float, str]:
        reading, multiplying = 1e3 * read / rates.read, 1e3 * operations / rate
        return max((reading, "reading"), (multiplying, "multiplying"))

    def products(layers: list[Linear]) -> tuple[float, str]:
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        rate = rates.int8 if isinstance(layers[0], IntegerPanelLinear) else rates.bf16
        return floor(sum(map(resident_bytes, layers)), 2.0 * weights * sequences, rate)

    blocks = [block for block in model.blocks if isinstance(block, Block)]
    found = {name: products([getattr(block, name) for block in blocks]) for name in ("qkv", "o", "gate_up", "down")}
    seen = kv.page_bytes / PAGE * POSITIONS * sequences
    multiplied = 4.0 * model.config.num_layers * sequences * POSITIONS * model.config.num_heads * model.config.head_dim
    return found | {"attention": floor(seen, multiplied, rates.bf16), "head": products([model.head])}


def _best(call: Callable[[], object], tries: int = TRIES) -> float:
    """Seconds of the fastest of some calls, or of as many as PATIENCE has room for: some of torch's are slow."""
    took: list[float] = []
    while len(took) < tries and sum(took) < PATIENCE:
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return min(took)


def _median(steps: list[dict[str, float]], name: str) -> float:
    """Milliseconds."""
    return 1e3 * sorted(step[name] for step in steps)[len(steps) // 2]


def report(rates: Rates, found: list[Part]) -> dict[str, Any]:
    """As JSON."""
    return {"machine": describe(), "positions": POSITIONS, "rates": asdict(rates), "parts": [asdict(p) for p in found]}


def main(
    checkpoint: Annotated[Path, typer.Option(help="Dense checkpoint.")],
    levels: Annotated[str, typer.Option(help="Comma-separated; bf16 is the dense model.")] = "bf16,w4g64",
    sequences: Annotated[str, typer.Option(help="Sequences of a step, comma-separated.")] = "1,32",
    out: Annotated[Path, typer.Option(help="Everything, as JSON.")] = Path("runs/parts.json"),
) -> None:
    """Time the parts of a decode step."""
    found: list[Part] = []
    with torch.inference_mode():
        rates = Rates.measured()
        for level in levels.split(","):
            for count in map(int, sequences.split(",")):
                found += parts(checkpoint, None if level == "bf16" else level, count, rates)
    out.write_text(json.dumps(report(rates, found), indent=2) + "\n")
    table = Table("level", "sequences", "part", "ms", "floor, ms", "by", title="Parts of a decode step")
    for p in found:
        floor = "" if p.floor is None else f"{p.floor:.3f}"
        table.add_row(p.level, str(p.sequences), p.name, f"{p.took:.3f}", floor, p.bound)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
