"""Linear layers as the model sees them: a thing that maps (T, K) to (T, N).

`Linear` is the one interface; dense weights live here, packed ones in `llama.packed` and `llama.int4`. Every layer is
differentiable with respect to its input, whatever kernel multiplies, since prompts are learned through the very
weights that are served; the weights themselves never get a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama import native

PREPACK_ROWS = 32  # the batch that oneDNN is told to expect; the speed at 1 and at 128 rows is the same


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
        """Rearrange the weights for serving, in place. Does nothing by default."""

    def native(self) -> native.Product | None:
        """The product as our kernels do it in bf16; None where another one multiplies."""
        return None


class OpaqueLinear(Linear):
    """A product that autograd cannot see into: `product` multiplies by any kernel, `pullback` is its derivative."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = _Opaque.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """x (T, K) → x Wᵀ + b (T, N)."""
        raise TypeError(f"{type(self).__name__} does not say how to multiply")

    def pullback(self, dy: Tensor) -> Tensor:
        """dY (T, N) → dX = dY W (T, K)."""
        return dy @ self.dense()


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: OpaqueLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.pullback(dy), None


class DenseLinear(OpaqueLinear):
    """Weights in the compute dtype.

    `prepare` rearranges bf16 weights on the CPU for our own product, or for oneDNN's where that is the faster one, in
    place of the plain ones. In fp32 nothing is gained, so that stays as it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.panels: Tensor | None  # as `native.Kernels.panels` or `.pairs` lays them out
        self.prepacked: Tensor | None  # as oneDNN does
        self.register_buffer("panels", None, persistent=False)
        self.register_buffer("prepacked", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.weight is None else F.linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        if self.panels is not None and (ours := native.kernels()):
            return ours.linear(x, self.panels, self.bias, self.out_features)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.prepacked, self.bias, "none", [], "")
        return y

    def native(self) -> native.Product | None:
        ours = native.kernels()
        if self.panels is None or ours is None:
            return None
        return ours.product_of(self.panels, self.bias, self.out_features, self.in_features)

    def dense(self) -> Tensor:
        if self.weight is not None:
            return self.weight
        if self.panels is not None:
            return native.unpanelled(self.panels, self.out_features)
        assert self.prepacked is not None
        return self.prepacked.to_dense()

    def prepare(self) -> None:
        weight = self.weight
        if weight is None or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
            return
        if ours := native.product():
            in_pairs = native.in_pairs(weight.shape[1])
            self.panels, self.weight = (ours.pairs if in_pairs else ours.panels)(weight.detach()), None
        elif torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PREPACK_ROWS)
            self.weight = None


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
