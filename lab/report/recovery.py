"""Tables and charts of what prompts bring back: the three measures side by side, controls, tasks.

Knows claims; knows no file. Nothing is drawn that no table holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lab.evaluate.bootstrap import MARGIN, Estimate
from lab.evaluate.recovery import LEAST_GAP
from lab.report.claims import Claim, groups, prompted
from lab.report.evidence import Record, estimate
from lab.report.page import GAP, Chart, Section, Table, megabytes, nats, number, share, short
from lab.report.plots import Point, scatter
from lab.report.sources import Sources

MEASURES = (
    f"(a) share of the gap in log-perplexity closed, the paper's measure; (b) the same less what an equal prompt gives "
    f"the dense model; (c) share of KL(dense ‖ ·) closed, and agreement with the dense model's most likely token: the "
    f"headline, which adapting to a domain cannot inflate. Where a gap is under {LEAST_GAP} nats or its interval "
    f"touches 0 there is no share, and what counts is whether the prompt leaves it not worse than the dense model by "
    f"more than {MARGIN} nats."
)
INTERVALS = "Brackets are 95 % intervals by paired bootstrap over documents."
COLUMNS = (
    "level",
    "method",
    "prompt",
    "task",
    "data",
    "tokens learned",
    "seed",
    "(c) KL closed",
    "top-1 without",
    "top-1 with",
    "(a) gap closed",
    "(b) net of dense",
    "gap, nats",
    "left above dense, nats",
    "not worse",
    "perplexity dense / without / with",
    "source",
)


def recovery_section(found: Sequence[Claim], sources: Sources) -> Section:
    """The headline."""
    shown = [claim for claim in prompted(found) if not claim.of_a_task]
    rows = [row for group in groups(shown) for row in _rows(group, sources)]
    table = Table("What a prompt brings back", COLUMNS, rows, _notes(shown))
    x: Mapping[str, Callable[[Claim], float | None]] = {
        "model on disk, MB": lambda c: c.disk_bytes and c.disk_bytes / 1e6,
        "model in memory, MB": lambda c: c.told["bytes"] / 1e6 if c.told.get("bytes") else None,
        "positions N": lambda c: c.positions,
        "tokens learned": lambda c: c.tokens,
    }
    charts = [_chart(label, of, shown) for label, of in x.items()]
    return Section("Recovery", (MEASURES, INTERVALS), (table,), charts)


def plain_section(found: Sequence[Claim], sources: Sources) -> Section:
    """Models without a prompt, by bytes: at equal ones it shows whose compression is better."""
    seen: dict[tuple[Any, ...], list[str]] = {}
    by_bytes = sorted(found, key=lambda c: (c.disk_bytes or c.told.get("bytes") or 0, c.level))
    for claim in by_bytes:
        perplexity = _without(claim)
        if perplexity is None or claim.of_a_task:
            continue
        gap = claim.measure("gap") or (estimate(claim.told.get("nll_above_dense")) if not claim.prompt else None)
        kl = claim.measure("kl") or (estimate(claim.told.get("kl")) if not claim.prompt else None)
        sizes = [megabytes(claim.disk_bytes), megabytes(claim.told.get("bytes"))]
        row = [*sizes, claim.level, claim.method, claim.data, _count(claim), number(perplexity), nats(gap), nats(kl)]
        seen.setdefault((claim.told.get("weights"), *claim.scored), [*row, sources.cite(claim.record)])
    columns = (
        "disk, MB",
        "resident, MB",
        "level",
        "method",
        "data",
        "scored tokens",
        "perplexity",
        "above dense, nats",
        "KL(dense ‖ ·), nats",
        "source",
    )
    note = "A level that no run at hand has made may have been made while loading: then nothing of it lies on disk."
    return Section("Models without a prompt", (), (Table("By bytes", columns, list(seen.values()), (note,)),))


def _count(claim: Claim) -> str:
    tokens = claim.told.get("scored_tokens")
    return GAP if tokens is None else f"{tokens:,}"


def controls_section(found: Sequence[Claim], adapted: Sequence[Record], sources: Sources) -> Section:
    """Prompts that nobody learned, on the same tokens; and what was learned in a prompt's place."""
    rows = []
    for claim in found:
        for name, told in dict(claim.told.get("conditions") or {}).items():
            perplexity, above = number(told.get("perplexity")), nats(estimate(told.get("nll_above_ours")))
            where = [claim.level, claim.method, _prompt(claim), claim.data]
            rows.append([*where, name.replace("_", " "), perplexity, above, sources.cite(claim.record)])
    columns = ("level", "method", "prompt", "data", "in its place", "perplexity", "above the prompt's, nats", "source")
    tables = (Table("The same tokens in other conditions", columns, rows), _in_place(adapted, sources))
    return Section("Controls", (INTERVALS,), tables)


