"""`promptstitch recover`: one command from a dense checkpoint to a measured prompt in the registry, ready to serve."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.learn import Base, Bos, Changes, ComputeName, DataRoot, Device, Dtype, RecipeName, Seed, Steps, Tokens
from cli.options import Config
from cli.output import AsJson, CommandError, say, tell_json

if TYPE_CHECKING:
    from lab.learn.budget import Budget as Length
    from lab.learn.recipe import Recipe
    from lab.plan import Order, Plan
    from lab.publish import Published
    from lab.recover import Outcome
    from server.settings import Settings

Model = Annotated[str, typer.Argument(help="Dense checkpoint: a folder, or a name that was pulled.")]
Level = Annotated[
    str | None,
    typer.Option("--level", metavar="NAME", help="w3g64, w4g64-s50, nf4, …; left out: MODEL is compressed already."),
]
Task = Annotated[str, typer.Option("--task", help="Task to file the prompt under.")]
Data = Annotated[str, typer.Option("--data", metavar="FILE|NAME", help="Text, JSON lines, a folder, or a name: c4.")]
Budget = Annotated[str | None, typer.Option("--budget", metavar="TIME", help="Learning time: 90s, 15m, 1.5h.  [15m]")]
KindName = Annotated[str, typer.Option("--kind", help="rows or kv.")]
Store = Annotated[str | None, typer.Option("--store", metavar="DIR", help="Store that the prompt goes into.")]
RunFolder = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Run folder; one cut short goes on. Else in runs/.")
]
MethodName = Annotated[
    str | None,
    typer.Option("--method", metavar="NAME", help="gptq, rtn, sparsegpt, …: write a checkpoint, whatever the level."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The compressed checkpoint; else in the run folder.")
]
Dense = Annotated[
    str | None, typer.Option("--dense", metavar="MODEL", help="The dense model, where MODEL is compressed already.")
]
Embedding = Annotated[
    str, typer.Option("--embedding", metavar="NAME", help="Of the checkpoint: keep, or q8, which we alone read.")
]
Allocation = Annotated[
    str, typer.Option("--allocation", metavar="NAME", help="Of the checkpoint: uniform, or sensitivity, equal bytes.")
]
Calibration = Annotated[int, typer.Option("--calibration-tokens", min=1, help="Read by the solver.")]
Windows = Annotated[int, typer.Option("--windows", min=2, help="Windows that are scored of select and of report.")]
Cache = Annotated[Path, typer.Option("--cache", metavar="DIR", help="Where dense states and scores are kept.")]
DEFAULT_BUDGET = "15m"


def recover(
    model: Model,
    data: Data,
    task: Task,
    level: Level = None,
    budget: Budget = None,
    kind: KindName = "rows",
    store: Store = None,
    run: RunFolder = None,
    method: MethodName = None,
    out: Out = None,
    dense: Dense = None,
    base: Base = None,
    embedding: Embedding = "keep",
    allocation: Allocation = "uniform",
    recipe: RecipeName = "default",
    change: Changes = None,
    tokens: Tokens = None,
    steps: Steps = None,
    windows: Windows = 96,
    calibration_tokens: Calibration = 32768,
    seed: Seed = 0,
    cache: Cache = Path("runs/teacher"),
    data_root: DataRoot = None,
    bos: Bos = "tokenizer",
    dtype: Dtype = "auto",
    device: Device = "auto",
    compute: ComputeName = "auto",
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Compress, learn, measure on unseen data, push with the measurements. A command that was cut short goes on."""
    from cli.model import find_model
    from lab.plan import Order
    from server.settings import load_settings

    _check(kind, bos)
    told, length = _length(recipe, kind, change, budget, tokens, steps)
    order = Order(
        model=find_model(model),
        level=level,
        task=task,
        kind=kind,  # type: ignore[arg-type]
        recipe=told,
        budget=length,
        method=method,
        dense=find_model(dense) if dense else None,
        calibration=calibration_tokens,
        windows=windows,
        bos=bos,  # type: ignore[arg-type]
        dtype=dtype,
        device=device,
        compute=compute,
        seed=seed,
        base=base,
        embedding=embedding,
        allocation=allocation,
    )
    settings = load_settings(config, store=store)
    (tell_json if as_json else _show)(_run(order, data, data_root, run, out, cache, settings, store, as_json))


def _check(kind: str, bos: str) -> None:
    if kind not in ("rows", "kv"):
        raise CommandError(f"--kind is {kind!r}; it is rows or kv", usage=True)
    if bos not in ("tokenizer", "none", "after_prompt"):
        raise CommandError(f"--bos is {bos!r}; it is tokenizer, none or after_prompt", usage=True)


def _length(
    recipe: str, kind: str, change: list[str] | None, budget: str | None, tokens: int | None, steps: int | None
) -> tuple[Recipe, Length]:
    """What is learned by, and for how long."""
    from lab.learn.budget import parse_budget
    from lab.learn.recipe import parse_change, read_recipe

    told = read_recipe(recipe, kind, dict(map(parse_change, change or ())))  # type: ignore[arg-type]
    timed = DEFAULT_BUDGET if budget is None and tokens is None and steps is None else budget
    return told, parse_budget(timed, tokens, steps, told)


