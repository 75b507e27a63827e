"""`promptstitch compress`: a dense checkpoint made smaller, layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import MAX_SEED
from cli.output import AsJson, CommandError, tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.compress.compress import Plan, Sizes
    from lab.compress.job import Tokens
    from lab.data.documents import Document
    from lab.run import Run
    from llama.manifest import Manifest


TOKENS, WINDOW, SWEEPS = 32768, 256, 3  # defaults


def _option(name: str, metavar: str, text: str, **bounds: Any) -> Any:
    """An option whose help tells its default, so that the whole help fits a screen."""
    return typer.Option(name, metavar=metavar, help=text, show_default=False, **bounds)


Model = Annotated[str, typer.Argument(help="Dense checkpoint: a folder, or a name that was pulled.")]
Level = Annotated[str, typer.Option("--level", metavar="NAME", help="w4g64, w3g64, w8, s50, s2of4, w4g64-s50, …")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write, which must be new or empty.")]
MethodName = Annotated[
    str | None, typer.Option("--method", metavar="NAME", help="gptq, rtn; sparse: sparsegpt, wanda, magnitude.")
]
Data = Annotated[str | None, typer.Option("--data", metavar="FILE", help="Calibration text, folder, or a name: c4.")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", metavar="DIR", help="Where names are looked up first.")]
Part = Annotated[str, _option("--part", "NAME", "calibration (default): its sites; or all.")]
Count = Annotated[int, _option("--calibration-tokens", "N", "How many are read (32768).")]
Window = Annotated[int, _option("--window", "N", "Tokens that stand together (256).")]
Seed = Annotated[int, _option("--seed", "N", "Draws among the windows (0).", min=0, max=MAX_SEED)]
Scales = Annotated[str | None, _option("--scales", "NAME", "fitted, largest; else by level and method.")]
Sweeps = Annotated[int, _option("--sweeps", "N", "Polish the solver's result (3); 0: as published.")]
Allocation = Annotated[str, _option("--allocation", "NAME", "uniform (default); sensitivity: better, equal bytes.")]
Embedding = Annotated[str, _option("--embedding", "NAME", "keep (default); q8: promptstitch alone reads it.")]
Export = Annotated[str, _option("--export", "NAME", "packed (default); dense: plain weights.")]
Device = Annotated[str, _option("--device", "NAME", "auto (default), cpu, cuda, cuda:<i>.")]
RunFolder = Annotated[Path | None, _option("--run", "DIR", "Log, figures, what a resume needs (OUT.run).")]


def compress(
    model: Model,
    level: Level,
    out: Out,
    method: MethodName = None,
    data: Data = None,
    data_root: DataRoot = None,
    part: Part = "calibration",
    calibration_tokens: Count = TOKENS,
    window: Window = WINDOW,
    seed: Seed = 0,
    scales: Scales = None,
    sweeps: Sweeps = SWEEPS,
    allocation: Allocation = "uniform",
    embedding: Embedding = "keep",
    export: Export = "packed",
    device: Device = "auto",
    run: RunFolder = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a checkpoint, prune it, or both in one pass. A command that was cut short goes on where it stopped."""
    from cli.model import find_model
    from lab.compress.compress import Order, planned
    from lab.compress.compress import compress as carry_out
    from lab.compress.job import Tokens
    from lab.data.windows import cut
    from lab.progress import progress
    from lab.run import open_run
    from llama.tokenizer import HubTokenizer

    if scales not in (None, "fitted", "largest"):
        raise CommandError(f"--scales is {scales!r}; it is fitted or largest", usage=True)
    if calibration_tokens < 1:
        raise CommandError(f"--calibration-tokens is {calibration_tokens}; it must be at least 1", usage=True)
    clip = None if scales is None else scales == "fitted"
    plan = planned(Order(find_model(model), out, level, method, clip, sweeps, export, embedding, device, allocation))
    chosen, tokens, digest = plan.recipe.method, None, None
    reading = {"--data": data, "--data-root": data_root, "--part": part != "calibration"}
    reading |= {"--calibration-tokens": calibration_tokens != TOKENS, "--window": window != WINDOW}
    idle = {} if chosen.calibrated else reading
    idle |= {} if chosen.solves else {"--sweeps": sweeps != SWEEPS}
    if names := [name for name, given in idle.items() if given]:  # the same words serve a loop over methods
        typer.echo(f"note: {chosen.name} makes no use of {', '.join(names)}", err=True)
    if chosen.calibrated:
        if data is None:
            raise CommandError(f"{chosen.name} calibrates on text: say --data", usage=True)
        texts = cut(_documents(data, data_root, part), HubTokenizer(plan.order.source), window)
        windows = texts.drawn(calibration_tokens, seed)
        tokens, digest = Tokens.of(windows.ids, windows.lengths), windows.digest
    with (
        open_run(run or out.with_name(f"{out.name}.run"), plan.config(digest), seed) as folder,
        progress(quiet=as_json) as report,
    ):
        manifest, sizes = carry_out(plan, tokens, folder, report)
        told = _told(plan, manifest, sizes, folder, tokens)
        folder.tell(**told)
    tell(told, as_json)


def _documents(data: str, root: Path | None, part: str) -> Sequence[Document]:
    from lab.data.documents import DataError
    from lab.data.named import documents
    from lab.data.splits import split

    if part not in ("calibration", "all"):
        raise CommandError(f"--part is {part!r}; it is calibration or all", usage=True)
    found = documents(data, root)
    if part == "all":
        return found
    try:
        return split(found, "calibration").parts["calibration"]
    except DataError as error:
        raise CommandError(f"{error}; or calibrate on all of it: --part all") from error


def _told(plan: Plan, manifest: Manifest, sizes: Sizes, run: Run, tokens: Tokens | None) -> dict[str, Any]:
    from lab.compress.job import LAYER

    events = run.events(LAYER)
    errors = [event["error"] for event in events if "error" in event]
    return {
        "folder": str(plan.order.out),
        "run": str(run.folder),
        "name": manifest.name,
        "base": manifest.base,
        "level": manifest.level,
        "weights": manifest.weights,
        "method": plan.recipe.method.name,
        "scales": "fitted" if plan.recipe.clip else "largest",
        "sweeps": plan.recipe.sweeps,
        "allocation": plan.order.allocation,
        "calibration_tokens": int(tokens.real.sum()) if tokens else 0,
        "layer_error": sum(errors) / len(errors) if errors else None,
        "embedding": plan.order.embedding,
        "embedding_lossless": run.figures["embedding_lossless"],
        "damped_more": [f"{e['block']}.{e['step']}: {e['damping']:g}" for e in events if e.get("damped_more")],
        "dead_inputs": sum(event.get("dead_inputs", 0) for event in events),
        **{f"{name}_bytes": value for name, value in asdict(sizes).items()},
        "smaller": round(sizes.dense_disk / sizes.disk, 2),
        "paper_smaller": round(sizes.paper_dense / sizes.paper, 2),
    }
