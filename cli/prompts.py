"""`promptstitch prompts`: look into a registry and change it. `convert.py` makes prompts out of other things."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.options import Config, Key, Store, Url
from cli.output import AsJson, CommandError, say, tell, tell_json, tell_list
from cli.registry import Source, open_registry, pick, pick_alias
from prompts_store.reference import parse_reference

app = typer.Typer(no_args_is_help=True, help="Soft prompts: write, import, push, pull, list, alias, remove.")

Ref = Annotated[str, typer.Argument(metavar="REF", help="task, task@3, task:alias or task@sha256:…")]
TaskName = Annotated[str | None, typer.Option("--task", help="Task to file it under; else what the file says.")]
Level = Annotated[
    str | None, typer.Option("--level", help="Level it was learned at, where the file does not say: dense, w3g64, …")
]
OnlyLevel = Annotated[str | None, typer.Option("--level", help="Only what belongs to this level.")]
OnlyBase = Annotated[str | None, typer.Option("--base", help="Only what belongs to this base (digest).")]
Bos = Annotated[
    Literal["tokenizer", "none", "after_prompt"] | None,
    typer.Option("--bos", help="Place of a BOS, where the file does not say."),
]
Binding = Annotated[
    str | None,
    typer.Option("--model", help="Model to bind a file that names no base to (a server binds to its own)."),
]
TASKS = ("task", "versions", "latest", "levels", "updated_at")
MEASUREMENTS = ("metric", "value", "split", "gain", "gain_low", "gain_high", "served_level", "scored_tokens", "dataset")
VERSIONS = ("version", "level", "digest", "kind", "num_virtual_tokens", "aliases", "uploaded_at", "uploaded_by")


@app.command("list")
def list_prompts(
    task: Annotated[str | None, typer.Argument(help="List the versions of this task, else all tasks.")] = None,
    level: OnlyLevel = None,
    base: OnlyBase = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """List tasks, or the versions of one."""
    with open_registry(url, key, store, config) as registry:
        if task is None:
            return tell_list(registry.tasks(level, base), TASKS, as_json, "no prompts; `promptstitch prompts push`")
        found = registry.task(task, level, base)
    rows = [{**version, "aliases": _aliases(version, found.aliases)} for version in found.versions]
    return tell_list(rows, VERSIONS, as_json, f"task {task} has no versions here")


@app.command()
def show(
    ref: Ref,
    level: OnlyLevel = None,
    base: OnlyBase = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show one version."""
    with open_registry(url, key, store, config) as registry:
        version = pick(registry, ref, level, base)
        aliases = registry.task(version["task"], level, base).aliases
    tell({**version, "aliases": _aliases(version, aliases)}, as_json)


@app.command()
def measurements(
    ref: Ref,
    level: OnlyLevel = None,
    base: OnlyBase = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """List what was measured of a version, oldest first."""
    with open_registry(url, key, store, config) as registry:
        version = pick(registry, ref, level, base)
        found = registry.measurements(version["task"], version["version"])
    tell_list(found, MEASUREMENTS, as_json, f"{version['task']}@{version['version']} was never measured")


@app.command()
def push(
    file: Annotated[Path, typer.Argument(exists=True, help="A prompt file (safetensors).")],
    task: TaskName = None,
    level: Level = None,
    bos: Bos = None,
    model: Binding = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Put a prompt file into the registry, as a new version of its task."""
    if file.is_dir():
        raise CommandError(f"{file} is a folder; an adapter comes in by `promptstitch prompts import-peft`", usage=True)
    task = task or _task_of(file)
    with open_registry(url, key, store, config, model) as registry:
        tell_pushed(registry.push(Source(file), task, level, bos), as_json)


@app.command()
def pull(
    ref: Ref,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Else TASK-VERSION.safetensors.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    level: OnlyLevel = None,
    base: OnlyBase = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Write a version to a prompt file."""
    from prompts_store.file import read_prompt, write_whole

    with open_registry(url, key, store, config) as registry:
        version = pick(registry, ref, level, base)
        target = to or Path(f"{version['task']}-{version['version']}.safetensors")
        check_free(target, force)
        content = registry.content(version["task"], version["version"])
    if (digest := read_prompt(content).prompt.digest) != version["digest"]:
        raise CommandError(f"what came is {digest}, not {version['digest']}; nothing was written")
    write_whole(target, content)
    tell(
        {"file": str(target), "digest": version["digest"], "task": version["task"], "version": version["version"]},
        as_json,
    )


@app.command()
def alias(
    ref: Ref,
    name: Annotated[str, typer.Argument(help="`default` is what the bare task name means.")],
    require_gain: Annotated[
        bool, typer.Option("--require-gain", help="Only if a gain was measured on the weights that are served.")
    ] = False,
    level: OnlyLevel = None,
    base: OnlyBase = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version, within that version's level."""
    with open_registry(url, key, store, config) as registry:
        version = pick(registry, ref, level, base)
        put = registry.put_alias(version["task"], name, version["version"], require_gain)
    if as_json:
        return tell_json(put)
    verb = "new alias" if put["new"] else "moved"
    return say(f"{verb} {put['task']}:{put['alias']} at {put['level']} -> {put['task']}@{put['version']}")


@app.command()
def rm(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="task@3 or task@sha256:… (a version), task:name (an alias).")
    ],
    level: OnlyLevel = None,
    base: OnlyBase = None,
    url: Url = None,
    key: Key = None,
    store: Store = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Delete a version for good, or take an alias away."""
    reference = parse_reference(ref)
    if not (reference.explicit or reference.alias):
        raise CommandError(f"{ref} names a whole task; say which version (task@3) or alias (task:name)", usage=True)
    with open_registry(url, key, store, config) as registry:
        if reference.alias:
            gone = pick_alias(registry, reference, level, base)
            registry.delete_alias(gone)
        else:
            gone = pick(registry, ref, level, base)
            registry.delete(gone["task"], gone["version"])
    if as_json:
        return tell_json({**gone, "deleted": True})
    return say(f"deleted {reference}" + (f" at {gone['level']}" if reference.alias else ""))


def tell_pushed(answer: dict[str, Any], as_json: bool) -> None:
    """What became of a push."""
    if as_json:
        return tell_json(answer)
    verb = "pushed" if answer["new"] else "was there already:"
    bound = ", bound to the served base" if answer["base_bound"] else ""
    size = f"{answer['num_virtual_tokens']} positions, {answer['kind']}"
    return say(f"{verb} {answer['task']}@{answer['version']} at {answer['level']} ({size}{bound})\n{answer['digest']}")


def check_free(target: Path, force: bool) -> None:
    """Raises CommandError if there is something at `target` that must not be replaced."""
    if target.exists() and not force:
        raise CommandError(f"{target} is there already; --force replaces it", usage=True)


def _aliases(version: dict[str, Any], aliases: Any) -> list[str]:
    return sorted({alias["alias"] for alias in aliases if alias["version"] == version["version"]})


def _task_of(file: Path) -> str:
    """The task that a prompt file names, whatever else it holds. Raises CommandError, InvalidArtifact."""
    from prompts_store.header import read_header

    with file.open("rb") as stream:
        task = read_header(stream, file.stat().st_size).metadata.get("task")
    if task is None:
        raise CommandError(f"{file} names no task; say --task", usage=True)
    return task
