"""`promptstitch pull`: bring a checkpoint onto this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.output import AsJson, progress, tell

Name = Annotated[str, typer.Argument(help="smollm2-135m, a Hub repository (org/name), a folder or a .gguf file.")]
To = Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Where to; else the user's data folder.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repository.")]
Base = Annotated[
    str, typer.Option("--base", help="Fingerprint of the dense model, for a quantised checkpoint that does not tell.")
]


def pull(name: Name, to: To = None, revision: Revision = None, base: Base = "", as_json: AsJson = False) -> None:
    """Fetch a checkpoint, check it and write its manifest. What is there already stays as it is."""
    from cli.info import describe
    from cli.model import fetch
    from llama.identity import UNKNOWN_BASE, names_itself

    with progress(quiet=as_json) as steps:
        folder = fetch(name, to, steps, revision, base)
    notes = [UNKNOWN_BASE] if not base and names_itself(folder) else []
    tell(describe(folder) | {"notes": notes}, as_json)
