"""One decoder block as matrices that are replaced while tokens pass through it.

`Walk.through` runs a block's four steps over all windows; before each it hands the step's layers, with the second
moments of the inputs that they really get, to whoever compresses them, and goes on through what comes back. Knows no
level and no solver. Everything is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.config import LlamaConfig
from llama.formats.matrix import FLOATS
from llama.model import CausalAttention, RMSNorm
from llama.pointwise import swiglu
from llama.rope import Rope, rotate

BATCH_TOKENS = 8192  # of one step on the device
# The layers of a step share their inputs, and so one problem: their rows do not meet in it.
STEPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NORMS = ("input_layernorm", "post_attention_layernorm")

Layer = tuple[int, str]  # block and step

# (step, W (N, K), second moments of its inputs (K, K)) → what takes the place of W
Replace = Callable[[str, Tensor, Tensor], Tensor]


def step_shapes(config: LlamaConfig) -> dict[str, tuple[list[int], int]]:
    """For each step the rows of its layers, and their inputs."""
    h, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv": ([queries, keys, keys], h),
        "o": ([h], queries),
        "gate_up": ([config.intermediate_size] * 2, h),
        "down": ([h], config.intermediate_size),
    }


@dataclass(slots=True)
class DenseBlock:
    """W of each step (N, K), its bias if it has one, and the two norms. `weights` are replaced one by one."""

    weights: dict[str, Tensor]
    biases: Mapping[str, Tensor | None]
    attention_norm: RMSNorm
    mlp_norm: RMSNorm

    @classmethod
    def read(cls, checkpoint: Checkpoint, index: int, device: torch.device) -> DenseBlock:
        """Block `index` of a dense checkpoint. Raises BrokenCheckpoint."""
        config, at = checkpoint.config, f"model.layers.{index}"
        has_bias = {step: config.attention_bias if step in ("qkv", "o") else config.mlp_bias for step in STEPS}

        def tensor(name: str, *shape: int) -> Tensor:
            checkpoint.expect(f"{at}.{name}", shape, FLOATS)
            return checkpoint.tensor(f"{at}.{name}").to(device, torch.float32, copy=True)

        shapes = step_shapes(config)
        weights, biases = {}, {}
        for step, names in STEPS.items():
            rows, inputs = shapes[step]
            weights[step] = torch.cat([tensor(f"{n}.weight", m, inputs) for n, m in zip(names, rows, strict=True)])
            parts = [tensor(f"{n}.bias", m) for n, m in zip(names, rows, strict=True)] if has_bias[step] else []
            biases[step] = torch.cat(parts) if parts else None
        norms = [RMSNorm(tensor(f"{name}.weight", config.hidden_size), config.rms_norm_eps) for name in NORMS]
        return cls(weights, biases, *norms)

    def product(self, step: str, x: Tensor) -> Tensor:
        """x (…, K) → (…, N)."""
        return F.linear(x, self.weights[step], self.biases[step])


class Walk:
    """Windows of tokens on their way through the blocks of a model.

    `real` (W, T) bool marks tokens; what it does not mark is padding at the end of a window, which counts nowhere.
    """

    def __init__(self, config: LlamaConfig, real: Tensor, device: torch.device) -> None:
        self._config, self._real, self._device = config, real, device
        self._rope = Rope(config.rope, config.head_dim, device, torch.float32)

    @torch.inference_mode()
    def through(self, block: DenseBlock, hidden: Tensor, replace: Replace | None) -> None:
        """hidden (W, T, H) on the host: inputs of the block, overwritten with its outputs."""
        attention, mlp, device = block.attention_norm, block.mlp_norm, self._device
        self._settle(block, "qkv", lambda at: attention(hidden[at].to(device)), replace)
        mixed = self._each(lambda at: self._attend(block.product("qkv", attention(hidden[at].to(device)))))
        self._finish(block, "o", mixed, hidden, replace)
        del mixed  # before the wider one is made
        self._settle(block, "gate_up", lambda at: mlp(hidden[at].to(device)), replace)
        wide = self._each(lambda at: swiglu(block.product("gate_up", mlp(hidden[at].to(device)))))
        self._finish(block, "down", wide, hidden, replace)

    def _finish(self, block: DenseBlock, step: str, inputs: Tensor, hidden: Tensor, replace: Replace | None) -> None:
        """The step that ends in the residual: hidden (W, T, H) += inputs (W, T, K) through it."""
        self._settle(block, step, lambda at: inputs[at].to(self._device), replace)
        for at in self._batches():
            hidden[at] += block.product(step, inputs[at].to(self._device)).to(hidden.device)

    def _settle(self, block: DenseBlock, step: str, inputs: Callable[[slice], Tensor], replace: Replace | None) -> None:
        if replace is not None:
            block.weights[step] = replace(step, block.weights[step], self._moments(step, inputs))

    def _each(self, outputs: Callable[[slice], Tensor]) -> Tensor:
        """The outputs (w, T, K) of all batches, on the host (W, T, K)."""
        return torch.cat([outputs(at).cpu() for at in self._batches()])

    def _attend(self, heads: Tensor) -> Tensor:
        """Queries, keys and values (w, T, (heads + 2 KV heads) D) → (w, T, heads D)."""
        config = self._config
        windows, length = heads.shape[:2]
        rotation = self._rope.tables(torch.arange(length, device=self._device).repeat(windows))
        flat = heads.view(windows * length, -1, config.head_dim)
        qk = rotate(flat[:, : config.num_heads + config.num_kv_heads], rotation)
        q, k = qk[:, : config.num_heads], qk[:, config.num_heads :]
        out = CausalAttention(windows)(0, q, k, flat[:, config.num_heads + config.num_kv_heads :])
        return out.view(windows, length, -1)

    def _moments(self, step: str, inputs: Callable[[slice], Tensor]) -> Tensor:
        """Σ x xᵀ (K, K) over all real tokens."""
        width = step_shapes(self._config)[step][1]
        moments = torch.zeros(width, width, device=self._device)
        for at in self._batches():
            x = inputs(at)[self._real[at].to(self._device)]  # (t, K)
            moments.addmm_(x.t(), x)
        return moments

    def _batches(self) -> Iterator[slice]:
        windows, length = self._real.shape
        step = max(1, BATCH_TOKENS // length)
        return (slice(start, min(start + step, windows)) for start in range(0, windows, step))
