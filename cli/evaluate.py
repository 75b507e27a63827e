"""`promptstitch evaluate`: what a text costs a model, with a soft prompt, without, and beside the dense one.

Every condition is scored on the same tokens. Knows how a command line becomes a model, a prompt and windows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, takes_settings
from cli.output import AsJson, CommandError, Steps, say, tell_json

if TYPE_CHECKING:
    from lab.data.documents import Document
    from lab.data.windows import Windows
    from lab.evaluate.conditions import Dense as DenseScores
    from llama.load import LoadedModel
    from llama.tokenizer import HubTokenizer
    from prompts_store.prompt import SoftPrompt
    from server.settings import Settings

PANELS = {"Model": ("level", "dtype", "device", "base"), "Prompt": ("store", "blobs", "resolution")}
PARTS = ("all", "report", "select")
PATIENCE = 2.0  # seconds before anyone wants to see a bar
SEEDING_KV = 1 << 26  # bytes of the engine that tests a prompt of the registry

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a name that was pulled.")]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", metavar="FILE|REF", help="Prompt file, or task, task@3, task:alias.", rich_help_panel="Prompt"
    ),
]
Text = Annotated[str | None, typer.Option("--text", metavar="FILE", help="Text or JSON lines, folder, or a name: c4.")]
Part = Annotated[
    str, typer.Option("--part", metavar="NAME", help="all of it, or what learn never sees: report, select.")
]
Window = Annotated[int, typer.Option("--window", min=2, help="Text tokens that are scored together.")]
Dense = Annotated[
    str | None, typer.Option("--dense", metavar="MODEL", help="The dense model: KL, agreement, recovery.")
]
DensePrompt = Annotated[
    Path | None, typer.Option("--dense-prompt", metavar="FILE", help="An equal prompt, learned on the dense model.")
]
Controls = Annotated[bool, typer.Option("--controls", help="Score prompts that nobody learned, too.")]
Tasks = Annotated[str | None, typer.Option("--tasks", metavar="NAMES", help="lm-eval tasks, by commas: boolq,piqa.")]
Items = Annotated[int, typer.Option("--task-items", min=1, help="Items of each task.")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", metavar="DIR", help="Where names are looked up first.")]
Cache = Annotated[Path | None, typer.Option("--cache", metavar="DIR", help="Keep dense states and scores here.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the resamples.")]


@takes_settings(PANELS)
def evaluate(
    model: Model,
    prompt: Prompt = None,
    text: Text = None,
    part: Part = "all",
    window: Window = 512,
    dense: Dense = None,
    dense_prompt: DensePrompt = None,
    controls: Controls = False,
    tasks: Tasks = None,
    task_items: Items = 1000,
    data_root: DataRoot = None,
    cache: Cache = None,
    seed: Seed = 0,
    config: Config = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Measure perplexity on a text, and how far a prompt brings a compressed model back to the dense one."""
    if text is None and tasks is None:
        raise CommandError("nothing to evaluate on: say --text, or --tasks", usage=True)
    for name, value, needed, why in (
        ("--controls", controls, prompt, "--prompt"),
        ("--dense-prompt", dense_prompt, prompt and dense, "--prompt and --dense"),
        ("--dense", dense, text, "--text"),
        ("--part", part != "all", text, "--text"),
    ):
        if value and not needed:
            raise CommandError(f"{name} is of use with {why} only", usage=True)
    if part not in PARTS:
        raise CommandError(f"--part is {part!r}; it is one of {', '.join(PARTS)}", usage=True)
    from server.settings import load_settings

    settings = load_settings(config, model=model, **flags)
    asked = _Asked(prompt, text, part, window, dense, dense_prompt, controls, tasks, task_items, data_root, cache, seed)
    started = time.monotonic()
    with patient_progress() as steps:
        told = _evaluate(settings, asked, steps)
    told["seconds"] = round(time.monotonic() - started, 1)
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
    tasks: str | None
    items: int
    root: Path | None
    cache: Path | None
    seed: int


def _evaluate(settings: Settings, asked: _Asked, steps: Steps) -> dict[str, Any]:
    from cli.model import to_serve
    from llama.load import load
    from llama.tokenizer import HubTokenizer

    chosen, identity = to_serve(settings, steps)
    folder = Path(chosen.model)
    loaded = load(
        folder, level=chosen.level, dtype=chosen.dtype, device=chosen.device, identity=identity, progress=steps
    )
    tokenizer = HubTokenizer(folder)
    prompt, found = _prompt(asked.prompt, loaded, tokenizer, chosen)
    told = _identity(loaded, chosen, prompt, found)
    if asked.text is not None:
        told |= _text(asked, loaded, tokenizer, prompt, steps)
    if asked.tasks is not None:
        told["tasks"] = _tasks(asked, loaded, tokenizer, prompt, steps)
    return told


def _identity(
    loaded: LoadedModel, chosen: Settings, prompt: SoftPrompt | None, found: Mapping[str, Any] | None
) -> dict[str, Any]:
    told = loaded.identity
    return {
        "model": told.name,
        "level": told.level,
        "method": "while loading" if chosen.level else None,
        "base": told.base,
        "weights": told.weights,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "bytes": loaded.resident_bytes,
        "disk_bytes": loaded.disk_bytes,
        "prompt_digest": prompt and prompt.digest,
        "prompt": found,
    }


