"""`promptstitch transfer`: what stored prompts are worth on other checkpoints, written into the registry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Key, Url
from cli.output import AsJson, CommandError, say, tell_json, tell_list

if TYPE_CHECKING:
    from lab.transfer.cells import Cell
    from lab.transfer.prompts import Contender
    from lab.transfer.registry import Registry
    from lab.transfer.samples import Sample
    from lab.transfer.transfer import Model

Models = Annotated[
    list[str] | None, typer.Argument(metavar="MODEL…", help="Checkpoints: folders, or names that were pulled.")
]
Levels = Annotated[
    list[str] | None,
    typer.Option("--level", metavar="LEVEL", help="Load dense MODELs at this level; may be given several times."),
]
InSitu = Annotated[
    str | None,
    typer.Option(
        "--in-situ", metavar="MODEL", help="A fresh checkpoint: find the best stored prompt of each task in minutes."
    ),
]
Store = Annotated[str | None, typer.Option("--store", metavar="DIR", help="Store of the prompts, and of the results.")]
Prompts = Annotated[
    list[Path] | None, typer.Option("--prompt", metavar="FILE", help="A prompt file; without --store, only these.")
]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only prompts of this task; several times.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="FILE or NAME, dealt by site into select and report; or all of it for one: DATA:report. Several times.",
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", metavar="DIR", help="Where named data is looked for before the Hub.")
]
Window = Annotated[int, typer.Option("--window", min=2, help="Text tokens of one window.")]
Most = Annotated[int | None, typer.Option("--windows", min=1, help="Score at most so many windows of each split.")]
BUDGET = "5m"
Budget = Annotated[str | None, typer.Option("--budget", help=f"Time for --in-situ: 90s, {BUDGET} (default), 1h.")]
Base = Annotated[str | None, typer.Option("--base", help="Base of foreign checkpoints: digest, or dense folder.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<i>.")]
RunFolder = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Run folder; else one in runs/lab, by what is asked.")
]

COLUMNS = ("prompt", "kind", "learned_level", "level", "data", "split", "perplexity", "without", "gain", "interval")
RUNS = Path("runs/lab")


def transfer(
    models: Models = None,
    level: Levels = None,
    store: Store = None,
    data: Data = None,
    prompt: Prompts = None,
    task: Tasks = None,
    in_situ: InSitu = None,
    budget: Budget = None,
    window: Window = 256,
    windows: Most = None,
    data_root: DataRoot = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    run: RunFolder = None,
    url: Url = None,
    key: Key = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Measure every fitting prompt on every checkpoint, against no prompt on the same tokens.

    What was measured is written to the store: on select it decides which prompt a server takes where none was learned
    at its level, on report it is what a report shows. A command that was cut short goes on where it stopped.
    """
    from cli.measured import opened
    from cli.model import find_model
    from lab.learn.budget import seconds_of
    from lab.progress import progress
    from lab.run import config_digest, open_run
    from lab.transfer.results import told
    from lab.transfer.transfer import Order, models_of
    from lab.transfer.transfer import transfer as carry_out

    asked = _Asked(models or [], in_situ, data or [], data_root, window, windows)
    asked.check(level or [])
    if budget is not None and not in_situ:
        raise CommandError("--budget is of use with --in-situ only", usage=True)
    seconds = seconds_of(budget or BUDGET) if in_situ else None
    found = models_of([find_model(name) for name in asked.names], level or [], base)
    with opened(url, key, store, config, needed=store is not None or not prompt) as registry:
        contenders = _contenders(registry, prompt or [], task or [], found[0].identity.base)
        samples = _samples(asked, contenders, found)
        order = Order(found, contenders, samples, window, dtype, device, base, seconds)
        folder = run or RUNS / f"transfer-{config_digest(order.config())[7:19]}"
        with open_run(folder, order.config()) as kept, progress(quiet=as_json) as report:
            outcome = carry_out(order, kept, report, lambda cell: _record(registry, cell))
            figures = told(outcome, registry, choose=in_situ is not None)
            kept.tell(**figures)
    if as_json:
        return tell_json({"run": str(folder), **figures})
    return _show(folder, figures)


