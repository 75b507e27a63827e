"""The side-by-side run: ours and the peers in turn on the same jobs, medians, and ratios within a round.

    python -m bench.peers
    python -m bench.side_by_side --checkpoint models/smollm2-135m --json runs/side_by_side.json

Ends with two tables and exits 1 where a claim is missed or any request failed.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench import lineup, peers, soft_prompts
from bench.machine import describe
from bench.race import Measured, Race
from bench.server import Contestant
from bench.verdict import Verdict, judge, medians
from bench.workload import Workload, load_tokenizer

COLUMNS = {  # figure -> heading
    "output_tokens_per_second": "tokens/s",
    "ttft_p50": "TTFT p50 ms",
    "ttft_p99": "p99",
    "itl_p50": "ITL p50 ms",
    "with_prompt_p50": "warm prompt ms",
    "without_p50": "none ms",
    "server_cpu": "server CPU",
    "client_cpu": "client CPU",
    "others_cpu": "others' CPU",
}


def report(measured: Sequence[Measured], lineup: Sequence[Contestant], race: Race) -> dict[str, Any]:
    """Everything that a reader needs to believe the figures, or to repeat them."""
    return {
        "machine": describe(),
        "versions": {"promptstitch": importlib.metadata.version("promptstitch"), "locked": peers.pins()},
        "workload": asdict(race.stitched),
        "corpus": str(race.corpus) if race.corpus else None,
        "contestants": [{"name": c.name, "weights": c.weights, "command": c.command_line()} for c in lineup],
        "measured": [asdict(m) for m in measured],
        "medians": [{"contestant": c, "workload": w, **row} for (c, w), row in medians(measured).items()],
        "verdicts": [asdict(v) for v in judge(measured)],
    }


def figures_table(measured: Sequence[Measured]) -> Table:
    table = Table("contestant", "workload", *COLUMNS.values(), title="Medians over the rounds")
    for (contestant, workload), row in medians(measured).items():
        cells = [row.get(name) for name in COLUMNS]
        table.add_row(contestant, workload, *("" if cell is None else f"{cell:.3g}" for cell in cells))
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table("claim", "must be", "median", "lowest", "highest", "", title="Ratios within a round")
    for v in verdicts:
        table.add_row(v.claim, v.bound, f"{v.median:.2f}", f"{v.low:.2f}", f"{v.high:.2f}", "ok" if v.ok else "MISSED")
    return table


def main(
    checkpoint: Annotated[Path, typer.Option(help="Dense checkpoint that ours and vLLM serve.")],
    rounds: int = 3,
    requests: int = 64,
    concurrency: int = 32,
    prompts: Annotated[int, typer.Option(help="Distinct soft prompts.")] = 8,
    rows: Annotated[int, typer.Option(help="Soft tokens of each.")] = 64,
    corpus: Annotated[Path | None, typer.Option(help="Text file to cut from; without: random words.")] = None,
    only: Annotated[str, typer.Option(help="Take contestants whose names begin so, comma-separated.")] = "",
    levels: Annotated[str, typer.Option(help="Those of ours beside bf16, comma-separated.")] = "w4g64",
    llama_cpp: Annotated[str, typer.Option(help="Its quantisations, comma-separated.")] = "q4_0,q4_1,q8_0",
    patience: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each figure.")] = 0.0,
    restart: Annotated[bool, typer.Option(help="Start every server anew in every round, not once.")] = False,
    root: Annotated[Path, typer.Option(help="Where bench.peers put things.")] = peers.ROOT,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
) -> None:
    """Race ours against the peers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that no server outlives the race
    checkpoint = checkpoint.absolute()
    store = Path(tempfile.mkdtemp(prefix="side-by-side-"))
    names = soft_prompts.write_prompts(checkpoint, root / "prompts", prompts, rows)
    contestants = [
        *(
            lineup.ours(checkpoint, store, root / "prompts", names, level)
            for level in (None, *filter(None, levels.split(",")))
        ),
        lineup.vllm(checkpoint, root, root / "prompts", concurrency),
        *(lineup.llama_cpp(checkpoint, root, kind, concurrency, rows) for kind in llama_cpp.split(",")),
    ]
    contestants = [c for c in contestants if c.name.startswith(tuple(only.split(",")))]
    workload = Workload(requests, concurrency, prompts=names)
    race = Race(
        load_tokenizer(checkpoint), corpus, workload, patience=patience, resident=not restart, logs=root / "logs"
    )
    measured: list[Measured] = []
    console = Console()
    try:
        for m in race.run(contestants, rounds):
            measured.append(m)
            console.print(f"round {m.round + 1} {m.contestant} {m.workload}: {m.figures.headline()}")
            if json_file:
                json_file.write_text(json.dumps(report(measured, contestants, race), indent=2) + "\n")
    finally:
        shutil.rmtree(store, ignore_errors=True)
    verdicts = judge(measured)
    console.print(figures_table(measured), verdict_table(verdicts))
    failed = any(m.figures.errors for m in measured)
    raise typer.Exit(failed or not all(v.ok for v in verdicts))


if __name__ == "__main__":
    typer.run(main)