def _run(
    order: Order,
    data: str,
    data_root: Path | None,
    run: Path | None,
    out: Path | None,
    cache: Path,
    settings: Settings,
    store: str | None,
    quiet: bool,
) -> dict[str, Any]:
    """Every step in its run folder; the figures, with where they are kept."""
    from cli.local import open_store
    from cli.model import shipped_prompts
    from lab.data.named import documents
    from lab.data.splits import record, split
    from lab.outlook import estimates
    from lab.plan import Places
    from lab.progress import progress
    from lab.prove import measurement
    from lab.publish import publish
    from lab.recover import planned, recover, rival
    from lab.run import open_run
    from lab.whole import Whole
    from prompts_store.file import read_prompt

    open_store(settings).close()  # told now, not after an hour, if it cannot be had
    splits = split(documents(data, data_root))
    folder = run or Path("runs") / f"recover-{order.task}.{order.kind}.{order.level or 'stored'}.{order.seed}"
    plan = planned(order, splits, Places(folder, out or folder / "checkpoint", cache), data)
    if out and not plan.solve:
        made = f"{level} is made while loading" if (level := order.level) else "the model is compressed already"
        raise CommandError(f"--out: {made}, so no checkpoint is written; leave it out, or name a --method", usage=True)
    with open_run(folder, plan.record(), order.seed) as kept, progress(quiet=quiet) as report:
        record(splits, folder / "splits.json")
        expected = {**estimates(plan), "push": 1.0}
        kept.tell(estimated_seconds={name: round(seconds) for name, seconds in expected.items()})
        if not quiet:
            say(_expected(expected))
        whole = Whole(expected, report)
        outcome = recover(plan, whole)
        assert outcome.file is not None
        assert order.task is not None
        assert outcome.select is not None
        assert outcome.report is not None
        with whole.step("push") as step, open_store(settings) as registry:
            seeds = map(read_prompt, settings.seed_prompts or shipped_prompts(plan.base))
            registry.seed([file for file in seeds if file.prompt.base == plan.base])  # as `serve` starts a new store
            found = measurement(outcome.select), measurement(outcome.report)
            pushed = publish(registry, outcome.file, order.task, *found, lambda other: rival(plan, other, step))
        before = kept.figures.get("seconds", {})
        spent = {name: seconds + before.get(name, 0) for name, seconds in whole.seconds.items()}
        _write_page(folder)
        figures = _told(plan, outcome, pushed, settings, store) | {"seconds": spent}
        kept.tell(**figures)
    return {"run": str(folder), **figures}


def _write_page(folder: Path) -> None:
    """results.html and results.md of what the run folder holds."""
    from lab.disk import write_bytes
    from lab.report.evidence import gather
    from lab.report.report import page_of
    from lab.report.write import html, markdown

    page = page_of(gather([folder], None))
    write_bytes(folder / "results.html", html(page).encode())
    write_bytes(folder / "results.md", markdown(page).encode())


def _expected(seconds: Mapping[str, float]) -> str:
    each = ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items() if value >= 6)
    return f"expected: {sum(seconds.values()) / 60:.0f} minutes in all: {each}"


def _told(plan: Plan, outcome: Outcome, pushed: Published, settings: Settings, store: str | None) -> dict[str, Any]:
    assert outcome.report is not None
    assert outcome.select is not None
    shown, learned = outcome.report, outcome.learned
    model, level = plan.served
    serve = ["promptstitch", "serve", str(model)]
    serve += ["--level", level] if level else []
    if shown["prompt"]["num_virtual_tokens"] > settings.max_prompt_tokens:
        serve += ["--max-prompt-tokens", str(shown["prompt"]["num_virtual_tokens"])]
    serve += ["--dtype", plan.order.dtype] if plan.order.dtype != "auto" else []
    serve += ["--store", store] if store else []
    body = {"task": plan.order.task, "text": "The capital of France is", "max_tokens": 24, "resolution": "exact"}
    address = f"http://{settings.host}:{settings.port}/v1/generate"
    curl = ["curl", "-s", address, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    conditions = shown["conditions"]
    return {
        "task": plan.order.task,
        "kind": plan.order.kind,
        "base": plan.base,
        "level": shown["level"],
        "weights": shown["weights"],
        "checkpoint": str(model) if plan.solve else None,
        "compressed": outcome.compressed,
        "prompt": {
            "file": str(plan.places.run / "learn" / "prompt.safetensors"),
            "num_virtual_tokens": shown["prompt"]["num_virtual_tokens"],
            "tokens_seen": learned["tokens"],
            "documents_left_out": learned.get("documents_left_out", 0),
            **pushed.told(),
        },
        "perplexity": {
            "dense": shown.get("dense_perplexity"),
            "compressed": conditions["without_prompt"]["perplexity"],
            "untrained_prompt": conditions["untrained"]["perplexity"],
            "prompt": shown["perplexity"],
        },
        "gain": shown["gain"],
        "recovery": shown.get("recovery"),
        "select": {"perplexity": outcome.select["perplexity"], "gain": outcome.select["gain"]},
        "page": str(plan.places.run / "results.html"),
        "serve": shlex.join(serve),
        "curl": shlex.join(curl),
    }


def _show(told: Mapping[str, Any]) -> None:
    found, prompt = told["perplexity"], told["prompt"]
    dense = "" if found["dense"] is None else f"dense {found['dense']:.2f}, "
    say(
        f"perplexity on report data: {dense}{told['level']} {found['compressed']:.2f}, with the prompt "
        f"{found['prompt']:.2f} (an untrained one: {found['untrained_prompt']:.2f})"
    )
    for name, label in (("share", "of the gap in log-perplexity closed"), ("kl_share", "of KL(dense || .) closed")):
        if share := (told["recovery"] or {}).get(name):
            around = "" if share["interval"] is None else " [{:.0%}, {:.0%}]".format(*share["interval"])
            say(f"{label}: {share['value']:.0%}{around}")
    verb = "is" if prompt["promoted"] else "is not"
    say(f"{prompt['task']}@{prompt['version']} at {prompt['level']} {verb} the default: {prompt['why']}")
    say(f"page {told['page']}")
    say("")
    say(told["serve"])
    say(told["curl"])
