"""What a run would take of memory, told before anything is loaded.

Counts the tensors that learning keeps; the allocator's own waste is not known here. Knows shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.learn.losses import LOGITS
from lab.learn.recipe import Kind, Recipe
from llama.config import LlamaConfig
from llama.load import parameters

CHUNKS = 4  # of logits at a time: scores, slope, and both of the dense model
COPIES = 6  # of what is learned: itself, its gradient, two moments, the average and the best


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes on the device while a step is computed. `dense` is needed before and without the others, if at all."""

    weights: int
    activations: int
    logits: int
    learned: int
    dense: int

    @property
    def peak(self) -> int:
        """The larger of the two phases."""
        return max(self.weights + self.activations + self.logits + self.learned, self.dense)


def estimate(config: LlamaConfig, kind: Kind, recipe: Recipe, dtype: str, compute: str, distils: bool) -> Estimate:
    """For one step of the recipe; `dtype` that is served, `compute` and `distils` as a plan settles them."""
    item = 4 if (dtype if compute == "packed" else compute) == "float32" else 2
    served = 4 if dtype == "float32" else 2
    tokens = min(recipe.batch, recipe.micro or recipe.batch) * recipe.window
    block = block_elements(config) * tokens
    kept = config.num_layers * block
    if recipe.recompute:
        kept = config.num_layers * config.hidden_size * tokens + block
    if kind == "rows":  # computed once a step, and never again on the way back
        kept += config.num_layers * block_elements(config) * recipe.positions
    head = config.vocab_size * config.hidden_size * served if distils else 0  # the dense model's, which stays
    return Estimate(
        weights=parameters(config) * item + head,
        activations=kept * item,
        logits=CHUNKS * LOGITS * 4,
        learned=COPIES * 4 * learned_elements(config, kind, recipe.positions),
        dense=parameters(config) * served if distils else 0,
    )


def block_elements(config: LlamaConfig) -> int:
    """What one block keeps of a token for the way back, in elements: each tensor that a product or a norm came from."""
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = 2 * h  # their inputs
    attention = 2 * q + 2 * kv  # q, k, v and what comes out
    return norms + attention + 4 * i  # gate, up, silu of gate, and their product


def learned_elements(config: LlamaConfig, kind: Kind, n: int) -> int:
    """Parameters that are learned; n positions, of LoRA the rank."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "rows": n * config.hidden_size,
        "kv": 2 * config.num_layers * n * kv,
        "lora": config.num_layers * n * (2 * config.hidden_size + q + kv),
        "norms": (2 * config.num_layers + 1) * config.hidden_size,
    }[kind]
