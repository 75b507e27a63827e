"""Lines over a logarithmic axis, side by side in one SVG; the same points give the same bytes.

Knows points; knows no server. matplotlib is an extra (`promptstitch[lab]`): ImportError without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.report.plots import NO_METADATA, STYLE


@dataclass(frozen=True, slots=True)
class Panel:
    """Series of (x, y) by what they are called; y from 0 up."""

    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]


def draw(file: Path, panels: Sequence[Panel]) -> None:
    """Write the panels, from left to right."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.2), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, points in panel.series.items():
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
            ticks = sorted({x for points in panel.series.values() for x, _ in points})
            axes.set_xscale("symlog", base=2, linthresh=max(1.0, min((x for x in ticks if x > 0), default=1.0)))
            axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks], rotation=45)
            axes.minorticks_off()
            axes.set_xlabel(panel.x)
            axes.set_ylabel(panel.y)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7, frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata=NO_METADATA)
