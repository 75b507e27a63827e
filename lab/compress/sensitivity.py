"""What the compression of each layer costs the whole model, measured on text before any layer is solved.

Let y = W x be a layer's outputs and g = ∂L/∂y, where L is the model's loss on labels drawn from its own predictions.
Then ½ Σ (gᵀ ΔW x)² over tokens is, to second order, how far a change ΔW takes the predictions away (KL, in nats): the
Fisher matrix of the layer, applied to just the change that a level would make there (as in optimal brain surgeon,
Hassibi & Stork 1993). Changes are those of the cheap methods, as only their proportions matter. One way forward and
one back over few tokens; one block is on the device at a time. Knows levels; knows no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.compress.block import STEPS, DenseBlock, Layer
from lab.compress.job import Tokens
from lab.compress.level import Level
from lab.compress.methods import METHODS, Recipe, compress_layer
from lab.progress import Report
from llama.checkpoint import Checkpoint
from llama.linear import Linear
from llama.model import Block, CausalAttention, RMSNorm
from llama.rope import Rope

TOKENS = 4096  # enough for proportions between layers
ROWS = 512  # of which logits are there at once

Costs = Mapping[Layer, Sequence[float]]


def sensitivity(
    checkpoint: Checkpoint, tokens: Tokens, embedded: Tensor, levels: Sequence[Level], head: Tensor, report: Report
) -> Costs:
    """For every step of every block what each of `levels` costs there, in nats a token.

    `embedded` (W, T, H) fp32 are the tokens' embeddings, `head` (V, H); work is done where `head` is.
    Raises BrokenCheckpoint.
    """
    config, device = checkpoint.config, head.device
    windows, length = tokens.ids.shape
    real = tokens.real.flatten().to(device)
    rotation = Rope(config.rope, config.head_dim, device, torch.float32).tables(
        torch.arange(length, device=device).repeat(windows)
    )
    attend = CausalAttention(windows)
    inputs = [embedded.flatten(0, 1)]  # of each block, on the host
    steps = 2 * config.num_layers
    with torch.no_grad():
        for index in range(config.num_layers):
            report("measure", index, steps)
            block, _ = _tapped(checkpoint, index, device)
            inputs.append(block(inputs[-1].to(device), rotation, attend).cpu())
    norm = RMSNorm(checkpoint.tensor("model.norm.weight").to(device, torch.float32), config.rms_norm_eps)
    slope = _slope(inputs.pop().to(device), norm, head, real)
    costs: dict[Layer, list[float]] = {}
    for index in reversed(range(config.num_layers)):
        report("measure", steps - 1 - index, steps)
        block, taps = _tapped(checkpoint, index, device)
        x = inputs.pop().to(device).requires_grad_()
        block(x, rotation, attend).backward(slope)
        assert x.grad is not None
        slope = x.grad
        for step, tap in taps.items():
            costs[index, step] = tap.costs(levels, real)
    report("measure", steps, steps)
    return costs


class _Tap(Linear):
    """A dense layer that keeps its inputs x (T, K) and, after the way back, the slopes g (T, N) at its outputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight, bias
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self._weight, self._bias)
        if y.requires_grad:
            y.retain_grad()
            self._seen = x.detach(), y
        return y

    @torch.no_grad()
    def costs(self, levels: Sequence[Level], real: Tensor) -> list[float]:
        assert self._seen is not None
        x, y = self._seen
        assert y.grad is not None
        x, g = x[real], y.grad[real]
        moments = x.t() @ x
        return [self._cost(level, x, g, moments) for level in levels]

    def _cost(self, level: Level, x: Tensor, g: Tensor, moments: Tensor) -> float:
        cheap = Recipe(level, METHODS["wanda" if level.sparsity else "rtn"], clip=level.sparsity is None)
        change = self._weight - compress_layer(self._weight, moments, cheap).weight
        return float(((x @ change.t()) * g).sum(-1).square().mean()) / 2


def _tapped(checkpoint: Checkpoint, index: int, device: torch.device) -> tuple[Block, dict[str, _Tap]]:
    dense = DenseBlock.read(checkpoint, index, device)
    taps = {step: _Tap(dense.weights[step], dense.biases[step]) for step in STEPS}
    attention, mlp = (taps["qkv"], taps["o"]), (taps["gate_up"], taps["down"])
    return Block(checkpoint.config, index, dense.attention_norm, *attention, dense.mlp_norm, *mlp), taps


def _slope(hidden: Tensor, norm: RMSNorm, head: Tensor, real: Tensor) -> Tensor:
    """∂L/∂hidden (T, H) of the last block's outputs, for labels drawn from the model itself; 0 for padding."""
    hidden.requires_grad_()
    normed = norm(hidden)
    slope = torch.zeros_like(normed)
    draw = torch.Generator(head.device).manual_seed(0)
    with torch.no_grad():
        for rows in torch.split(real.nonzero().flatten(), ROWS):
            error = (normed[rows] @ head.t()).softmax(-1)  # and less 1 where the label is: the slope at the logits
            labels = torch.multinomial(error, 1, generator=draw)
            slope[rows] = error @ head - head[labels.flatten()]
    normed.backward(slope)
    assert hidden.grad is not None
    return hidden.grad
