"""The input embedding: token ids to rows of a table, dense or on the 8-bit grid of `llama.q8`.

A table on the grid may be the head's, too, and is then there once. Knows no checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.panels import IntegerPanelLinear
from llama.q8 import Q8Linear


class Embedding(nn.Module):
    """ids (T,) → (T, H) in the compute dtype. Subclasses say how the table (V, H) is kept."""

    dtype: torch.dtype
    device: torch.device

    if TYPE_CHECKING:

        def __call__(self, ids: Tensor) -> Tensor: ...

    def forward(self, ids: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say how to look up")

    def dense(self) -> Tensor:
        """The table (V, H) in the compute dtype."""
        raise TypeError(f"{type(self).__name__} does not say what it holds")


class DenseEmbedding(Embedding):
    """A table in the compute dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype, self.device = weight.dtype, weight.device

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def dense(self) -> Tensor:
        return self.weight


class Q8Embedding(Embedding):
    """The table that the head holds."""

    def __init__(self, table: Q8Linear | IntegerPanelLinear) -> None:
        super().__init__()
        self.table = table
        self.dtype, self.device = table.dtype, table.codes.device

    def forward(self, ids: Tensor) -> Tensor:
        return self.table.gather(ids)

    def dense(self) -> Tensor:
        return self.table.dense()
