"""`promptstitch matrix`: a whole table of runs as one command that can be stopped and started again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.learn import DataRoot
from cli.output import AsJson, CommandError, say, tell_json, tell_list

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file: levels x kinds x recipes x tasks x seeds.")]
Root = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="Folder of all of it. Else runs/NAME of the file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what each cell will take, and start none.")]
Only = Annotated[str | None, typer.Option("--only", metavar="CELL", help="Just this one, as --dry-run names it.")]
Speed = Annotated[
    float | None,
    typer.Option("--tokens-per-second", min=0.001, help="Of learning, for --dry-run; else measured by a product."),
]
Limit = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Tell what fits: 24GB, 16GiB.")]
DeviceName = Annotated[str | None, typer.Option("--device", help="In place of the table's.")]

ESTIMATED = ("cell", "finished", "tokens", "minutes", "peak", "fits")
FOUND = ("cell", "state", "loss", "dense", "without", "perplexity", "share", "kl_share", "error")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(GB|GiB|MB|MiB)")
_BYTES = {"GB": 10**9, "GiB": 1 << 30, "MB": 10**6, "MiB": 1 << 20}


def matrix(
    table: Config,
    root: Root = None,
    dry_run: DryRun = False,
    only: Only = None,
    tokens_per_second: Speed = None,
    memory: Limit = None,
    device: DeviceName = None,
    data_root: DataRoot = None,
    as_json: AsJson = False,
) -> None:
    """Run every cell of a table: compress, learn, select, report. What is finished is not done again.

    A cell that fails is told and does not stop the others; the exit code is then 1.
    """
    from cli.model import find_model
    from lab.disk import write_json
    from lab.matrix import Matrix, estimated, run
    from lab.progress import progress
    from lab.table import read_table

    for name, value in (("--memory", memory), ("--tokens-per-second", tokens_per_second)):
        if value is not None and not dry_run:
            raise CommandError(f"{name} is of use with --dry-run only", usage=True)
    told = read_table(table)
    told = told if device is None else replace(told, device=device)
    whole = Matrix(told, find_model(told.model), root or Path("runs") / table.stem, data_root)
    if dry_run:
        return _show_estimates(estimated(whole, only, _bytes(memory), tokens_per_second), as_json)
    found = []
    with progress(quiet=as_json) as report:
        for each in run(whole, only, report):
            found.append(each)
            if not as_json:
                say(_line(each))
    if only is None:
        write_json(whole.root / "matrix.json", {"cells": found})
    if as_json:
        tell_json({"root": str(whole.root), "cells": found})
    else:
        tell_list([_shown(each) for each in found], FOUND, False, "no cells")
    if failed := sum(each["state"] == "failed" for each in found):
        raise CommandError(f"{failed} of {len(found)} cells failed; start the same command again once that is mended")
    return None


def _show_estimates(found: list[dict[str, Any]], as_json: bool) -> None:
    left = [each for each in found if not each["finished"]]
    whole = {"tokens": sum(each["tokens"] for each in left), "seconds": sum(each["seconds"] for each in left)}
    if as_json:
        return tell_json({"cells": found, "left": whole})
    rows = [
        {**each, "minutes": f"{each['seconds'] / 60:.1f}", "peak": f"{each['memory']['peak'] / 1e9:.2f} GB"}
        for each in found
    ]
    tell_list(rows, ESTIMATED, False, "no cells")
    return say(f"left: {len(left)} cells, {whole['tokens']:,} tokens, about {whole['seconds'] / 3600:.1f} hours")


def _line(each: Mapping[str, Any]) -> str:
    return f"{each['cell']}: {each['state']}" + (f": {each['error']}" if "error" in each else "")


def _shown(each: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in each.items()}


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise CommandError(f"--memory is a size such as 24GB or 16GiB, got {text!r}", usage=True)
    return round(float(match[1]) * _BYTES[match[2]])
