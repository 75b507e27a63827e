"""Linear layers as the model sees them: a thing that maps (T, K) to (T, N).

`Linear` is the one interface; dense weights live here, packed ones in `llama.packed`. Each subclass is differentiable
with respect to its input, since prompts are learned through the very weights that are served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x Wᵀ + b with W (N, K). Subclasses say how W is kept."""

    in_features: int
    out_features: int

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:  # (T, K) -> (T, N)
        raise TypeError(f"{type(self).__name__} does not say how to multiply")

    def dense(self) -> Tensor:
        """W (N, K) as it takes part in the product, in the compute dtype."""
        raise TypeError(f"{type(self).__name__} does not say what it holds")

    def prepare(self) -> None:
        """Rearrange the weights for serving, in place; afterwards no gradient flows. Does nothing by default."""


class DenseLinear(Linear):
    """Weights in the compute dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        return self.weight


class FusedLinear(Linear):
    """Several layers over one input that could not be merged into one; their outputs stand side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)

    def dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self._linears()])

    def prepare(self) -> None:
        for part in self._linears():
            part.prepare()

    def _linears(self) -> list[Linear]:
        return [part for part in self.parts if isinstance(part, Linear)]
