"""`promptstitch learn`: a soft prompt learned through the compressed model that will be served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import MAX_SEED
from cli.output import AsJson, CommandError, tell

if TYPE_CHECKING:
    from lab.data.splits import Splits
    from lab.learn.order import Order

LENGTH, NUMERICS = "Length: one of these, else the recipe's tokens", "Numerics and folders"

Model = Annotated[str, typer.Argument(help="Checkpoint: a folder, or a name that was pulled.")]
Data = Annotated[
    str, typer.Option("--data", metavar="FILE|NAME", help="To learn from: text, JSON lines, a folder, or a name: c4.")
]
Level = Annotated[
    str | None, typer.Option("--level", help="Quantise a dense checkpoint to this level while loading, as serve does.")
]
Task = Annotated[str | None, typer.Option("--task", help="Task to file the prompt under.")]
KindName = Annotated[
    str, typer.Option("--kind", help="rows or kv; lora and norms are controls: figures and no prompt.")
]
RecipeName = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="default, paper, or a TOML file.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change the recipe: lr=0.01, positions=16, distil=0."),
]
Init = Annotated[
    str | None, typer.Option("--init", help="first, random, text, text:WORDS or a prompt file.", show_default="recipe")
]
Dense = Annotated[
    str | None, typer.Option("--dense", metavar="MODEL", help="Dense model to distil from; else MODEL, if dense.")
]
Base = Annotated[
    str | None, typer.Option("--base", help="Base of a foreign compressed MODEL: digest, or dense folder.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Order of the data, and random starts.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Prompt file; else in the run folder.")]
Tokens = Annotated[int | None, typer.Option("--tokens", metavar="N", help="Text tokens.", rich_help_panel=LENGTH)]
Steps = Annotated[int | None, typer.Option("--steps", metavar="N", help="Steps.", rich_help_panel=LENGTH)]
Budget = Annotated[
    str | None,
    typer.Option("--budget", metavar="TIME", help="Learning time: 90s, 15m, 1.5h.", rich_help_panel=LENGTH),
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="DIR", help="Run folder; one cut short goes on. Else OUT.run.", rich_help_panel=NUMERICS
    ),
]
Cache = Annotated[
    Path, typer.Option("--cache", metavar="DIR", help="Where dense models' states are kept.", rich_help_panel=NUMERICS)
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", metavar="DIR", help="Folder to look in first for named data.", rich_help_panel=NUMERICS
    ),
]
Bos = Annotated[
    str,
    typer.Option(
        "--bos", help="Where a BOS goes: tokenizer (as it does), none, after_prompt.", rich_help_panel=NUMERICS
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="As it will be served.", rich_help_panel=NUMERICS)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<i>.", rich_help_panel=NUMERICS)]
ComputeName = Annotated[
    str,
    typer.Option("--compute", help="packed, or a copy in int8, float32 or bfloat16.", rich_help_panel=NUMERICS),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell the plan and its memory, and learn nothing.")]


def learn(
    model: Model,
    data: Data,
    level: Level = None,
    task: Task = None,
    kind: KindName = "rows",
    recipe: RecipeName = "default",
    change: Changes = None,
    init: Init = None,
    dense: Dense = None,
    base: Base = None,
    seed: Seed = 0,
    out: Out = None,
    tokens: Tokens = None,
    steps: Steps = None,
    budget: Budget = None,
    run: RunFolder = None,
    cache: Cache = Path("runs/teacher"),
    data_root: DataRoot = None,
    bos: Bos = "tokenizer",
    dtype: Dtype = "auto",
    device: Device = "auto",
    compute: ComputeName = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Learn a prompt through the weights that will be served. A command that was cut short goes on where it stopped."""
    from cli.model import find_model
    from lab.data.documents import DataError
    from lab.data.named import documents
    from lab.data.splits import split
    from lab.learn.budget import parse_budget
    from lab.learn.order import Order
    from lab.learn.recipe import parse_change, read_recipe

    _check_words(kind, bos, out)
    changes = dict(map(parse_change, change or ())) | ({} if init is None else {"init": init})
    told = read_recipe(recipe, kind, changes)  # type: ignore[arg-type]
    order = Order(
        model=find_model(model),
        level=level,
        kind=kind,  # type: ignore[arg-type]
        task=task,
        recipe=told,
        budget=parse_budget(budget, tokens, steps, told),
        dense=None if dense is None else find_model(dense),
        dtype=dtype,
        device=device,
        compute=compute,
        bos=bos,  # type: ignore[arg-type]
        seed=seed,
        base=base,
    )
    try:
        splits = split(documents(data, data_root))
    except DataError as error:
        raise CommandError(f"--data: {error}") from error
    if dry_run:
        return tell(_outlook(order, splits), as_json)
    return _carry_out(order, splits, run, out, cache, as_json)


