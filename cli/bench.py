"""`promptstitch bench`: a load on a server that speaks OpenAI's HTTP, ours or another's, and what it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.output import AsJson, CommandError, tell, tell_list

if TYPE_CHECKING:
    from bench.forms import Form
    from bench.load import Pace
    from bench.workload import Workload
    from lab.progress import Report

COLUMNS = (
    "concurrency",
    "output_tokens_per_second",
    "requests_per_second",
    "ttft_p50",
    "ttft_p99",
    "itl_p50",
    "errors",
)
ONE_BY_ONE = (
    "--ttft asks one at a time for two tokens: leave --concurrency, --rate, --zipf, --max-tokens, --least-tokens and "
    "--no-stream out"
)
Model = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="Checkpoint folder or pulled name: its tokenizer measures the texts.")
]
Url = Annotated[str, typer.Option(help="Server, without /v1.")]
Name = Annotated[
    str, typer.Option("--model", metavar="NAME", help="The bare model is called so there; else as MODEL is served.")
]
Prompts = Annotated[str, typer.Option(metavar="NAMES", help="Prompts (`model` names), taken in turns: general,task@2.")]
FormName = Annotated[
    Literal["named", "prefix", "embeds"],
    typer.Option(help="A prompt is asked for by `model`, as a cached text of 64 tokens, or as vectors in the request."),
]
PromptDir = Annotated[Path | None, typer.Option(metavar="DIR", help="For embeds: {prompt}.safetensors of each.")]
Concurrency = Annotated[
    str | None, typer.Option(metavar="N,N,…", help="Requests at a time; several are measured in turn.  [32]")
]
Rate = Annotated[float | None, typer.Option(help="Requests a second by the clock (Poisson), not --concurrency.")]
HangUp = Annotated[float, typer.Option(min=0.0, max=1.0, help="With --rate: share of clients that leave midway.")]
Zipf = Annotated[float, typer.Option(help="Prompts by rank r with probability ~ 1 / r^ZIPF, not in turns.")]
Corpus = Annotated[Path | None, typer.Option(help="Text file to cut from; without: random words.")]
Ttft = Annotated[bool, typer.Option("--ttft", help="Compare first tokens with and without a warm prompt.")]
Key = Annotated[str | None, typer.Option(envvar="PROMPTSTITCH_API_KEY", help="Bearer key.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw throughput and TTFT over --concurrency (.svg).")]


def bench(
    checkpoint: Model = "smollm2-135m",
    url: Url = "http://127.0.0.1:8000",
    model: Name = "",
    prompts: Prompts = "",
    form: FormName = "named",
    prompt_dir: PromptDir = None,
    requests: int = 96,
    concurrency: Concurrency = None,
    rate: Rate = None,
    hang_up: HangUp = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Of each answer.  [64]")] = None,
    least_tokens: Annotated[int | None, typer.Option(help="Fewest of an answer; else --max-tokens.")] = None,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest text.")] = 32,
    longest: Annotated[int, typer.Option(help="Tokens of the longest text.")] = 128,
    zipf: Zipf = 0.0,
    corpus: Corpus = None,
    seed: Annotated[int, typer.Option(help="Another seed, other texts: no prefix cache has seen them.")] = 0,
    stream: bool = True,
    ttft: Ttft = False,
    key: Key = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Put a load on a server: texts of random lengths, answered greedily to exactly so many tokens.

    Only whole answers count. Exits 1 if a request failed.
    """
    from bench.load import Pace
    from bench.workload import Workload
    from cli.model import find_model
    from llama.load import info

    wrong = (
        (hang_up and rate is None, "--hang-up is for a load by the clock: give --rate"),
        (concurrency and rate is not None, "--rate goes by the clock: leave --concurrency out"),
        (ttft and not prompts, "--ttft compares with a prompt: give --prompts"),
        (zipf and not prompts, "--zipf is about prompts: give --prompts"),
        (ttft and (concurrency or rate or zipf or max_tokens or least_tokens or not stream), ONE_BY_ONE),
        (plot and (ttft or rate), "--plot draws what --concurrency changes: leave --rate and --ttft out"),
        (prompt_dir and form != "embeds", "--prompt-dir is for --form embeds"),
    )
    for fault in (message for holds, message in wrong if holds):
        raise CommandError(fault, usage=True)
    folder = find_model(checkpoint)
    names: tuple[str | None, ...] = tuple(prompts.split(",")) if prompts else (None,)
    shape = Workload(requests, 1, max_tokens or 64, least_tokens, shortest, longest, names, zipf, seed)
    asked = _form(form, model or info(folder).identity.name, folder, prompt_dir)
    target = _Target(url, key, asked, folder, corpus, stream, ttft)
    rows = [
        _measured(target, replace(shape, seed=seed + i), Pace(many, rate, hang_up, seed=seed), as_json)
        for i, many in enumerate(_numbers(concurrency or "32"))
    ]
    if len(rows) > 1:
        tell_list(rows, COLUMNS, as_json, "nothing was measured")
    else:
        tell(rows[0], as_json)
    if plot:
        _draw(plot, rows)
    raise typer.Exit(any(row["errors"] for row in rows))


