"""From a dense checkpoint to a compressed one, block by block.

Each block is read from the mapped shards, calibrated on what comes out of the compressed blocks before it, solved,
written and freed. What is on the device at any time is one block in fp32, its second moments and a batch of tokens;
the windows' hidden states stay on the host. After each block the state is saved: a job that was killed goes on there,
to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.compress.block import NORMS, STEPS, DenseBlock, Walk, step_shapes
from lab.compress.folder import GrowingFolder
from lab.compress.methods import Recipe, compress_layer
from lab.compress.solve import Indefinite, layer_error
from lab.compress.state import LayerReport, State
from lab.compress.storage import Storage
from llama.checkpoint import Checkpoint
from llama.errors import BrokenCheckpoint

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is calibrated on: ids (W, T) int64, and real (W, T) bool, false where a window is padded at its end."""

    ids: Tensor
    real: Tensor


def compress_blocks(
    checkpoint: Checkpoint,
    folder: GrowingFolder,
    storage: Storage,
    recipe: Recipe,
    tokens: Tokens | None,
    device: torch.device,
    state: State | None,
    save: Callable[[State], None],
) -> tuple[LayerReport, ...]:
    """Write a shard for every block, from `state` on (None: from the start); `save` hears of each.

    Raises ModelError, OSError.
    """
    if state is None:
        state = State(0, (), None if tokens is None else _embedded(checkpoint, tokens.ids))
    walk = None if tokens is None else Walk(checkpoint.config, tokens.real, device)
    for index in range(state.done, checkpoint.config.num_layers):
        shard, layers = _compress_block(checkpoint, index, storage, recipe, walk, state.hidden, device)
        folder.add(index, shard)
        state = State(index + 1, (*state.layers, *layers), state.hidden)
        save(state)
    return state.layers


def _compress_block(
    checkpoint: Checkpoint,
    index: int,
    storage: Storage,
    recipe: Recipe,
    walk: Walk | None,
    hidden: Tensor | None,
    device: torch.device,
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """The tensors of a block's shard; hidden (W, T, H) is taken through the compressed block."""
    at = f"model.layers.{index}"
    block = DenseBlock.read(checkpoint, index, device)
    shard = {name: checkpoint.tensor(name) for name in _kept_as_is(checkpoint, at)}
    reports: list[LayerReport] = []

    def settle(step: str, weight: Tensor, moments: Tensor | None) -> Tensor:
        try:
            solution = compress_layer(weight, moments, recipe)
        except (Indefinite, BrokenCheckpoint) as error:
            raise BrokenCheckpoint(f"{at}, {step}: {error}") from error
        rows, start = step_shapes(checkpoint.config)[step][0], 0
        for name, count in zip(STEPS[step], rows, strict=True):
            shard.update(storage.tensors(f"{at}.{name}", solution.rows(start, start + count)))
            start += count
        lost = None if moments is None else layer_error(weight, solution.weight, moments)
        reports.append(LayerReport(index, step, lost, solution.damping))
        return solution.weight

    if walk is None or hidden is None:
        for step, weight in block.weights.items():
            settle(step, weight, None)
    else:
        walk.through(block, hidden, settle)
    return shard, reports


def _kept_as_is(checkpoint: Checkpoint, at: str) -> list[str]:
    """The block's tensors that no level touches: norms and biases."""
    config = checkpoint.config
    biased = {"qkv": config.attention_bias, "o": config.attention_bias, "gate_up": config.mlp_bias}
    biased["down"] = config.mlp_bias
    biases = [f"{at}.{name}.bias" for step, names in STEPS.items() if biased[step] for name in names]
    return [*(f"{at}.{name}.weight" for name in NORMS), *biases]


def _embedded(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """ids (W, T) → (W, T, H) fp32."""
    return checkpoint.tensor(EMBEDDING)[ids].float()
