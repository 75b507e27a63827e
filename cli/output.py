"""What a person or a script reads: results on stdout, as a table or as JSON; progress and errors on stderr.

Knows no command and no registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DIGEST_SHOWN = 19  # `sha256:` and twelve digits, enough to tell two apart in a table

Steps = Callable[[str, int, int], None]  # step, done, in all (0 = unknown)


class CommandError(Exception):
    """A command cannot go on. The message is one line and says what to do; `usage` where the command line is wrong."""

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.exit_code = 2 if usage else 1


def complain(message: str) -> None:
    """One line for each line of the message, on stderr."""
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)


def say(line: str) -> None:
    """A line on stdout."""
    typer.echo(line)


def tell_json(value: Any) -> None:
    """The document of --json."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def tell(value: Mapping[str, Any], as_json: bool) -> None:
    """One thing: a line for each field that is set."""
    if as_json:
        return tell_json(value)
    shown = {name.replace("_", " "): _shown(field) for name, field in value.items() if field not in (None, [])}
    width = max(map(len, shown))
    for name, text in shown.items():
        say(f"{name:<{width}}  {text}")
    return None


def tell_list(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool, nothing: str) -> None:
    """Many things: a table of these columns, in JSON all fields. `nothing` is said in place of an empty table."""
    if as_json:
        return tell_json({"object": "list", "data": list(rows)})
    if not rows:
        return say(nothing)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_short(row.get(name)) for name in columns))
    return _stdout().print(table)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Steps]:
    """A bar that follows what is reported to it, from any thread, and goes away. Silent where no one watches."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def report(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total or None)

        yield report


def _stdout() -> Console:
    """Wide where nobody looks, so that a script reads whole lines; made anew, because tests replace stdout."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 4096
    return console


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    text = _shown(value)
    return text[:DIGEST_SHOWN] if text.startswith("sha256:") else text


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | bool) else str(value)


def words_of(text: str) -> str:
    """The argument, or what stands on standard input. Raises CommandError where it is no UTF-8."""
    given = typer.get_binary_stream("stdin").read() if text == "-" else text.encode(errors="surrogateescape")
    try:
        return given.decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"the text is not UTF-8 (byte {error.start}); convert it first", usage=True) from error
