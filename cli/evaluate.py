"""`promptstitch evaluate`: what a text costs a model, with a soft prompt, without, and beside the dense one.

Every condition is scored on the same tokens. Knows how a command line becomes a model, a prompt and windows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import MAX_SEED, Config, takes_settings
from cli.output import AsJson, CommandError, Steps, say, tell_json
from cli.subject import equal_prompt, find_prompt, told_of

if TYPE_CHECKING:
    from lab.data.documents import Document
    from lab.data.windows import Windows
    from lab.evaluate.choosing import Others
    from lab.evaluate.conditions import Dense as DenseScores
    from llama.load import LoadedModel
    from llama.tokenizer import HubTokenizer
    from prompts_store.prompt import SoftPrompt
    from server.settings import Settings

PANELS = {"Model": ("level", "dtype", "compute", "device", "base"), "Prompt": ("store", "blobs", "resolution")}
PREFIXES = 16  # real texts that are tried
PARTS = ("all", "report", "select")
PATIENCE = 2.0  # seconds before anyone wants to see a bar

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a name that was pulled.")]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", metavar="FILE|REF", help="Prompt file, or task, task@3, task:alias.", rich_help_panel="Prompt"
    ),
]
Text = Annotated[str | None, typer.Option("--text", metavar="FILE", help="Text or JSON lines, folder, or a name: c4.")]
Part = Annotated[
    str, typer.Option("--part", metavar="NAME", help="all of it, or what nothing is learned from: report, select.")
]
Window = Annotated[int, typer.Option("--window", min=2, help="Text tokens that are scored together.")]
Dense = Annotated[
    str | None, typer.Option("--dense", metavar="MODEL", help="The dense model: KL, agreement, recovery.")
]
DensePrompt = Annotated[
    Path | None, typer.Option("--dense-prompt", metavar="FILE", help="An equal prompt, learned on the dense model.")
]
Controls = Annotated[bool, typer.Option("--controls", help="Score prompts that nobody learned, too.")]
Prefixes = Annotated[
    int | None,
    typer.Option(
        "--prefixes", min=0, metavar="K", help="Also the best of K real texts from other parts; 0: none.  [16]"
    ),
]
PrefixText = Annotated[
    str | None,
    typer.Option("--prefix-text", metavar="FILE|NAME", help="Where those texts come from; else --text, --part report."),
]
Tasks = Annotated[str | None, typer.Option("--tasks", metavar="NAMES", help="lm-eval tasks, by commas: boolq,piqa.")]
Items = Annotated[int, typer.Option("--task-items", min=1, help="Items of each task.")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", metavar="DIR", help="Where names are looked up first.")]
Cache = Annotated[Path | None, typer.Option("--cache", metavar="DIR", help="Keep dense states and scores here.")]
RunFolder = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Keep a run folder; one that was cut short goes on.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of the bootstrap's resamples.")]


@takes_settings(PANELS, compute="the dtype")
def evaluate(
    model: Model,
    prompt: Prompt = None,
    text: Text = None,
    part: Part = "all",
    window: Window = 512,
    dense: Dense = None,
    dense_prompt: DensePrompt = None,
    controls: Controls = False,
    prefixes: Prefixes = None,
    prefix_text: PrefixText = None,
    tasks: Tasks = None,
    task_items: Items = 1000,
    data_root: DataRoot = None,
    cache: Cache = None,
    run: RunFolder = None,
    seed: Seed = 0,
    config: Config = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Measure perplexity on a text, and how far a prompt brings a compressed model back to the dense one."""
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if not text and not names:
        raise CommandError("nothing to evaluate on: say --text, or --tasks", usage=True)
    for name, value, needed, why in (
        ("--controls", controls, prompt, "--prompt"),
        ("--dense-prompt", dense_prompt, prompt and dense, "--prompt and --dense"),
        ("--dense", dense, text, "--text"),
        ("--part", part != "all", text, "--text"),
        ("--prefixes", prefixes, controls and text, "--controls and --text"),
        ("--prefix-text", prefix_text, controls and text, "--controls and --text"),
        ("--prefixes", prefixes, part == "report" or prefix_text, "--part report or --prefix-text"),
    ):
        if value and not needed:
            raise CommandError(f"{name} is of use with {why} only", usage=True)
    if part not in PARTS:
        raise CommandError(f"--part is {part!r}; it is one of {', '.join(PARTS)}", usage=True)
    from server.settings import load_settings

    settings = load_settings(config, model=model, **flags)
    if prefixes is None:
        prefixes = PREFIXES if controls and text and (part == "report" or prefix_text) else 0
    given = (prompt, text, part, window, dense, dense_prompt, controls, prefixes, prefix_text)
    asked = _Asked(*given, names, task_items, data_root, cache, seed)
    with patient_progress() as steps:
        told = _evaluate(settings, asked, run, steps)
    if as_json:
        return tell_json(told)
    for name, value in _lines(told):
        say(f"{name:<40}  {value}")
    return None


