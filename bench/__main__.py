"""The race: ours and the peers in turn under the same loads, medians, and ratios within a round.

    python -m bench.peers
    python -m bench --checkpoint models/smollm2-135m --out runs/race.json

Ends with what was measured and a table of claims; exits 1 where one is missed or a request failed, 2 where a peer is
missing.
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
from bench.plan import Plan, matches
from bench.race import Measured, Race, told
from bench.server import Contestant
from bench.verdict import Verdict, beside, judge, medians
from bench.w8a8 import write_w8a8
from bench.workload import load_tokenizer

COLUMNS = {  # figure -> heading
    "output_tokens_per_second": "tokens/s",
    "requests_per_second": "requests/s",
    "ttft_p50": "TTFT p50 ms",
    "ttft_p99": "p99",
    "itl_p50": "ITL p50 ms",
    "ratio": "warm / none",
    "share": "as dense",
    "first_answer_seconds": "first answer s",
    "beyond_model_mb": "beyond model MB",
    "server_cpu": "server CPU",
    "client_cpu": "client CPU",
    "others_cpu": "others' CPU",
}


def report(measured: Sequence[Measured], contestants: Sequence[Contestant], race: Race) -> dict[str, Any]:
    """Everything that a reader needs to believe the figures, or to repeat them."""
    used = {m.load for m in measured}
    return {
        "machine": describe(),
        "versions": {"promptstitch": importlib.metadata.version("promptstitch"), "locked": peers.pins()},
        "loads": [asdict(load) for load in race.plan.loads.values() if load.name in used],
        "corpus": str(race.corpus) if race.corpus else None,
        "contestants": [{"name": c.name, "weights": c.weights, "command": c.command_line()} for c in contestants],
        "measured": [told(m) for m in measured],
        "medians": [{"contestant": c, "load": load, **row} for (c, load), row in medians(measured).items()],
        "verdicts": [asdict(v) for v in judge(measured, race.plan.claims)],
    }


def figures_table(measured: Sequence[Measured]) -> Table:
    table = Table("contestant", "load", *COLUMNS.values(), title="Medians over the rounds")
    for (contestant, load), row in medians(measured).items():
        cells = [row.get(name) for name in COLUMNS]
        table.add_row(contestant, load, *("" if cell is None else f"{cell:.3g}" for cell in cells))
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    heads = (
        "line",
        "claim",
        "ours",
        "beside",
        "must be",
        "aim",
        "median",
        "lowest",
        "highest",
        "",
        "as dense",
        "beside",
    )
    table = Table(*heads, title="Ratios within a round; next tokens as the dense model's")
    for v in verdicts:
        figures = ("-" if value is None else f"{value:.3g}" for value in (v.aim, v.median, v.low, v.high))
        shares = ("" if value is None else f"{value:.1%}" for value in (v.share, v.peer_share))
        end = {None: "not measured", True: "ok", False: "MISSED"}[v.ok]
        table.add_row(v.line, v.what, v.ours, beside(v.peer, v.absent), v.bound, *figures, end, *shares)
    return table


def main(
    checkpoint: Annotated[Path, typer.Option(help="Dense checkpoint that ours and vLLM serve.")],
    only: Annotated[str, typer.Option(help="Lines to run, comma-separated: W1,W5; without: all.")] = "",
    rounds: int = 3,
    levels: Annotated[
        str, typer.Option(help="Those of ours for the line `levels`, comma-separated; or folders of checkpoints.")
    ] = "w8g64,w3g64,w2g64,nf4,int8",
    llama_cpp: Annotated[str, typer.Option(help="Its quantisations, comma-separated.")] = "q4_0,q4_1,q8_0",
    contestants: Annotated[
        list[str] | None, typer.Option(help="Patterns of names, comma-separated: leave the others out.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="Text file to cut from; without: random words.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each figure.")] = 0.0,
    root: Annotated[Path, typer.Option(help="Where bench.peers put things.")] = peers.ROOT,
    out: Annotated[Path | None, typer.Option(help="Write everything here, as JSON, after each figure.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the table of claims as JSON.")] = False,
) -> None:
    """Race ours against the peers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that no server outlives the race
    checkpoint, console = checkpoint.absolute(), Console(stderr=json_)
    if not console.is_terminal:
        console.width = 220  # whole lines for whoever reads the log
    try:
        plan = Plan.read(only=[line for line in only.split(",") if line])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from None
    count = max(load.prompts for load in plan.loads.values())
    names = soft_prompts.write_prompts(checkpoint, root / "prompts", count)
    soft_prompts.write_prompts(checkpoint, root / "few", lineup.FEW)
    store = Path(tempfile.mkdtemp(prefix="race-"))
    extra = [level for level in levels.split(",") if level]
    everybody = lineup.everybody(checkpoint, root, store, names, extra, llama_cpp.split(","))
    taking = [c for c in everybody if matches(c.name, ",".join(contestants or "*").split(",")) and plan.needs(c.name)]
    if missing := peers.missing(root, [c.name for c in taking]):
        console.print(f"not set up: {', '.join(missing)}. Run: python -m bench.peers --root {root}")
        raise typer.Exit(2)
    if any(c.name.startswith("vllm") for c in taking) and lineup.allocator() is None:
        console.print("vLLM goes without tcmalloc, which it asks for: install libtcmalloc-minimal4")
    if any(c.name == "vllm-w8a8" for c in taking):
        write_w8a8(checkpoint, root / "w8a8")
    upload = (root / f"few/{names[0]}.safetensors").read_bytes()
    race = Race(plan, load_tokenizer(checkpoint), names, upload, corpus, patience, root / "logs")
    measured: list[Measured] = []
    try:
        for m in race.run(taking, rounds):
            measured.append(m)
            console.print(f"round {m.round + 1} {m.contestant}, {m.load}: {m.figures.headline()}")
            if out:
                out.write_text(json.dumps(report(measured, taking, race), indent=2) + "\n")
    finally:
        shutil.rmtree(store, ignore_errors=True)
    verdicts = judge(measured, plan.claims)
    console.print(figures_table(measured), verdict_table(verdicts))
    if json_:
        print(json.dumps([asdict(v) for v in verdicts], indent=2))
    failed = any(m.figures.errors for m in measured)
    raise typer.Exit(failed or not all(v.ok and not v.absent for v in verdicts))


if __name__ == "__main__":
    typer.run(main)
