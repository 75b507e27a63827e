"""Which windows a step sees, and how many positions of the prompt: functions of the seed and the step alone.

So there is no cursor and no state of a generator to save: a run that goes on at a step draws what it would have drawn.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch import Tensor


class Batches:
    """`size` of `count` windows a step; every epoch takes each window once, in an order of its own."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self._count, self._size, self._seed = count, size, seed
        self._epoch = lru_cache(maxsize=2)(self._order)

    def at(self, step: int) -> Tensor:
        """Numbers (size,) of the windows of a step."""
        places = range(step * self._size, (step + 1) * self._size)
        return torch.tensor([self._epoch(place // self._count)[place % self._count] for place in places])

    def _order(self, epoch: int) -> list[int]:
        return random.Random(f"order {self._seed} {epoch}").sample(range(self._count), self._count)


def positions_at(step: int, positions: int, nested: float, seed: int) -> int:
    """How many of the first positions a step sees: all of them, or in a share `nested` of the steps any number."""
    draw = random.Random(f"positions {seed} {step}")
    if positions < 2 or draw.random() >= nested:
        return positions
    return draw.randint(1, positions - 1)
