"""`promptstitch report`: what the runs and the registry hold, as one HTML page and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Config, Key, Url
from cli.output import AsJson, CommandError, tell

Runs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[RUNS]…",
        help="Folders that hold run folders of recover, matrix, learn, compress, …",
        show_default="runs",
    ),
]
RUNS = Path("runs")
Store = Annotated[
    str | None, typer.Option("--store", metavar="DIR", help="Store whose measurements are reported, too.")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for results.html and results.md.")]
Original = Annotated[
    Path | None,
    typer.Option("--original", metavar="FILE", help="The file the dense model came from (.gguf, .whl), for its size."),
]


def report(
    runs: Runs = None,
    out: Out = Path("results"),
    store: Store = None,
    original: Original = None,
    url: Url = None,
    key: Key = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Write results.html, which needs no other file, and results.md with the same numbers.

    Shown are compressions, learning, evaluations (run folders, or what `evaluate --json` printed, kept as FILE.json)
    and transfer, each figure with its interval, seeds, digests and command. What is missing is said to be.
    """
    from cli.measured import opened
    from lab.disk import write_bytes
    from lab.report.evidence import gather
    from lab.report.report import page_of
    from lab.report.sizes import original_bytes
    from lab.report.write import html, markdown

    size = None if original is None else (original.name, original_bytes(original))
    with opened(url, key, store, config, needed=store is not None) as registry:
        usual = [] if registry is not None and not RUNS.is_dir() else [RUNS]
        evidence = gather(runs or usual, registry)
    if not evidence.records and not evidence.measured:
        raise CommandError("there is nothing to report: no run folder, no evaluation and no measurement; name RUNS")
    page = page_of(evidence, size)
    written = {out / "results.html": html(page), out / "results.md": markdown(page)}
    for file, text in written.items():
        write_bytes(file, text.encode())
    told = {
        "files": [str(file) for file in written],
        "runs": len(evidence.records),
        "measurements": len(evidence.measured),
        "left_out": [f"{name}: {why}" for name, why in evidence.unusable],
    }
    tell(told, as_json)
