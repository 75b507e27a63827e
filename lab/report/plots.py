"""Charts as SVG that stands inside a page, by matplotlib: an extra, without which the tables say the same.

The same points give the same bytes. Knows points and cells; knows no run.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from lab.report.page import Chart

MISSING = "Not drawn: matplotlib is not installed (pip install 'promptstitch[lab]'). The tables hold the same figures."
EMPTY = "Nothing to draw: none of the runs measured this."
LOG_FROM = 10.0  # times the least x
STYLE = {"svg.hashsalt": "promptstitch", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


@dataclass(frozen=True, slots=True)
class Point:
    """A value with the ends of its interval, in a series of its own label."""

    x: float
    y: float
    low: float | None
    high: float | None
    label: str


def scatter(title: str, points: Sequence[Point], x: str, y: str) -> Chart:
    """One mark for each point with its interval; the x axis is logarithmic where it is wide. All x are above 0."""
    if not points:
        return Chart(title, None, EMPTY)

    def draw(axes: Any) -> None:
        for label in dict.fromkeys(point.label for point in points):
            series = [point for point in points if point.label == label]
            spans = [
                [p.y - (p.y if p.low is None else p.low) for p in series],
                [(p.y if p.high is None else p.high) - p.y for p in series],
            ]
            spans = [[max(0.0, span) for span in side] for side in spans]
            axes.errorbar([p.x for p in series], [p.y for p in series], spans, fmt="o", capsize=3, label=label)
        if max(p.x for p in points) > LOG_FROM * min(p.x for p in points):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)

    return _drawn(title, draw, (7.5, 3.6))


def heat(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], unit: str
) -> Chart:
    """A field for each row and column, coloured about 0; NaN stays blank."""
    if not rows:
        return Chart(title, None, EMPTY)
    largest = max((abs(each) for row in values for each in row if not isnan(each)), default=1.0) or 1.0

    def draw(axes: Any) -> None:
        image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        for i, row in enumerate(values):
            for j, each in enumerate(row):
                if not isnan(each):
                    colour = "white" if abs(each) > 0.6 * largest else "black"
                    axes.text(j, i, f"{each:+.3f}", ha="center", va="center", color=colour, fontsize=8)
        axes.figure.colorbar(image, label=unit)

    return _drawn(title, draw, (3.0 + 1.1 * len(columns), 1.4 + 0.4 * len(rows)))


def _drawn(title: str, draw: Callable[[Any], None], size: tuple[float, float]) -> Chart:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return Chart(title, None, MISSING)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=NO_METADATA)
    return Chart(title, out.getvalue()[out.getvalue().index("<svg") :])
