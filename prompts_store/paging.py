"""Lists in parts. A part is asked for by `limit` and `after`, the position of the last item seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from prompts_store.errors import BadReference
from prompts_store.records import Page

Row = TypeVar("Row")
Item = TypeVar("Item")


def page(
    rows: Sequence[Row], limit: int, item: Callable[[Row], Item], position: Callable[[Item], object]
) -> Page[Item]:
    """The page of `limit` items from `limit + 1` rows asked for: the last row only says that there are more."""
    items = tuple(item(row) for row in rows[:limit])
    return Page(items, str(position(items[-1])) if len(rows) > limit else None)


def number(after: str | None) -> int:
    """The position `after` of a list ordered by a number. Raises BadReference."""
    if after is None:
        return 0
    if not (after.isascii() and after.isdigit() and len(after) <= 18):
        raise BadReference(f"after must be the `next` of a former answer, not {after[:32]!a}", field="after")
    return int(after)