def _in_place(adapted: Sequence[Record], sources: Sources) -> Table:
    rows = []
    for record in adapted:
        told, recovery = record.figures, dict(record.figures.get("recovery") or {})
        plain = dict(told.get("conditions") or {}).get("without_prompt") or {}
        both = " / ".join(
            number(each) for each in (told.get("dense_perplexity"), plain.get("perplexity"), told["perplexity"])
        )
        shares = [share(estimate(recovery.get(name))) for name in ("kl_share", "share")]
        rows.append([str(told.get("level")), str(record.config["kind"]), *shares, both, sources.cite(record)])
    columns = ("level", "learned", "(c) KL closed", "(a) gap closed", "perplexity dense / without / with", "source")
    return Table("Learned in a prompt's place, from the same tokens", columns, rows)


def tasks_section(found: Sequence[Claim], sources: Sources) -> Section:
    """Accuracies of lm-eval."""
    rows = []
    for claim in found:
        for name, told in dict(claim.told.get("tasks") or {}).items():
            both = [share(estimate(told.get(field))) for field in ("accuracy", "accuracy_normalised")]
            floor = share(Estimate(told["floor"], None, None, 0)) if told.get("floor") is not None else GAP
            where = [claim.level, claim.method, _prompt(claim), name, str(told.get("items"))]
            rows.append([*where, *both, floor, short(told.get("digest")), sources.cite(claim.record)])
    columns = (
        *("level", "method", "prompt", "task", "items", "accuracy", "normalised", "floor"),
        *("items' digest", "source"),
    )
    return Section("Tasks", (), (_kept(found, sources), Table("Zero-shot accuracy", columns, rows)))


def _kept(found: Sequence[Claim], sources: Sources) -> Table:
    rows = []
    for claim in prompted(found):
        if (kept := claim.measure("kept")) is None or claim.learned is None or not claim.of_a_task:
            continue
        names = ("dense_perplexity", "dense_prompted_perplexity", "perplexity")
        perplexities = [number(claim.told.get(name)) for name in names]
        perplexities.insert(2, number(_without(claim)))
        floor = dict(claim.told.get("by_frequency") or {}).get("perplexity")
        learned = floor is None or claim.told["dense_prompted_perplexity"] < floor
        task = str(claim.learned.figures.get("task") or "-")
        rows.append(
            [
                claim.level,
                claim.method,
                _prompt(claim),
                task,
                claim.data,
                share(kept) if learned else "none: no more than frequencies",
                " / ".join(perplexities),
                number(floor),
                sources.cite(claim.record),
            ]
        )
    columns = (
        "level",
        "method",
        "prompt",
        "task",
        "data",
        "kept",
        "perplexity dense / with its own / level / ours",
        "by frequency",
        "source",
    )
    note = (
        "Of what an equal prompt gains on the dense model, in nats; where that is too little, no row stands. By "
        "frequency: of whoever knows how often each answer is right in the data learned from, and reads no question. "
        "Where the dense model's own prompt is no better, it has learned the form of an answer and no task. Perplexity "
        "is of the completions alone. The dense model without a prompt does not know a task, so nothing is held "
        "against it."
    )
    return Table("What compressed + prompt keeps of the gain of dense + prompt", columns, rows, (note,))


