"""`promptstitch answers`: a model's own answers to questions, as chats to learn a prompt from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import MAX_SEED, Config, takes_settings
from cli.output import AsJson, CommandError, tell

PANELS = {"Model": ("level", "dtype", "compute", "device", "base", "kv_memory")}
Model = Annotated[str, typer.Argument(help="Whose answers: as a rule the dense model, a folder or a name.")]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="FILE|NAME",
        help="Questions: JSON lines with text, prompt or messages, or a name: piqa/questions. Repeat for more.",
    ),
]
Take = Annotated[
    int | None, typer.Option("--take", min=1, metavar="N", help="Take N questions of each at random; else all.")
]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the chats go, as JSON lines.")]
System = Annotated[str | None, typer.Option("--system", help="A system's message before each; else the template's.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, help="An answer that has not ended by then is left out.")
]
Temperature = Annotated[float, typer.Option("--temperature", min=0, max=2, help="0 is greedy.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", min=0.1, max=10, help="1 is none.")]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=MAX_SEED, help="Which questions are taken, and how answers are drawn."),
]
RunFolder = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Run folder; one cut short goes on. Else OUT.run.")
]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", metavar="DIR", help="Folder to look in first for named data.")
]


@takes_settings(PANELS)
def answers(
    model: Model,
    data: Data,
    out: Out,
    take: Take = None,
    system: System = None,
    max_tokens: MaxTokens = 160,
    temperature: Temperature = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    run: RunFolder = None,
    data_root: DataRoot = None,
    config: Config = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Answer questions with a model, and keep whole answers as chats: data for `learn` and `recover`."""
    from cli.model import find_model, start_engine, to_serve
    from engine.request import SamplingParams
    from lab.answers import answer, questions, settings, write
    from lab.data.documents import DataError, question
    from lab.data.named import documents
    from lab.progress import progress
    from lab.run import open_run
    from server.settings import load_settings

    try:
        asked = [each for name in data for each in questions(documents(name, data_root, question), take, seed, system)]
    except DataError as error:
        raise CommandError(f"--data: {error}") from error
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, repetition_penalty=repetition_penalty, seed=seed
    )
    folder = run or out.with_name(f"{out.name}.run")
    flags["model"] = str(find_model(model))  # as it is stored, whatever `serve` makes of the name
    with progress(quiet=as_json) as report:
        engine = start_engine(*to_serve(load_settings(config, **flags, kv_disk=0), report), report)
        try:
            with open_run(folder, settings(asked, params, engine.info), seed) as kept:
                write(asked, answer(asked, engine, params, kept, report), out)
                told = {"file": str(out), "run": str(folder), **kept.figures}
        finally:
            engine.close()
    tell(told, as_json)