@dataclass(frozen=True)
class _Asked:
    """The command line."""

    prompt: str | None
    text: str | None
    part: str
    window: int
    dense: str | None
    dense_prompt: Path | None
    controls: bool
    prefixes: int
    prefix_text: str | None
    tasks: tuple[str, ...]
    items: int
    root: Path | None
    cache: Path | None
    seed: int


def _evaluate(settings: Settings, asked: _Asked, folder: Path | None, steps: Steps) -> dict[str, Any]:
    """The figures, from the run folder as far as they are there already."""
    from cli.model import to_serve
    from lab.run import open_run
    from llama.load import load
    from llama.tokenizer import HubTokenizer

    started = time.monotonic()
    chosen, identity = to_serve(settings, steps)
    model = Path(chosen.model)
    loaded = load(
        model,
        level=chosen.level,
        dtype=chosen.dtype,
        device=chosen.device,
        identity=identity,
        compute=chosen.compute if "compute" in settings.model_fields_set else None,  # figures are of the weights
        progress=steps,
    )
    tokenizer = HubTokenizer(model)
    prompt, found = find_prompt(asked.prompt, loaded, tokenizer, chosen)
    told = told_of(loaded, chosen, prompt, found)
    texts = _documents(asked) if asked.text else None
    others = _others(asked, texts) if texts and asked.prefixes else None
    with nullcontext() if folder is None else open_run(folder, _record(asked, told, texts, others), asked.seed) as run:
        kept = run.figures if run else {}
        if "seconds" in kept:
            return dict(kept)
        cache = asked.cache or (run.folder / "cache" if run else None)
        if texts is not None:
            told |= _text(replace(asked, cache=cache), texts, others, loaded, tokenizer, prompt, steps)
        for name in asked.tasks:
            done = kept.get("tasks", {}).get(name) or _task(name, asked, loaded, tokenizer, prompt, steps)
            told["tasks"] = {**told.get("tasks", {}), name: done}
            if run:
                run.tell(tasks=told["tasks"])
        told["seconds"] = round(time.monotonic() - started, 1)
        if run:
            run.tell(**told)
        return told


def _record(
    asked: _Asked, told: Mapping[str, Any], texts: Sequence[Document] | None, others: Others | None
) -> dict[str, Any]:
    """All that the outcome depends on, for the run folder."""
    from cli.model import find_model
    from lab.data.documents import digest
    from llama.identity import identify

    equal = asked.dense_prompt
    return {
        "command": "select" if asked.part == "select" else "evaluate",  # which no report shows
        **{name: told[name] for name in ("base", "level", "weights", "dtype", "compute", "prompt_digest")},
        **{name: getattr(asked, name) for name in ("part", "window", "controls", "tasks", "items")},
        "text": texts and digest(texts),
        **({"prefixes": [asked.prefixes, *others.digests]} if others else {}),
        "dense": identify(find_model(asked.dense)).weights if asked.dense else None,
        "equal": sha256(equal.read_bytes()).hexdigest() if equal else None,
    }


def _documents(asked: _Asked) -> Sequence[Document]:
    from lab.data.named import documents
    from lab.data.splits import split

    assert asked.text is not None
    found = documents(asked.text, asked.root)
    return found if asked.part == "all" else split(found, asked.part).parts[asked.part]  # type: ignore[arg-type, index]


def _others(asked: _Asked, reported: Sequence[Document]) -> Others:
    from lab.data.named import documents
    from lab.data.splits import split
    from lab.evaluate.choosing import Others

    assert asked.text is not None
    parts = split(documents(asked.prefix_text or asked.text, asked.root), "learn", "select")
    return Others.of(parts, reported if asked.prefix_text else ())


