"""How long a run is: steps, tokens, or time, which a measured speed turns into steps once, before the first one.

Knows arithmetic; what a step costs is told to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lab.data.windows import Windows
from lab.learn.recipe import LearnError, Recipe

_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
SELECTING = 0.2  # share of a budget of time
POOL = 256  # windows; pools of like runs are then the same, and so are the dense model's states of them


@dataclass(frozen=True, slots=True)
class Budget:
    """So many steps, text tokens or seconds of learning, selection included."""

    amount: float
    unit: Literal["steps", "tokens", "seconds"]


def parse_budget(time: str | None, tokens: int | None, steps: int | None, recipe: Recipe) -> Budget:
    """The one that is given, else the recipe's tokens. Raises LearnError."""
    given = {"--budget": time, "--tokens": tokens, "--steps": steps}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise LearnError(f"{' and '.join(named)} contradict each other; give one of them")
    if time is not None:
        return Budget(seconds_of(time), "seconds")
    amount, unit = (steps, "steps") if steps is not None else (recipe.tokens if tokens is None else tokens, "tokens")
    assert amount is not None
    if amount < 1:
        raise LearnError(f"--{unit} must be at least 1, got {amount}")
    return Budget(amount, "steps" if unit == "steps" else "tokens")


def seconds_of(time: str) -> float:
    """A time such as 90s, 15m or 1.5h. Raises LearnError."""
    match = _TIME.fullmatch(time.strip())
    if not match or not float(match[1]):
        raise LearnError(f"--budget is a time such as 90s, 15m or 1.5h, got {time!r}")
    return float(match[1]) * _SECONDS[match[2]]


def steps_of(budget: Budget, windows: Windows, recipe: Recipe) -> int:
    """Steps of a budget that is not a time."""
    if budget.unit == "steps":
        return int(budget.amount)
    assert budget.unit == "tokens"
    each = float(windows.lengths.double().mean()) * recipe.batch
    return max(1, round(budget.amount / each))


def steps_in(seconds: float, step_seconds: float, selection_seconds: float, recipe: Recipe) -> tuple[int, int]:
    """Steps and selections that fit in a time: the recipe's, or as many as take SELECTING of it, at least one.

    One more is before the first step. Raises LearnError.
    """
    affordable = int(SELECTING * seconds / selection_seconds) - 1
    selections = max(1, min(recipe.selections, affordable))
    left = seconds - (selections + 1) * selection_seconds
    if left < step_seconds:
        raise LearnError(
            f"--budget {seconds:.0f}s leaves no time: a step takes {step_seconds:.1f} s and a selection "
            f"{selection_seconds:.1f} s, {selections + 1} times; give more time, or --set select_windows=8"
        )
    return int(left / step_seconds), selections


def pool(steps: int, windows: Windows, recipe: Recipe) -> int:
    """How many of the windows, from the first on, so many steps draw from: what one epoch needs, rounded up."""
    needed = -(-steps * recipe.batch // POOL) * POOL
    return min(needed, len(windows))
