"""The commands of `promptstitch prompts` that make prompts out of other things: a text, a PEFT adapter (and back), a
checkpoint of the paper's code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, Key, Store, Url
from cli.output import AsJson, CommandError, tell, words_of
from cli.prompts import Binding, Bos, Level, OnlyBase, OnlyLevel, TaskName, check_free, tell_pushed
from cli.registry import Registry, Source, open_registry, pick

if TYPE_CHECKING:
    from prompts_store.file import PromptFile
    from prompts_store.prefix_tuning import Turn

Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write a prompt file instead of pushing to a registry.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def from_text(
    text: Annotated[str, typer.Argument(help="The written prompt, or - to read it from standard input.")],
    model: Annotated[str, typer.Option("--model", help="Whose embeddings: a folder, or a name that was pulled.")],
    task: TaskName = None,
    level: Annotated[
        str | None, typer.Option("--level", help="Level to file it under; else that of the server, or of the model.")
    ] = None,
    out: Out = None,
    force: Force = False,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Turn a written prompt into soft prompt rows that are served exactly as the text would be."""
    if out is None and task is None:
        raise CommandError("say --task to push it to a registry, or --out to write a file", usage=True)
    from cli.model import find_model
    from cli.written import written_prompt

    words = words_of(text)
    folder = find_model(model)
    if out is not None:
        return _save(written_prompt(words, folder, task, level), out, force, as_json)
    with open_registry(url, key, store, config, model) as registry:
        return _push(written_prompt(words, folder, task, level or registry.served_level()), registry, as_json)


def import_peft(
    directory: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A saved adapter.")],
    task: TaskName = None,
    level: Level = None,
    bos: Bos = None,
    model: Binding = None,
    out: Out = None,
    force: Force = False,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Bring in a PEFT adapter: PROMPT_TUNING and P_TUNING bit for bit, PREFIX_TUNING with its rotation undone."""
    from prompts_store.peft import CONFIG_NAME, WEIGHTS_NAME

    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            hint = "; save the adapter with safe_serialization=True" if name == WEIGHTS_NAME else ""
            raise CommandError(f"{directory} holds no {name}{hint}")
    if out is not None:
        return _save(_adapter(directory, task, level, bos, model), out, force, as_json)
    if task is None:
        raise CommandError("an adapter names no task; say --task, or --out to write a file", usage=True)
    with open_registry(url, key, store, config, model) as registry:
        if model is not None and url is not None:  # held against it here: a server knows its own base alone
            return _push(_adapter(directory, task, level, bos, model), registry, as_json)
        source = Source(directory / WEIGHTS_NAME, directory / CONFIG_NAME)
        return tell_pushed(registry.push(source, task, level, bos), as_json)


def import_paper(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="best.pth, or its like.")],
    model: Annotated[str, typer.Option("--model", help="The dense model: a folder, or a name that was pulled.")],
    level: Annotated[str, typer.Option("--level", help="Level it was learned at: dense, w3g64, …")],
    task: TaskName = None,
    bos: Bos = "none",
    out: Out = None,
    force: Force = False,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Bring in a prompt that the paper's code saved (Compress, Then Prompt). Nothing in the file is run."""
    if out is None and task is None:
        raise CommandError("say --task to push it to a registry, or --out to write a file", usage=True)
    from cli.paper import paper_prompt

    made = paper_prompt(file, model, task, level, bos or "none")
    if out is not None:
        return _save(made, out, force, as_json)
    with open_registry(url, key, store, config, model) as registry:
        return _push(made, registry, as_json)


def export_peft(
    ref: Annotated[str, typer.Argument(metavar="REF", help="A prompt file, or a reference as for `show`.")],
    to: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write the adapter into.")],
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Name or path of the dense model, for AutoPeftModel; else its fingerprint."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="For a kv prompt: its base, a folder or a name that was pulled.")
    ] = None,
    force: Force = False,
    level: OnlyLevel = None,
    base: OnlyBase = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Write a prompt as a PEFT adapter: PROMPT_TUNING, or PREFIX_TUNING for a kv prompt."""
    from prompts_store.file import read_prompt
    from prompts_store.peft import WEIGHTS_NAME, write_peft

    check_free(to / WEIGHTS_NAME, force)
    if Path(ref).is_file():
        file = read_prompt(Path(ref))
    else:
        with open_registry(url, key, store, config) as registry:
            version = pick(registry, ref, level, base)
            file = read_prompt(registry.content(version["task"], version["version"]))
    rotate = _rotate_for(ref, file, model) if file.prompt.kind == "kv" else None
    write_peft(to, file, base_model=base_model or file.prompt.base, rotate=rotate)
    tell({"folder": str(to), **_described(file)}, as_json)


def add_to(app: typer.Typer) -> None:
    """The commands of this module."""
    app.command("from-text")(from_text)
    app.command("import-peft")(import_peft)
    app.command("import-paper")(import_paper)
    app.command("export-peft")(export_peft)


def _adapter(directory: Path, task: str | None, level: str | None, bos: Any, model: str | None) -> PromptFile:
    """The adapter as a prompt file, with the task and level that were given."""
    from dataclasses import replace

    from cli.local import limits_of
    from prompts_store.peft import read_peft_directory

    limits = limits_of(model)
    unrotate = None
    if model is not None:
        from cli.model import find_model
        from cli.prefix import turns

        _, unrotate = turns(find_model(model))
    file = read_peft_directory(directory, limits, default_base=limits.base, bos=bos, unrotate=unrotate)
    origin = file.provenance
    return replace(file, provenance=replace(origin, task=task or origin.task, level=level or origin.level))


def _rotate_for(ref: str, file: PromptFile, model: str | None) -> Turn:
    """How this model turns keys. Raises CommandError, ModelError."""
    from cli.local import limits_of
    from cli.model import find_model
    from cli.prefix import turns

    if model is None:
        message = f"{ref} is a kv prompt, and PREFIX_TUNING holds keys after RoPE: say --model, its base"
        raise CommandError(message, usage=True)
    if (base := limits_of(model).base) != file.prompt.base:
        raise CommandError(f"--model {model} is of base {base}, {ref} belongs to {file.prompt.base}", usage=True)
    return turns(find_model(model))[0]


def _push(file: PromptFile, registry: Registry, as_json: bool) -> None:
    """A file whose provenance names its task."""
    from prompts_store.file import write_prompt

    assert file.provenance.task is not None
    with tempfile.TemporaryDirectory() as scratch:
        source = Source(Path(scratch) / "prompt.safetensors")
        write_prompt(source.weights, file)
        tell_pushed(registry.push(source, file.provenance.task, None, None), as_json)


def _save(file: PromptFile, out: Path, force: bool, as_json: bool) -> None:
    from prompts_store.file import write_prompt

    check_free(out, force)
    write_prompt(out, file)
    tell({"file": str(out), **_described(file)}, as_json)


def _described(file: PromptFile) -> dict[str, Any]:
    prompt, origin = file.prompt, file.provenance
    return {
        "digest": prompt.digest,
        "kind": prompt.kind,
        "base": prompt.base,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "hidden_size": prompt.hidden_size,
        "bos": prompt.bos,
        "task": origin.task,
        "level": origin.level,
    }
