"""Options that commands share, and the server's settings as options of a command.

Defaults, bounds and meanings are those of `server.settings`, written there once: an option that is not given stays
None, and the settings look it up in the environment and in the TOML file.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from server.settings import Settings

MAX_SEED = 2**63 - 1  # what generators take
REGISTRY = "Registry"
Url = Annotated[
    str | None,
    typer.Option("--url", envvar="PROMPTSTITCH_URL", help="Server whose registry is meant.", rich_help_panel=REGISTRY),
]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="PROMPTSTITCH_API_KEY", help="API key for --url.", rich_help_panel=REGISTRY),
]
Store = Annotated[
    str | None,
    typer.Option("--store", help="Local store: folder or SQLAlchemy URL.", rich_help_panel=REGISTRY),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", envvar="PROMPTSTITCH_CONFIG", help="TOML file of settings.", metavar="FILE"),
]

Panels = Mapping[str, Iterable[str]]  # title -> names of settings
Command = Callable[..., None]


def takes_settings(panels: Panels, **changes: Any) -> Callable[[Command], Command]:
    """Give a command one option for each of these settings, in this order, passed as keyword `flags`.

    `changes` replaces what the help shows as the default of a setting.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        options = [
            _parameter(name, Settings.model_fields[name], panel, changes.get(name))
            for panel, names in panels.items()
            for name in names
        ]
        parameters = [*own, *options]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")


def with_flags(fault: str) -> str:
    """A fault of the settings, `name: …` or `name (PROMPTSTITCH_NAME): …`, with the option in place of the name."""
    name = fault.partition(":")[0].partition(" ")[0]
    return flag(name) + fault.removeprefix(name) if name in Settings.model_fields else fault


def _parameter(name: str, field: FieldInfo, panel: str, default: str | None) -> inspect.Parameter:
    kind = _kind(field.annotation)
    shown = default if default is not None else _default(field)
    names = [flag(name)]
    if kind is bool and field.default is True:
        names = [f"{flag(name)}/--no-{name.replace('_', '-')}"]
    option = typer.Option(
        *names,
        help=(field.description or "") + (f" [dim]\\[{shown}][/dim]" if shown else ""),
        show_default=False,
        metavar=None if kind is bool else _metavar(kind),
        rich_help_panel=panel,
    )
    many = get_origin(kind) is tuple
    annotation: Any = bool if kind is bool else list[str] if many else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
    )


def _kind(annotation: Any) -> Any:
    """The type without `None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _kind(next(part for part in get_args(annotation) if part is not type(None)))
    return _kind(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _metavar(kind: Any) -> str:
    """What people write, in a word."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return "FILE" if get_args(kind)[0] is Path else "NAME"
    return {"int": "N", "float": "NUMBER", "Path": "DIR", "ByteSize": "BYTES"}.get(kind.__name__, "TEXT")


def _default(field: FieldInfo) -> str:
    default = field.default
    if default in (None, (), False, True):
        return ""
    if hasattr(default, "human_readable"):
        return str(default.human_readable()).replace(".0", "")
    home = str(Path.home())
    text = f"{default:g}" if isinstance(default, float) else str(default)
    return text.replace(home, "~", 1) if text.startswith(home) else text
