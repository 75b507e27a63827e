"""Which level each layer gets when all of them together may take the bytes of one level everywhere.

`uniform` gives every layer the level that was asked for. `sensitivity` gives more to layers whose compression costs the
model much, and less to the others. Knows costs and bytes; knows no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lab.compress.block import Layer
from lab.compress.level import Level

ALLOCATIONS = ("uniform", "sensitivity")

Allocation = Mapping[Layer, Level]


def allocate(
    costs: Mapping[Layer, Sequence[float]],
    levels: Sequence[Level],
    shapes: Mapping[str, tuple[Sequence[int], int]],
    level: Level,
) -> dict[Layer, Level]:
    """For each layer one of `levels`, such that costs sum to little and bytes to no more than with `level` everywhere.

    `costs` are in the order of `levels`; `shapes` has for each step the rows of its layers and their inputs. From the
    least of everything on, what is taken next is always the step that saves the most for its bytes, among those that
    still fit (Shoham & Gersho 1988).
    """

    def bytes_of(layer: Layer, choice: Level) -> int:
        rows, inputs = shapes[layer[1]]
        return sum(rows) * choice.row_bytes(inputs)

    sizes = {layer: [bytes_of(layer, choice) for choice in levels] for layer in costs}
    chosen = {layer: min(range(len(levels)), key=size.__getitem__) for layer, size in sizes.items()}
    left = sum(bytes_of(layer, level) for layer in costs) - sum(sizes[layer][at] for layer, at in chosen.items())
    while steps := [
        ((costs[layer][at] - costs[layer][to]) / (size[to] - size[at]), layer, to)
        for layer, at in chosen.items()
        for size in (sizes[layer],)
        for to in range(len(levels))
        if 0 < size[to] - size[at] <= left and costs[layer][to] < costs[layer][at]
    ]:
        _, layer, to = max(steps)
        left -= sizes[layer][to] - sizes[layer][chosen[layer]]
        chosen[layer] = to
    return {layer: levels[at] for layer, at in chosen.items()}
