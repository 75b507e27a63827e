"""Products in 8-bit integers, faster than fp32's where `Kernels.multiplies_integers`: for learning, not for answers.

Weights and inputs are rounded in groups of 64 that share a scale (LLM.int8(), Dettmers et al. 2022, shares one by row),
so a product is off by about 1 % of its size. A weight that was already on a grid of up to 4 bits stays what it is.
Knows no checkpoint and no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.linear import OpaqueLinear
from llama.native import GROUP, PANEL, Integers, Kernels

LEVELS = (127.0, 126.0, 120.0)  # of a group's largest weight: what of 1..8 divides one of them is met exactly
ROWS = 256  # weights' rows rounded at once, a multiple of PANEL


class IntegerLinear(OpaqueLinear):
    """W (N, K), both multiples of 64, kept twice: as it is for the product, turned for the derivative. fp32 in, out."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._kernels = kernels
        self._bias = None if bias is None else bias.float()
        self._forth, self._back = rounded(weight), rounded(weight.T)

    def product(self, x: Tensor) -> Tensor:
        return self._kernels.integers(x, self._forth, self._bias, self.out_features)

    def pullback(self, dy: Tensor) -> Tensor:
        return self._kernels.integers(dy, self._back, None, self.in_features)


def fits(weight: Tensor) -> bool:
    """Whether both sides of W (N, K) can be cut into groups."""
    return all(side % GROUP == 0 for side in weight.shape)


def rounded(weight: Tensor) -> Integers:
    """W (N, K) of any dtype in integers, as `Kernels.integers` reads it."""
    parts = [_rounded(part) for part in torch.split(weight, ROWS)]
    return Integers(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """For each group the one of LEVELS that leaves the least error."""
    n, k = weight.shape
    groups = torch.zeros(-(-n // PANEL) * PANEL, k // GROUP, GROUP)
    groups[:n] = weight.reshape(n, -1, GROUP).float()
    largest = groups.abs().amax(-1, keepdim=True)
    codes, scales = torch.zeros_like(groups), torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for levels in LEVELS:
        scale = largest / levels
        code = (groups / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
        error = (code * scale).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < least
        codes, scales, least = (
            torch.where(better, new, old) for new, old in ((code, codes), (scale, scales), (error, least))
        )
    across = (codes + 128).to(torch.uint8).view(-1, PANEL, k // 4, 4).transpose(1, 2).contiguous()
    return across, scales.view(-1, PANEL, k // GROUP).transpose(1, 2).contiguous()