def _check_words(kind: str, bos: str, out: Path | None) -> None:
    if kind not in ("rows", "kv", "lora", "norms"):
        raise CommandError(f"--kind is {kind!r}; it is rows, kv, lora or norms", usage=True)
    if kind in ("lora", "norms") and out is not None:
        raise CommandError(
            f"--kind {kind} is a control: it writes figures and no prompt file; give --run in place of --out",
            usage=True,
        )
    if out is not None and out.is_dir():
        raise CommandError(f"--out {out} is a folder; name a file", usage=True)
    if bos not in ("tokenizer", "none", "after_prompt"):
        raise CommandError(f"--bos is {bos!r}; it is tokenizer, none or after_prompt", usage=True)


def _outlook(order: Order, splits: Splits) -> dict[str, Any]:
    """What would be learned, on how much, and the bytes that it takes."""
    from lab.estimate import learned_elements, memory
    from lab.learn.budget import steps_of
    from lab.learn.order import planned

    plan = planned(order, splits)
    recipe = order.recipe if plan.dense else replace(order.recipe, distil=0.0)
    cuda = plan.device.type == "cuda"
    need = memory(plan.config, plan.identity.level, order.kind, recipe, plan.compute, plan.dtype, cuda)
    return {
        "kind": order.kind,
        "level": plan.identity.level,
        "weights": plan.identity.weights,
        "parameters": learned_elements(plan.config, order.kind, order.recipe.positions),
        "steps": None if order.budget.unit == "seconds" else steps_of(order.budget, plan.learn, order.recipe),
        "learn_windows": len(plan.learn),
        "documents_left_out": plan.learn.left_out,
        "select_windows": len(plan.select),
        "device": plan.device.type,
        "compute": plan.compute,
        "memory": need.told(),
    }


def _carry_out(order: Order, splits: Splits, run: Path | None, out: Path | None, cache: Path, as_json: bool) -> None:
    from lab.data.splits import record
    from lab.disk import write_bytes
    from lab.learn.learn import learn as carry_out
    from lab.learn.order import planned
    from lab.progress import progress
    from lab.run import open_run
    from prompts_store.file import encode_prompt

    plan = planned(order, splits)
    if left := plan.learn.left_out:
        window = order.recipe.window
        typer.echo(
            f"note: {left} documents make no window of {window} tokens and are left out; --set window=N", err=True
        )
    name = f"{order.task or 'prompt'}.{order.kind}.{plan.identity.level}.{order.seed}"
    folder = run or (out.with_name(f"{out.name}.run") if out else Path("runs") / name)
    with open_run(folder, plan.record(), order.seed) as kept, progress(quiet=as_json) as report:
        record(splits, folder / "splits.json")
        file, figures = carry_out(plan, kept, cache, report)
        told: dict[str, Any] = {"file": None, "run": str(folder), **figures}
        if file is not None:
            place = out or folder / "prompt.safetensors"
            write_bytes(place, encode_prompt(file))
            told["file"] = str(place)
    tell(told, as_json)
