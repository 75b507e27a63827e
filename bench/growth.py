"""How cost grows: throughput and the time to the first token against one thing at a time, ours and vLLM in turn.

    python -m bench.growth --checkpoint models/smollm2-135m --out runs/growth.json

Knows which loads make an axis; contestants, loads and figures are those of the race.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tokenizers import Tokenizer

from bench import lineup, peers, soft_prompts
from bench.load import Pace, run
from bench.machine import describe
from bench.result import Result
from bench.server import Contestant, serving
from bench.workload import Workload, load_tokenizer

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TEXT = (16, 64, 256, 1024, 4096)
ROWS = (0, 16, 64, 256, 512)
PROMPTS = (1, 10, 100, 1000)
VERSIONS = (10, 1000, 10_000, 100_000)
SHAPE = Workload(shortest=64, longest=64, max_tokens=32)


@dataclass(frozen=True, slots=True)
class Point:
    """One contestant under one load of an axis."""

    axis: str
    x: int
    contestant: str
    figures: Result


@dataclass(frozen=True, slots=True)
class Axis:
    """What is changed; the load and the prompts that a value of it comes to; whether `peers` can take part."""

    name: str
    label: str
    values: Sequence[int]
    peers: bool

    def workload(self, x: int) -> Workload:
        if self.name == "concurrency":
            return replace(SHAPE, concurrency=x, requests=max(8, 2 * x))
        if self.name == "text":
            return replace(SHAPE, concurrency=4, requests=8, shortest=x, longest=x)
        return replace(SHAPE, concurrency=16, requests=max(32, x if self.name == "prompts" else 0))

    def prompts(self, x: int) -> tuple[int, int]:
        """How many, and the rows of each."""
        return {"rows": (int(x > 0), x), "prompts": (x, 16), "versions": (1, 16)}.get(self.name, (0, 0))


AXES = (
    Axis("concurrency", "requests at a time", CONCURRENCY, True),
    Axis("text", "tokens of text", TEXT, True),
    Axis("rows", "rows of a prompt", ROWS, False),
    Axis("prompts", "distinct prompts", PROMPTS, False),
    Axis("versions", "versions in the registry", VERSIONS, False),
)


@dataclass(frozen=True, slots=True)
class Growth:
    """Measures axes. `folder` takes prompts and logs, one folder for each number of rows."""

    checkpoint: Path
    tokenizer: Tokenizer
    folder: Path

    def measure(self, axis: Axis, contestants: Sequence[Contestant], store: Path) -> Iterator[Point]:
        """Each value at each contestant in turn, after the same load with other texts. Raises RuntimeError."""
        with contextlib.ExitStack() as stack:
            logs = self.folder / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            up = {c.name: stack.enter_context(serving(c, logs / f"{c.name}.{axis.name}.log")) for c in contestants}
            for i, x in enumerate(axis.values):
                for contestant in contestants:
                    url, (count, rows) = up[contestant.name].url, axis.prompts(x)
                    names = self._upload(url, count, rows) if count else (None,)
                    if axis.name == "versions":
                        fill(store, names[0], x)
                    shape = replace(axis.workload(x), prompts=names)
                    for seed in (2 * i, 2 * i + 1):
                        jobs = replace(shape, seed=seed).jobs(self.tokenizer)
                        figures = run(url, jobs, contestant.form, Pace(shape.concurrency))
                    yield Point(axis.name, x, contestant.name, figures)

    def _upload(self, url: str, count: int, rows: int) -> tuple[str, ...]:
        folder = self.folder / f"rows{rows}"
        names = soft_prompts.write_prompts(self.checkpoint, folder, count, rows)
        soft_prompts.upload(url, folder, names)
        return names


def report(points: Sequence[Point]) -> dict[str, Any]:
    """As JSON."""
    return {"machine": describe(), "shape": asdict(SHAPE), "points": [asdict(p) for p in points]}


def fill(store: Path, task: str | None, versions: int) -> None:
    """So many copies of a task's version under other tasks, written into the registry's database beside its server."""
    columns = "namespace, version, level, digest, live, weights, train, created, golden, uploaded_at, uploaded_by"
    with contextlib.closing(sqlite3.connect(store / "store.db", timeout=60)) as database, database:
        database.execute(
            "INSERT OR IGNORE INTO versions (task, " + columns + ") "  # noqa: S608
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "SELECT 'filler' || i, " + columns + " FROM versions, n WHERE task = ? AND version = 1",
            (versions, task),
        )


def main(
    checkpoint: Annotated[Path, typer.Option(help="Dense checkpoint that ours and vLLM serve.")],
    only: Annotated[str, typer.Option(help=f"Of the axes {', '.join(axis.name for axis in AXES)}; without: all.")] = "",
    root: Annotated[Path, typer.Option(help="Where bench.peers put things.")] = peers.ROOT,
    out: Annotated[Path, typer.Option(help="Everything, as JSON.")] = Path("runs/growth.json"),
) -> None:
    """Measure how cost grows, ours in bf16 and at 4 bits, and vLLM where it can take part."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that no server outlives this
    checkpoint, console = checkpoint.absolute(), Console()
    store = Path(tempfile.mkdtemp(prefix="growth-"))
    growth = Growth(checkpoint, load_tokenizer(checkpoint), root / "growth")
    mine = [lineup.ours(checkpoint, store, root / "prompts", (), level) for level in (None, lineup.PACKED)]
    vllm = lineup.vllm(checkpoint, root, root / "prompts", max(CONCURRENCY), 2 * max(TEXT))
    if peers.missing(root, [vllm.name]):
        console.print(f"vLLM is not set up. Run: python -m bench.peers --root {root}")
        raise typer.Exit(2)
    points: list[Point] = []
    try:
        for axis in AXES:
            taking = [*mine, vllm] if axis.peers else mine[1:]
            if not only or axis.name in only.split(","):
                for point in growth.measure(axis, taking, store / mine[1].name):
                    points.append(point)
                    console.print(f"{axis.label} {point.x}, {point.contestant}: {point.figures.headline()}")
                    out.write_text(json.dumps(report(points), indent=2) + "\n")
    finally:
        shutil.rmtree(store, ignore_errors=True)
    raise typer.Exit(any(point.figures.errors for point in points))


if __name__ == "__main__":
    typer.run(main)