def _numbers(several: str) -> list[int]:
    numbers = [int(each) for each in several.split(",") if each.isdigit() and int(each)]
    if len(numbers) != len(several.split(",")):
        raise CommandError(f"--concurrency {several}: give whole numbers above 0, with commas between", usage=True)
    return numbers


@dataclass(frozen=True)
class _Target:
    """Where a load goes, and what of it stays the same."""

    url: str
    key: str | None
    form: Form
    checkpoint: Path
    corpus: Path | None
    stream: bool
    ttft: bool


def _measured(target: _Target, shape: Workload, pace: Pace, quiet: bool) -> dict[str, Any]:
    from bench.load import first_tokens, run
    from bench.workload import load_tokenizer
    from lab.progress import progress

    try:
        jobs = shape.jobs(load_tokenizer(target.checkpoint), target.corpus)
    except ValueError as error:
        raise CommandError(f"{error} (--corpus)") from error
    with progress(quiet=quiet) as report:
        if target.ttft:
            answered = partial(_answered, report, "first tokens", count(1), 2 * len(jobs))
            return first_tokens(target.url, jobs, target.form, key=target.key, answered=answered).as_json()
        sent = {"concurrency": pace.concurrency} if pace.rate is None else {"rate": pace.rate}
        answered = partial(_answered, report, ", ".join(f"{name} {x}" for name, x in sent.items()), count(1), len(jobs))
        figures = run(target.url, jobs, target.form, pace, stream=target.stream, key=target.key, answered=answered)
    return sent | figures.as_json()


def _answered(report: Report, step: str, done: Iterator[int], total: int) -> None:
    report(step, next(done), total)


def _form(name: str, model: str, checkpoint: Path, prompts: Path | None) -> Form:
    from bench import forms
    from bench.workload import load_tokenizer

    if name == "named":
        return forms.named(model)
    if name == "prefix":
        return forms.text_prefix(model, load_tokenizer(checkpoint))
    if prompts is None:
        raise CommandError("--form embeds reads the vectors from --prompt-dir", usage=True)
    return forms.prompt_embeds(model, load_tokenizer(checkpoint), checkpoint, prompts)


def _draw(file: Path, rows: list[dict[str, Any]]) -> None:
    from bench.plots import Panel, draw

    def points(name: str) -> list[tuple[float, float]]:
        return [(row["concurrency"], row[name]) for row in rows if row[name] is not None]

    try:
        draw(
            file,
            [
                Panel("requests at a time", "tokens/s", {"throughput": points("output_tokens_per_second")}),
                Panel("requests at a time", "ms", {"first token, p50": points("ttft_p50"), "p99": points("ttft_p99")}),
            ],
        )
    except ImportError as error:
        raise CommandError("--plot needs matplotlib: pip install 'promptstitch[lab]'") from error