def _text(
    asked: _Asked,
    texts: Sequence[Document],
    others: Others | None,
    loaded: LoadedModel,
    tokenizer: HubTokenizer,
    prompt: SoftPrompt | None,
    steps: Steps,
) -> dict[str, Any]:
    """All conditions on the text."""
    from lab.data.documents import digest, form
    from lab.data.windows import cut
    from lab.evaluate.conditions import conditions
    from lab.evaluate.score import NotFiniteLoss
    from lab.evaluate.scorer import Scorer

    soft, most = prompt.num_virtual_tokens if prompt else 0, loaded.model.config.max_len
    if soft + asked.window > most:
        raise CommandError(
            f"--window {asked.window}: with {soft} soft tokens the context of {most} is too short for it"
        )
    windows = cut(texts, tokenizer, asked.window, bos=prompt.bos if prompt else None)
    told: dict[str, Any] = {
        "text": {
            "source": asked.text,
            "digest": digest(texts),
            "form": form(texts),
            "documents": len(texts),
            "left_out": windows.left_out,
        },
        "split": asked.part,
        "window": asked.window,
        "windows": len(windows),
    }
    try:
        dense, about = _dense(asked, loaded, windows, prompt, steps) if asked.dense else (None, {})
        choice = others.choice(tokenizer, asked.window, prompt, asked.prefixes) if others and prompt else None
        if choice:
            tried = sum(1 for _ in choice.starts(soft))
            told["prefixes"] = {"tried": tried, "chosen_on": len(choice.select), "digest": choice.select.digest}
        scorer, controls = Scorer(loaded, asked.cache), asked.controls
        found = conditions(
            scorer, tokenizer, windows, prompt, steps, dense=dense, compare=True, controls=controls, choice=choice
        )
    except NotFiniteLoss as error:
        raise CommandError(str(error)) from error
    return {**found.told(asked.seed), **told, **about}


def _dense(
    asked: _Asked, loaded: LoadedModel, windows: Windows, prompt: SoftPrompt | None, steps: Steps
) -> tuple[DenseScores, dict[str, Any]]:
    """The dense model's part, in the dtype and on the device of the model that is evaluated."""
    from cli.model import find_model
    from lab.evaluate.conditions import of_dense
    from llama.identity import identify
    from llama.load import load

    assert asked.dense is not None
    model, place = loaded.model, find_model(asked.dense)
    told = identify(place)
    if told.level != "dense":
        raise CommandError(f"--dense {asked.dense} is {told.level}; name the dense checkpoint that the model is of")
    if told.base != loaded.identity.base:
        raise CommandError(f"--dense {asked.dense} is of base {told.base}, the model of base {loaded.identity.base}")
    dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
    dense = load(place, dtype=dtype, device=device, identity=told, progress=steps)
    equal = equal_prompt(asked.dense_prompt, dense, prompt) if asked.dense_prompt and prompt else None
    same = prompt if asked.controls else None
    found = of_dense(dense, windows, steps, cache=asked.cache, equal=equal, same=same)
    return found, {"dense": {"model": told.name, "level": told.level, "weights": told.weights}}


def _task(
    name: str, asked: _Asked, loaded: LoadedModel, tokenizer: HubTokenizer, prompt: SoftPrompt | None, steps: Steps
) -> dict[str, Any]:
    try:
        from lab.evaluate.harness import PromptedLM
        from lab.evaluate.tasks import run_tasks
    except ImportError as error:
        raise CommandError(f"--tasks needs lm-eval ({error}): pip install 'promptstitch[lab]'") from error
    from lab.data.named import root_of

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = PromptedLM(loaded, tokenizer, prompt, steps)
    return dict(run_tasks(lm, [name], root_of(asked.root), items=asked.items)[name].told())


def _lines(told: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """Each figure with its name; an estimate is one line: value [low, high]."""
    for name, value in told.items():
        if isinstance(value, Mapping) and value.keys() == {"value", "interval", "units", "unit"}:
            ends = value["interval"]
            around = "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}] by {value['unit']}, {value['units']}"
            yield at + name, f"{value['value']:.4f}{around}"
        elif isinstance(value, Mapping):
            yield from _lines(value, f"{at}{name}.")
        elif value is not None:
            yield at + name, f"{value:.4f}" if isinstance(value, float) else str(value)


@contextmanager
def patient_progress() -> Iterator[Steps]:
    """`lab.progress`, once it has been waited for long enough that someone may want to see it."""
    from lab.progress import Report, progress

    started, shown = time.monotonic(), list[Report]()
    with ExitStack() as stack:

        def report(step: str, done: int, total: int) -> None:
            if not shown and time.monotonic() - started >= PATIENCE:
                shown.append(stack.enter_context(progress()))
            for each in shown:
                each(step, done, total)

        yield report
