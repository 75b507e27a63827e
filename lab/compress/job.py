"""The blocks of a dense checkpoint, one after another: read, calibrated, compressed, written, freed.

A block is calibrated on what comes out of the compressed blocks before it. What is on the device at any time is one
block in fp32, its second moments and a batch of tokens; the windows' hidden states stay on the host. After each block
the run is saved: one that was killed goes on there, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lab.compress.allocation import Allocation
from lab.compress.block import NORMS, STEPS, DenseBlock, Walk, step_shapes
from lab.compress.folder import GrowingFolder
from lab.compress.methods import Recipe, compress_layer
from lab.compress.solve import DAMPING, Indefinite, layer_error
from lab.compress.storage import Storage
from lab.run import Run, State
from llama.checkpoint import Checkpoint
from llama.errors import BrokenCheckpoint

LAYER = "layer"  # event of the run's log: what became of the layers of one step


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is calibrated on: ids (W, T) int64, and real (W, T) bool, false where a window is padded at its end."""

    ids: Tensor
    real: Tensor

    @classmethod
    def of(cls, ids: Tensor, lengths: Tensor) -> Tokens:
        """Windows whose tokens are the first `lengths` (W,) of each."""
        return cls(ids, torch.arange(ids.shape[1]) < lengths[:, None])


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done with the blocks of a checkpoint, where, and into which folder.

    Layers that `levels` names get these in place of the recipe's.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    levels: Allocation
    storage: Storage
    folder: GrowingFolder
    device: torch.device

    def blocks(self, tokens: Tokens | None, embedded: Tensor | None, run: Run) -> Iterator[int]:
        """Write a shard for each block that `run` does not have yet; yields how many there are, first at the start.

        `embedded` (W, T, H) fp32 are the tokens' embeddings, which are overwritten; both are None for a method that
        looks at no inputs. Raises ModelError, RunError.
        """
        state = run.load()
        done = state.values["done"] if state else 0
        self.folder.require(done)
        hidden = state.tensors.get("hidden") if state else embedded
        walk = Walk(self.checkpoint.config, tokens.real, self.device) if tokens else None
        yield done
        for index in range(done, self.checkpoint.config.num_layers):
            self.folder.add(index, self._shard(index, walk, hidden, run))
            run.save(State({} if hidden is None else {"hidden": hidden}, {"done": index + 1}))
            yield index + 1

    def _shard(self, index: int, walk: Walk | None, hidden: Tensor | None, run: Run) -> dict[str, Tensor]:
        """The tensors of a block; hidden (W, T, H) is taken through it as it is compressed."""
        block = DenseBlock.read(self.checkpoint, index, self.device)
        shard = {name: self.checkpoint.tensor(name) for name in self._kept_as_is(index)}

        def settle(step: str, weight: Tensor, moments: Tensor | None) -> Tensor:
            stored, meant = self._settled(index, step, weight, moments, run)
            shard.update(stored)
            return meant

        if walk is None or hidden is None:
            for step, weight in block.weights.items():
                settle(step, weight, None)
        else:
            walk.through(block, hidden, settle)
        return shard

    def _settled(
        self, index: int, step: str, weight: Tensor, moments: Tensor | None, run: Run
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The layers of a step, compressed: the tensors stored for them, and the weights (N, K) that these mean."""
        try:
            level = self.levels.get((index, step), self.recipe.level)
            solution = compress_layer(weight, moments, replace(self.recipe, level=level))
        except (Indefinite, BrokenCheckpoint) as error:
            raise BrokenCheckpoint(f"block {index}, {step}: {error}") from error
        stored: dict[str, Tensor] = {}
        start = 0
        for name, rows in zip(STEPS[step], step_shapes(self.checkpoint.config)[step][0], strict=True):
            stored |= self.storage.tensors(f"model.layers.{index}.{name}", solution.rows(start, start + rows), level)
            start += rows
        told: dict[str, float | bool] = {}
        if moments is not None:  # ‖(W − Ŵ) X‖² / ‖W X‖²
            told["error"] = layer_error(weight, solution.weight, moments)
        if self.recipe.method.solves:
            told |= {"damping": solution.damping, "damped_more": solution.damping > DAMPING}
            told["dead_inputs"] = 0 if moments is None else int((moments.diagonal() == 0).sum())
        run.log(LAYER, block=index, step=step, **told)
        return stored, solution.weight

    def _kept_as_is(self, index: int) -> Iterator[str]:
        """The block's tensors that no level touches: norms and biases."""
        config, at = self.checkpoint.config, f"model.layers.{index}"
        yield from (f"{at}.{name}.weight" for name in NORMS)
        for step, names in STEPS.items():
            if config.attention_bias if step in ("qkv", "o") else config.mlp_bias:
                yield from (f"{at}.{name}.bias" for name in names)