def _prompt(
    name: str | None, loaded: LoadedModel, tokenizer: HubTokenizer, chosen: Settings
) -> tuple[SoftPrompt | None, dict[str, Any] | None]:
    """The prompt in a file, or that a reference resolves to as a server would, and what is told of it."""
    from engine.stitch import mismatch

    if name is None:
        return None, None
    if (path := Path(name).expanduser()).exists():
        prompt: SoftPrompt | None = _from_file(path, loaded)
        found: dict[str, Any] = {"file": name}
    else:
        prompt, found = _from_store(name, loaded, tokenizer, chosen)
    if prompt is None:
        raise CommandError(f"--prompt: the store resolves {name} to no prompt (--resolution {chosen.resolution})")
    most = loaded.model.config.max_len
    if wrong := mismatch(prompt, loaded.model, loaded.identity.base, most, inf):
        raise CommandError(f"--prompt {name}: {wrong[1]}")
    told = {"kind": prompt.kind, "num_virtual_tokens": prompt.num_virtual_tokens, "bos": prompt.bos}
    return prompt, {**found, **told, "same_chat_template": prompt.chat_template == tokenizer.chat_template_digest}


def _from_file(path: Path, loaded: LoadedModel) -> SoftPrompt:
    from prompts_store.file import Limits, read_prompt

    if path.is_dir():
        raise CommandError(f"{path} is a folder; an adapter becomes a prompt by `promptstitch prompts import-peft`")
    base, config = loaded.identity.base, loaded.model.config
    limits = Limits(
        base=base,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    return read_prompt(path, limits, default_base=base).prompt


def _from_store(
    name: str, loaded: LoadedModel, tokenizer: HubTokenizer, chosen: Settings
) -> tuple[SoftPrompt | None, dict[str, Any]]:
    """By the rules and with the self-test of a server over this model."""
    from cli.answer import find_stitch
    from cli.local import open_store
    from engine.engine import LocalEngine, ServedModel
    from engine.options import EngineOptions
    from prompts_store.reference import parse_reference
    from prompts_store.resolution import Query

    query, told = Query(parse_reference(name), chosen.resolution), loaded.identity
    served = ServedModel(told.name, told.base, told.level, told.weights, loaded.resident_bytes)
    size = EngineOptions(kv_bytes=SEEDING_KV, max_virtual_tokens=loaded.model.config.max_len)
    with open_store(chosen) as store:
        engine = LocalEngine(loaded.model, tokenizer, served, size)
        try:
            stitch = find_stitch(store, query, engine, chosen, None)
            return (stitch.prompt, stitch.told(engine.info)) if stitch else (None, {})
        finally:
            engine.close()


def _text(
    asked: _Asked, loaded: LoadedModel, tokenizer: HubTokenizer, prompt: SoftPrompt | None, steps: Steps
) -> dict[str, Any]:
    """All conditions on the text."""
    from lab.data.documents import digest
    from lab.data.named import documents
    from lab.data.splits import split
    from lab.data.windows import cut
    from lab.evaluate.conditions import conditions
    from lab.evaluate.score import NotFiniteLoss
    from lab.evaluate.scorer import Scorer

    assert asked.text is not None
    soft, most = prompt.num_virtual_tokens if prompt else 0, loaded.model.config.max_len
    if soft + asked.window >= most:
        raise CommandError(
            f"--window {asked.window}: with {soft} soft tokens the context of {most} is too short for it"
        )
    texts: Sequence[Document] = documents(asked.text, asked.root)
    if asked.part != "all":
        texts = split(texts, asked.part).parts[asked.part]  # type: ignore[arg-type, index]
    windows = cut(texts, tokenizer, asked.window, bos=prompt.bos if prompt else None)
    told: dict[str, Any] = {
        "text": {"source": asked.text, "digest": digest(texts), "documents": len(texts), "left_out": windows.left_out},
        "split": asked.part,
        "window": asked.window,
        "windows": len(windows),
    }
    try:
        dense, about = _dense(asked, loaded, windows, prompt, steps) if asked.dense else (None, {})
        scorer, controls = Scorer(loaded, asked.cache), asked.controls
        found = conditions(scorer, tokenizer, windows, prompt, steps, dense=dense, compare=True, controls=controls)
    except NotFiniteLoss as error:
        raise CommandError(str(error)) from error
    return {**found.told(asked.seed), **told, **about}


def _dense(
    asked: _Asked, loaded: LoadedModel, windows: Windows, prompt: SoftPrompt | None, steps: Steps
) -> tuple[DenseScores, dict[str, Any]]:
    """The dense model's part, in the dtype and on the device of the model that is evaluated."""
    from cli.model import find_model
    from lab.evaluate.conditions import of_dense
    from llama.load import load

    assert asked.dense is not None
    model = loaded.model
    dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
    dense = load(find_model(asked.dense), dtype=dtype, device=device, progress=steps)
    told = dense.identity
    if told.base != loaded.identity.base:
        raise CommandError(f"--dense {asked.dense} is of base {told.base}, the model of base {loaded.identity.base}")
    equal = _from_file(asked.dense_prompt, dense) if asked.dense_prompt else None
    same = prompt if asked.controls else None
    found = of_dense(dense, windows, steps, cache=asked.cache, equal=equal, same=same)
    return found, {"dense": {"model": told.name, "level": told.level, "weights": told.weights}}


def _tasks(
    asked: _Asked, loaded: LoadedModel, tokenizer: HubTokenizer, prompt: SoftPrompt | None, steps: Steps
) -> dict[str, Any]:
    try:
        from lab.evaluate.harness import PromptedLM
        from lab.evaluate.tasks import run_tasks
    except ImportError as error:
        raise CommandError(f"--tasks needs lm-eval ({error}): pip install 'promptstitch[lab]'") from error
    from lab.data.named import root_of

    assert asked.tasks is not None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [name.strip() for name in asked.tasks.split(",") if name.strip()]
    lm = PromptedLM(loaded, tokenizer, prompt, steps)
    found = run_tasks(lm, names, root_of(asked.root), items=asked.items)
    return {name: result.told() for name, result in found.items()}


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
