"""The command `promptstitch`: its subcommands, and how whatever goes wrong in one leaves the process.

Exit codes: 0, 1 for a failure, 2 for a command line or settings that do not hold. Commands import what they need when
they run, so that --help is quick.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from cli import (
    answers,
    bench,
    compress,
    convert,
    evaluate,
    generate,
    info,
    keys,
    learn,
    matrix,
    prompts,
    pull,
    recover,
    report,
    serve,
    transfer,
)
from cli.options import with_flags
from cli.output import CommandError, complain

# The option that helps, by the code of an error of the registry, which knows of no options.
OPTIONS = {"base_unknown": "--model", "level_unknown": "--level", "level_mismatch": "--level", "bos_mismatch": "--bos"}


class Commands(TyperGroup):
    """The group of all commands: what one of them raises on purpose becomes lines on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises typer.Exit."""
        try:
            return super().invoke(ctx)
        except CommandError as error:
            complain(str(error))
            raise typer.Exit(error.exit_code) from error
        except Exception as error:
            message, code = explain(error)
            complain(message)
            raise typer.Exit(code) from error


def explain(error: Exception) -> tuple[str, int]:
    """The lines and the exit code of an error of the packages below. Raises it again if it is none of theirs."""
    from prompts_store.errors import NO_ROOM, BadKey, BadLevel, BadReference, InvalidArtifact, StoreError
    from server.settings import SettingsError

    if isinstance(error, SettingsError):
        return "\n".join(with_flags(fault) for fault in error.faults), 2
    if isinstance(error, StoreError):
        hint = f" ({OPTIONS[error.code]})" if error.code in OPTIONS else ""
        return error.message + hint, 2 if isinstance(error, BadKey | BadLevel | BadReference | InvalidArtifact) else 1
    if isinstance(error, OSError) and (error.filename is not None or error.errno in NO_ROOM):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", 1
    from lab.data.documents import DataError
    from lab.errors import RunError
    from llama.errors import ModelError

    if isinstance(error, ModelError | DataError | RunError):
        return str(error).replace("\n", " "), 1
    raise error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Serve a compressed LLaMA with the right learned soft prompt stitched in front of every request.",
)
app.command()(pull.pull)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(info.info)
app.command()(compress.compress)
app.command()(evaluate.evaluate)
app.command()(answers.answers)
app.command()(learn.learn)
app.command()(recover.recover)
app.command()(matrix.matrix)
app.command()(transfer.transfer)
app.command()(report.report)
app.command()(bench.bench)
convert.add_to(prompts.app)
app.add_typer(prompts.app, name="prompts")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """The entry point."""
    app()