@dataclass(frozen=True)
class _Asked:
    """What the command line says of models and data."""

    models: Sequence[str]
    in_situ: str | None
    data: Sequence[str]
    data_root: Path | None
    window: int
    windows: int | None

    @property
    def names(self) -> Sequence[str]:
        return self.models if self.in_situ is None else [self.in_situ]

    def check(self, levels: Sequence[str]) -> None:
        """Raises CommandError."""
        if (self.in_situ is None) == (not self.models):
            raise CommandError("say MODEL… for a table, or --in-situ MODEL for the best prompt of one", usage=True)
        if not self.data:
            raise CommandError("say what to measure on: --data FILE or NAME, such as c4", usage=True)
        if self.in_situ is not None and (len(self.data) > 1 or len(levels) > 1):
            raise CommandError("--in-situ takes one --data and one --level", usage=True)


def _contenders(registry: Registry | None, files: Sequence[Path], tasks: Sequence[str], base: str) -> list[Contender]:
    from lab.transfer.prompts import from_file, stored, together

    of_store = [] if registry is None else stored(registry, base, tasks)
    found = together(of_store, [from_file(path, base) for path in files])
    if not found:
        raise CommandError(
            f"the registry holds no prompt of base {base}; learn one, push one, or name a file (--prompt)"
        )
    return found


def _samples(order: _Asked, contenders: Sequence[Contender], models: Sequence[Model]) -> list[Sample]:
    from lab.transfer.samples import samples
    from llama.load import info
    from llama.tokenizer import HubTokenizer

    if order.window > (context := info(models[0].folder).config.max_len):
        raise CommandError(f"--window {order.window} does not fit the model's context of {context} tokens", usage=True)
    layouts = {contender.prompt.bos for contender in contenders}
    tokenizer = HubTokenizer(models[0].folder)
    learned = {contender.data for contender in contenders if contender.data}
    found = samples(order.data, order.data_root, tokenizer, order.window, layouts, order.windows, learned)
    if not order.in_situ:
        return found
    if not (chosen := [each for each in found if each.split == "select"]):
        raise CommandError("--in-situ chooses, and all of --data is to report on; leave :report out", usage=True)
    return chosen


def _record(registry: Registry | None, cell: Cell) -> None:
    from lab.transfer.prompts import record

    who = cell.contender
    if registry is not None and who.task is not None and who.version is not None:
        record(registry, who.task, who.version, cell.measurement())


def _show(run: Path, told: Mapping[str, Any]) -> None:
    rows = [
        {
            **cell,
            "perplexity": f"{cell['perplexity']:.2f}",
            "without": f"{_perplexity(cell['loss_without']):.2f}",
            "gain": f"{cell['gain']['value']:+.4f}",
            "interval": _interval(cell["gain"]),
        }
        for cell in sorted(told["cells"], key=lambda cell: (cell["data"], cell["split"], cell["level"], cell["loss"]))
    ]
    tell_list(rows, COLUMNS, False, "nothing was measured")
    for each in told["left_out"]:
        say(f"left out: {each['prompt']} on {each['level']}: {each['why']}")
    for each in told["transfer"]:
        if each["value"] is not None:
            share = f"{each['value']:.0%} {_interval(each, '.0%')}"
            say(f"{each['data']}/{each['split']}: between levels {share} of the gain stays, {each['pairs']} pairs")
    for best in told.get("best", ()):
        ahead = f", {best['ahead']['value']:.4f} nats ahead of {best['next_best']}" if best["ahead"] else ""
        gain = f"saves {best['gain']['value']:.4f} nats a token {_interval(best['gain'])}"
        say(
            f"best on {best['level']}: {best['prompt']}, {gain}{ahead}" + ("" if best["helps"] else "; it may not help")
        )
        if best["served"] and best["served"]["digest"] != best["digest"]:
            say(f"a server takes {best['served']['prompt']} all the same: {best['served']['why']}")
    say(f"run  {run}")


def _interval(told: dict[str, Any], form: str = "+.4f") -> str:
    if told["interval"] is None:
        return "no interval"
    low, high = told["interval"]
    return f"[{low:{form}}, {high:{form}}]"


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 709.0))
