"""docs/performance.md and its plots, made from what a race, a growth and the parts of a step left.

    python -m bench.page runs/race.json runs/growth.json runs/parts.json --out docs

No figure is typed in. Knows those files; measures nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.growth import AXES
from bench.plots import Panel, draw
from bench.verdict import beside

HEAD = """# Performance

Made by `python -m bench.page` from what `make race`, `bench.growth` and `bench.parts` measured; no figure was typed
in. What is even between the contestants and what is not is in [bench/README.md](../bench/README.md). A ratio is taken
within a round, in which all servers were up and took turns; the median, the lowest and the highest of the rounds are
shown. Each section is a run of its own, machine by machine, the latest of each first: what it measured anew counts
instead of what stands below for the same machine.
Where weights are not of one kind, *as dense* says what they cost: how often the next token is the dense model's,
behind cuts of texts that it wrote itself. Two servers of the same weights differ there at near ties alone.
"""
FIGURES = {  # figure -> heading
    "output_tokens_per_second": "tokens/s",
    "requests_per_second": "requests/s",
    "ttft_p50": "first token p50, ms",
    "ttft_p99": "p99, ms",
    "itl_p50": "between tokens p50, ms",
    "ratio": "first token, warm / none",
    "share": "next token as dense",
    "first_answer_seconds": "first answer, s",
    "beyond_model_mb": "memory beyond model, MB",
    "client_cpu": "client's cores",
    "others_cpu": "others' cores",
}
LIKE_DENSE = ("ours as dense", "beside as dense")
PLOTTED = (("output_tokens_per_second", "tokens/s"), ("ttft_p50", "first token p50, ms"))
Report = Mapping[str, Any]


def race(told: Report) -> Iterator[str]:
    """The claims, the medians, and what a reader needs to repeat them."""
    rounds = 1 + max(m["round"] for m in told["measured"])
    lines = ", ".join(dict.fromkeys(v["line"] for v in told["verdicts"]))
    yield f"\n## The race: {lines}\n\n{_machine(told['machine'])}, {rounds} rounds.\n"
    heads = ("line", "claim", "ours", "beside", "must be", "aim", "median", "lowest", "highest", "", *LIKE_DENSE)
    ends = {None: "not measured", True: "ok", False: "**missed**"}
    yield _table(
        heads,
        [
            (
                v["line"],
                v["what"],
                v["ours"],
                beside(v["peer"], v["absent"]),
                v["bound"],
                *map(short, _spread(v)),
                ends[v["ok"]],
                *_shares(v),
            )
            for v in told["verdicts"]
        ],
    )
    yield "\n### Medians\n"
    order = [load["name"] for load in told["loads"]]
    rows = sorted(told["medians"], key=lambda row: order.index(row["load"]))
    cells = [(row["load"], row["contestant"], *(short(row.get(name)) for name in FIGURES)) for row in rows]
    yield _table(("load", "contestant", *FIGURES.values()), cells)
    failed = [m for m in told["measured"] if m["figures"]["errors"]]
    wrong = [f"{m['contestant']}, {m['load']}: {m['figures']['errors']}" for m in failed]
    yield f"\nErrors: {'; '.join(wrong) or 'none'}.\n\n### Commands\n"
    yield "\n".join(f"- {c['name']} ({c['weights']}): `{_relative(c['command'])}`" for c in told["contestants"])
    yield f"\nPinned: {', '.join(each.split(' --hash')[0] for each in told['versions']['locked'])}.\n"


def growth(told: Report, folder: Path) -> Iterator[str]:
    """A pair of plots for each axis, and the points."""
    yield f"\n## How cost grows\n\n{_machine(told['machine'])}. Each point once, when a load like it was done.\n"
    for axis in AXES:
        points = [point for point in told["points"] if point["axis"] == axis.name]
        if not points:
            yield f"\n### {axis.label}\n\nNot measured.\n"
            continue
        draw(folder / f"{axis.name}.svg", [_panel(axis.label, points, *figure) for figure in PLOTTED])
        yield f"\n### {axis.label}\n\n![{axis.label}](performance/{axis.name}.svg)\n"
        names = dict.fromkeys(point["contestant"] for point in points)
        found = {(p["x"], p["contestant"]): p["figures"] for p in points}
        heads = (axis.label, *(f"{name}, {heading}" for name in names for _, heading in PLOTTED))
        yield _table(
            heads,
            [
                (f"{x:,}", *(short(found.get((x, name), {}).get(figure)) for name in names for figure, _ in PLOTTED))
                for x in dict.fromkeys(point["x"] for point in points)
            ],
        )


def parts(told: Report) -> Iterator[str]:
    """A table for each level: every part of a step beside its floor."""
    rates = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in told["rates"].items())
    yield f"""
## Where a step's time goes

{_machine(told["machine"])}. Decoding, every token sees {told["positions"]} positions. A floor is what it takes to read
a part's weights (or keys and values) once, or to multiply them, whichever takes longer, at the best rates that PyTorch
reaches here (thousand millions a second: {rates}; *read* in bytes, the others in operations of square products). Parts
are timed block by block; what is served is one call for all blocks, the last line.
"""
    for level in dict.fromkeys(part["level"] for part in told["parts"]):
        found = {(p["name"], p["sequences"]): p for p in told["parts"] if p["level"] == level}
        counts = list(dict.fromkeys(count for _, count in found))
        heads = ("part", *(f"{count} at once: {what}" for count in counts for what in ("ms", "floor, ms", "by")))
        yield f"\n### {level}\n"
        yield _table(
            heads,
            [
                (name, *(cell for count in counts for cell in _part(found[name, count])))
                for name in dict.fromkeys(name for name, _ in found)
            ],
        )


def _part(part: Report) -> tuple[str, str, str]:
    return short(part["took"]), short(part["floor"]), part["bound"]


def _panel(label: str, points: Sequence[Report], figure: str, heading: str) -> Panel:
    series: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point["figures"][figure] is not None:
            series.setdefault(point["contestant"], []).append((point["x"], point["figures"][figure]))
    return Panel(label, heading, series)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _spread(verdict: Report) -> Iterator[Any]:
    return (verdict[name] for name in ("aim", "median", "low", "high"))


def _shares(verdict: Report) -> Iterator[str]:
    """Empty where both are of one kind of weights."""
    for name in ("share", "peer_share"):
        value = verdict.get(name)
        yield "" if value is None else f"{value:.1%}"


def short(value: Any) -> str:
    """A figure with three digits that count."""
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _machine(machine: Report) -> str:
    memory = machine["memory_bytes"] / 2**30
    return f"{machine['cores']} cores of {machine['cpu']} ({machine['vector_flags']}), {memory:.0f} GiB"


def _relative(command: str) -> str:
    """Without the folders that it ran in."""
    return re.sub(r"\S*/race-\w+/", "STORE/", command.replace(f"{Path.cwd()}/", "")).replace("{again}", "")


def main(
    files: Annotated[list[Path], typer.Argument(help="What `make race`, `bench.growth` and `bench.parts` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for performance.md and performance/*.svg.")] = Path("docs"),
) -> None:
    """Write the page."""
    out.mkdir(parents=True, exist_ok=True)
    sections = [HEAD]
    for file in files:
        told = json.loads(file.read_text(encoding="utf-8"))
        sections += (
            growth(told, out / "performance") if "points" in told else parts(told) if "parts" in told else race(told)
        )
    (out / "performance.md").write_text("\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
