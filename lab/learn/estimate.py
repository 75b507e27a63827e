"""What a plan would take of memory, told before anything is loaded.

Counts the tensors that learning keeps; the allocator's own waste is not known here. Knows shapes only.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.learn.losses import LOGITS
from lab.learn.order import Plan
from llama.config import LlamaConfig
from llama.load import parameters

CHUNKS = 4  # of logits at a time: scores, slope, and both of the dense model


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


def estimate(plan: Plan) -> Estimate:
    """For one step of the plan's recipe."""
    config, recipe = plan.config, plan.order.recipe
    item = 4 if (plan.dtype if plan.compute == "packed" else plan.compute) == "float32" else 2
    together = min(recipe.batch, recipe.micro or recipe.batch) * recipe.window
    tokens = together + (recipe.positions if plan.order.kind == "rows" else 0)
    block = block_elements(config) * tokens
    kept = config.num_layers * block
    if recipe.recompute:
        kept = config.num_layers * config.hidden_size * tokens + block
    head = config.vocab_size * config.hidden_size if plan.dense else 0  # of the dense model, which stays
    stored = parameters(config) * item
    return Estimate(
        weights=stored + head * 2,
        activations=kept * item,
        logits=CHUNKS * LOGITS * 4,
        learned=6 * 4 * learned_elements(plan),  # itself, its gradient, two moments, average and best
        dense=parameters(config) * (4 if plan.dtype == "float32" else 2) if plan.dense else 0,
    )


def block_elements(config: LlamaConfig) -> int:
    """What one block keeps of a token for the way back, in elements: each tensor that a product or a norm came from."""
    h, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = 2 * h  # their inputs
    attention = 2 * q + 2 * kv  # q, k, v and what came out
    return norms + attention + 4 * i  # gate, up, silu of gate, their product's parts


def learned_elements(plan: Plan) -> int:
    """Parameters that are learned."""
    c, n = plan.config, plan.order.recipe.positions
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "rows": n * c.hidden_size,
        "kv": 2 * c.num_layers * n * kv,
        "lora": c.num_layers * n * (2 * c.hidden_size + q + kv),
        "norms": (2 * c.num_layers + 1) * c.hidden_size,
    }[plan.order.kind]
