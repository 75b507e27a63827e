"""Integer weights made at load, by rounding a dense checkpoint to the nearest points of a grid (`llama.rtn`)."""

from __future__ import annotations

import torch

from llama import rtn
from llama.errors import BrokenCheckpoint, UnsupportedModel
from llama.formats.matrix import DenseMatrix, IntMatrix, Rows


class MadeInt(IntMatrix):
    """A dense matrix on a symmetric grid."""

    def __init__(self, dense: DenseMatrix, grid: rtn.Grid) -> None:
        self.shape, self.bits, self.group = dense.shape, grid.bits, grid.group
        self._dense = dense
        if self.shape[1] % self.group:
            raise UnsupportedModel(
                f"{dense.name}: rows of {self.shape[1]} weights cannot be cut into groups of {self.group}; "
                "choose a level whose group divides them"
            )

    def rows(self, start: int, stop: int) -> Rows:
        weights = self._dense.rows(start, stop).to(torch.float32)
        try:
            return Rows(*rtn.quantise(weights, self.bits, self.group))
        except BrokenCheckpoint as error:
            raise BrokenCheckpoint(f"{self._dense.name}: {error}") from error