def _rows(group: Sequence[Claim], sources: Sources) -> list[list[str]]:
    """A row for each seed, and of several seeds their mean and range."""
    rows = [_row(claim, len(group), sources) for claim in group]
    if len(group) > 1:
        means = {"(c) KL closed": "kl_share", "(a) gap closed": "share", "(b) net of dense": "net_share"}
        mean = dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS[:6], rows[0], strict=False))
        solves = len({claim.told.get("weights") for claim in group})
        of = f"mean of {len(group)}" + (f", the level solved on {solves} machines" if solves > 1 else "")
        mean |= {"seed": of} | {column: _spread(group, name) for column, name in means.items()}
        rows.append([mean[column] for column in COLUMNS])
    return rows


def _row(claim: Claim, seeds: int, sources: Sources) -> list[str]:
    seed = "?" if claim.learned is None else str(claim.learned.seed)
    worse = claim.recovery.get("not_inferior")
    perplexities = (claim.told.get("dense_perplexity"), _without(claim), claim.told.get("perplexity"))
    return [
        claim.level,
        claim.method,
        _prompt(claim),
        str(claim.learned.figures.get("task") or "-") if claim.learned else GAP,
        f"{claim.data} {short(claim.data_digest)}, {_count(claim)} tokens scored",
        GAP if claim.tokens is None else f"{claim.tokens:,}",
        f"{seed} (single seed)" if seeds == 1 else seed,
        _share(claim, "kl_share", "kl"),
        share(claim.measure("top1")),
        share(claim.measure("top1_prompted")),
        _share(claim, "share", "gap"),
        _share(claim, "net_share", "gap"),
        nats(claim.measure("gap")),
        nats(claim.measure("excess")),
        GAP if worse is None else "yes" if worse else "no",
        " / ".join(number(each) for each in perplexities),
        sources.cite(claim.record),
    ]


def _share(claim: Claim, name: str, of: str) -> str:
    """The share, or why there is none: too small a gap is another thing than one that nobody measured."""
    told, gap = claim.measure(name), claim.measure(of)
    small = gap is not None and (gap.value < LEAST_GAP or (gap.low is not None and gap.low <= 0))
    return "none: small gap" if told is None and small else share(told)


def _spread(group: Sequence[Claim], name: str) -> str:
    values = [each.value for claim in group if (each := claim.measure(name)) is not None]
    if len(values) < len(group):
        return GAP
    return f"{100 * fmean(values):.1f} %, from {100 * min(values):.1f} to {100 * max(values):.1f}"


def _prompt(claim: Claim) -> str:
    if not claim.told.get("prompt_digest"):
        return "none"
    told = f"{claim.prompt.get('kind')} N = {claim.positions} {short(claim.told['prompt_digest'])}"
    return f"{told}, of {claim.learned_level}" if claim.learned_level else told


def _without(claim: Claim) -> float | None:
    """Perplexity of the model without a prompt."""
    if not claim.told.get("prompt_digest"):
        return claim.told.get("perplexity")
    plain: Any = dict(claim.told.get("conditions") or {}).get("without_prompt")
    return plain.get("perplexity") if isinstance(plain, Mapping) else None


def _notes(shown: Sequence[Claim]) -> list[str]:
    notes = ["A row for each seed; one that stands alone is marked single seed, and no claim rests on it."]
    if not shown:
        notes.append("No evaluation with a prompt and --dense is among the runs.")
    return notes


def _chart(label: str, x: Callable[[Claim], float | None], shown: Sequence[Claim]) -> Chart:
    points = [
        Point(
            float(at),
            100 * y.value,
            None if y.low is None else 100 * y.low,
            None if y.high is None else 100 * y.high,
            f"{claim.level} {claim.prompt.get('kind')}, {claim.data}",
        )
        for claim in shown
        if (at := x(claim)) is not None and (y := claim.measure("kl_share")) is not None
    ]
    title = f"KL closed against {label}"
    return scatter(title, points, label, "(c) KL closed, %")
