"""A page before it is HTML or Markdown: sections of text, tables and charts. Both are written from this one value,
so that they hold the same numbers. Knows no figure and no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lab.evaluate.bootstrap import Estimate

GAP = "not measured"  # what stands where a figure is missing


@dataclass(frozen=True)
class Table:
    """Rows of text under columns; `notes` stand below. `title` is what it shows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """An SVG drawing of what a table holds; None where it could not be drawn, and `caption` says why."""

    title: str
    svg: str | None
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Page:
    """The whole."""

    title: str
    text: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)


def nats(value: Estimate | None) -> str:
    """`+0.0123 [+0.0100, +0.0150]`."""
    return _written(value, "+.4f")


def share(value: Estimate | None) -> str:
    """`63.2 % [60.1, 66.0]`."""
    if value is None:
        return GAP
    around = "" if value.low is None or value.high is None else f" [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{100 * value.value:.1f} %{around}"


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or that it is missing."""
    return GAP if value is None else f"{value:{form}}"


def megabytes(value: float | None) -> str:
    """Bytes as MB of 10^6."""
    return GAP if value is None else f"{value / 1e6:.1f}"


def short(digest: str | None) -> str:
    """Enough of a digest to tell two apart."""
    return GAP if digest is None else digest.removeprefix("sha256:")[:12]


def _written(value: Estimate | None, form: str) -> str:
    if value is None:
        return GAP
    around = "" if value.low is None or value.high is None else f" [{value.low:{form}}, {value.high:{form}}]"
    return f"{value.value:{form}}{around}"
