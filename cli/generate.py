"""`promptstitch generate`: continue one text, by a server or by a model loaded for it, and print it as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from cli.options import Config, Key, Url, flag, takes_settings
from cli.output import AsJson, CommandError, progress, tell_json, words_of
from cli.registry import Answer

PANELS = {
    "Without a server": ("model", "level", "dtype", "device", "base", "store", "blobs", "kv_memory"),
    "Prompt": ("resolution",),
}
Text = Annotated[str, typer.Argument(help="Text to continue, or - to read it from standard input.")]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="REF", help="task, task@3, task:alias or task@sha256:…", rich_help_panel="Prompt"),
]
SoftTokens = Annotated[
    int | None,
    typer.Option(
        "--soft-tokens",
        min=1,
        metavar="N",
        help="Use the first N positions of the prompt alone.",
        rich_help_panel="Prompt",
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Send the text as a chat message, through the chat template.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0, max=2, help="0 is greedy; else 1.")]
TopP = Annotated[float | None, typer.Option("--top-p", min=0, max=1, help="Mass of the tokens to choose from.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeat for more (at most 16).")]


@takes_settings(PANELS)
def generate(
    text: Text,
    task: Task = None,
    soft_tokens: SoftTokens = None,
    chat: Chat = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    url: Url = None,
    key: Key = None,
    config: Config = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Continue a text behind a task's soft prompt."""
    words = words_of(text)
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if url is None:
        from cli.answer import answer
        from server.settings import load_settings

        _check(sampling)
        if flags.get("resolution") is not None and task is None:
            raise CommandError("--resolution is of use with --task only", usage=True)
        settings = load_settings(config, **flags)
        with progress(quiet=as_json) as steps:
            events = answer(settings, words, chat, task, soft_tokens, sampling, steps)
            return _print(events, as_json)
    from cli.remote import RemoteRegistry, client

    resolution = flags.pop("resolution")
    if given := [flag(name) for name, value in flags.items() if value is not None]:
        raise CommandError(f"{given[0]} is for a model loaded here; leave it out, or leave --url out", usage=True)
    body = {"messages": [{"role": "user", "content": words}]} if chat else {"text": words}
    named = {"prompt": task, "resolution": resolution, "soft_tokens": soft_tokens}
    body |= sampling | {name: value for name, value in named.items() if value is not None}
    with client(url, key) as http:
        return _print(RemoteRegistry(http).generate(body), as_json)


def _check(sampling: Mapping[str, Any]) -> None:
    """By the bounds of a server. Raises CommandError."""
    from pydantic import ValidationError

    from server.schemas.sampling import SamplingFields

    try:
        SamplingFields(**sampling)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise CommandError(f"--{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", usage=True) from error


def _print(events: Iterable[Answer], as_json: bool) -> None:
    """The text as it comes, then on stderr how it came about; or all of it as one document."""
    told: Answer = {"text": "", "finish_reason": None, "prompt": None, "usage": None}
    for event in events:
        if not as_json:
            typer.echo(event["text"], nl=False)
        told["text"] += event["text"]
        told |= {name: event[name] for name in ("finish_reason", "prompt", "usage") if event.get(name) is not None}
    if as_json:
        return tell_json(told)
    typer.echo()
    return typer.echo(_summary(told), err=True)


def _summary(told: Answer) -> str:
    found, usage = told["prompt"], told["usage"]
    prompt = f"{found['task']}@{found['version']} of {found['level']}, {found['resolution']}" if found else "no prompt"
    tokens = f"{usage['soft_tokens']} soft + {usage['text_tokens']} text -> {usage['completion_tokens']} tokens"
    return f"{prompt}; {tokens}; {told['finish_reason']}"
