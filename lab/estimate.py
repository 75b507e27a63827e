"""What a run will take before it is started: seconds, and bytes of memory.

Memory is the larger of two moments.

    teaching   the dense model in `dtype`, and one batch of scoring
    learning   weights + one block dequantised + activations + a chunk of logits, and the dense model's head

    weights      `packed`: stored bits of the blocks' linears, 2- and 3-bit codes as 4-bit ones; as a copy: all of them
                 in the compute dtype (c bytes); and the tables, V H a table, twice if untied. In int8 linears and head
                 are there twice, a byte and a sixteenth each, the embedding and all activations in fp32
    one block    its linears in the compute dtype: what the way back through a packed product rebuilds, layer by layer
    activations  of B T text tokens and B N positions before them, in each of L blocks, what the way back needs:
                 MLP 3 I c (2 I c in fp32 on the CPU, where one kernel goes back through SwiGLU), two norms 2 H 4, q
                 and what attention gives (2 heads + KV heads) D c, for each text token,
                 and 2 KV heads D c for each text token and position; a mask T (T + N) c. Heads that share keys and
                 values behind a mask have them repeated on CUDA (`llama.sdpa`): 2 heads D c more for each.
                 Recomputed: one H c a block, and one block whole.
    logits       four times a chunk in fp32, of 2^20 elements on the CPU and 2^23 on CUDA, or B T V where that is less
    learned      six times the prompt in fp32: itself, its gradient, two moments, the average and the best
    libraries    120 MB of their own
    slack        on the CPU a quarter of all: freed pieces that the C library keeps (MALLOC_MMAP_THRESHOLD_=131072 in
                 the environment makes it give them back, at some cost in speed)

Time is arithmetic over speeds in tokens a second, measured by products of the model's width, or told. Knows
shapes; knows no weights.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from lab.compress.compress import linear_weights
from lab.evaluate.score import BATCH_TOKENS
from lab.evaluate.score import LOGITS as SCORED_LOGITS
from lab.learn.losses import LOGITS
from lab.learn.recipe import Recipe
from llama import native
from llama.config import LlamaConfig
from llama.integers import IntegerLinear, fits
from llama.linear import DenseLinear, Linear
from llama.native import GROUP
from prompts_store.level import parse_level

SHARE = 0.45  # of a lone product's speed that the whole forward pass reaches
BACKWARD = 2.0  # forward and backward by activations alone, in forwards
PRODUCT_ROWS, PRODUCT_OUTPUTS = 512, 4096  # at most
LIBRARIES = 120_000_000  # bytes
SLACK = 0.25
CODES = {2: 4, 3: 4}  # bits that codes take in memory
INTEGERS = 2 * (1 + 4 / GROUP)  # bytes of a weight in int8 with its scale, forth and back
COPIES = 6  # of what is learned


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    teaching: int
    weights: int
    block: int
    activations: int
    logits: int
    learned: int
    head: int
    slack: float = 0.0  # share of what is learned with

    @property
    def learning(self) -> int:
        whole = self.weights + self.block + self.activations + self.logits + self.learned + self.head + LIBRARIES
        return round(whole * (1 + self.slack))

    @property
    def peak(self) -> int:
        return max(self.teaching, self.learning)

    def told(self) -> dict[str, int]:
        """As JSON: the peak and what it is made of."""
        parts = {name: size for name, size in asdict(self).items() if name != "slack"}
        return {"peak": self.peak, **parts}


def memory(config: LlamaConfig, level: str, kind: str, recipe: Recipe, compute: str, dtype: str, cuda: bool) -> Memory:
    """Of learning as `lab.learn` does it, by the formula above. `compute` and `dtype` are settled names."""
    served = 2 if dtype in ("bfloat16", "float16") else 4
    item = served if compute == "packed" else 2 if compute == "bfloat16" else 4
    linears, block = linear_weights(config), linear_weights(config) // config.num_layers
    table = config.vocab_size * config.hidden_size
    tables = table * (1 if config.tied else 2)
    packed = compute == "packed" and level != "dense"
    if packed:
        weights = int(linears * resident_bits(level) / 8) + tables * served
    elif compute == "int8":
        weights = int((linears + table) * INTEGERS) + table * item
    else:
        weights = (linears + tables) * item
    micro = recipe.micro or recipe.batch
    positions = recipe.positions if kind in ("rows", "kv") else 0
    activations = _activations(config, micro, recipe.window, positions, item, recipe.recompute, cuda)
    distils = recipe.distil > 0 and level != "dense"
    logits = 4 * 4 * min(LOGITS["cuda" if cuda else "cpu"], micro * recipe.window * config.vocab_size)
    teaching = (linears + tables) * served + _scoring(config, served, cuda) if distils else 0
    rebuilt, head = block * item if packed else 0, table * served * distils
    learned = COPIES * 4 * learned_elements(config, kind, recipe.positions)
    return Memory(teaching, weights, rebuilt, activations, logits, learned, head, 0.0 if cuda else SLACK)


def learned_elements(config: LlamaConfig, kind: str, n: int) -> int:
    """Parameters that are learned; n positions, of LoRA the rank."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "rows": n * config.hidden_size,
        "kv": 2 * config.num_layers * n * kv,
        "lora": config.num_layers * n * (2 * config.hidden_size + q + kv),
        "norms": (2 * config.num_layers + 1) * config.hidden_size,
    }[kind]


def resident_bits(level: str) -> float:
    """Bits that a weight of a block's linear takes in memory while it stays packed, scale and bitmap counted."""
    told = parse_level(level)
    if told.quant is None:
        return 16 * (1 - told.sparsity) + 1 if told.sparsity else 16.0
    whole = int(told.quant_bits)
    codes, scales = CODES.get(whole, whole), told.quant_bits - whole
    return codes * (1 - told.sparsity) + scales + bool(told.sparsity)


def forward_flops(config: LlamaConfig) -> float:
    """Of a token through all blocks and the head."""
    return 2.0 * (linear_weights(config) + config.vocab_size * config.hidden_size)


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens a second of learning, and of what is only read."""

    learning: float
    scoring: float

    @classmethod
    def of_learning(cls, speed: float) -> Speeds:
        """Where nothing but that is known."""
        return cls(speed, BACKWARD * speed)


def speeds(config: LlamaConfig, device: torch.device, compute: str, dtype: str) -> Speeds:
    """From two products of the model's width, some tenths of a second long. `compute` and `dtype` are settled names."""
    learning = _forward_speed(config, device, dtype if compute == "packed" else compute) / BACKWARD
    return Speeds(learning, _forward_speed(config, device, dtype))


def _forward_speed(config: LlamaConfig, device: torch.device, numerics: str) -> float:
    generator = torch.Generator(device).manual_seed(0)
    outputs = min(2 * config.intermediate_size, PRODUCT_OUTPUTS)
    x = torch.randn(PRODUCT_ROWS, config.hidden_size, generator=generator, device=device)
    layer = _product(torch.randn(outputs, config.hidden_size, generator=generator, device=device), numerics)
    x = x.to(torch.float32 if numerics == "int8" else getattr(torch, numerics))
    best = min(_seconds(layer, x) for _ in range(3))
    rate = 2.0 * x.shape[0] * outputs * config.hidden_size / best
    return SHARE * rate / forward_flops(config)


def _product(weight: torch.Tensor, numerics: str) -> Linear:
    """As the model multiplies it."""
    if numerics == "int8" and fits(weight) and (kernels := native.kernels()):
        return IntegerLinear(kernels, weight)
    layer = DenseLinear(weight.to(torch.float32 if numerics == "int8" else getattr(torch, numerics)))
    layer.prepare()
    return layer


@torch.inference_mode()
def _seconds(layer: Linear, x: torch.Tensor) -> float:
    """Of a product, with the wait for a GPU."""
    calls = 20 if x.is_cuda else 1  # there one takes less than its launch
    began = time.perf_counter()
    for _ in range(calls):
        y = layer(x)
    float(y[0, 0])
    return max(time.perf_counter() - began, 1e-9) / calls


def _activations(
    c: LlamaConfig, batch: int, window: int, positions: int, item: int, recompute: bool, cuda: bool
) -> int:
    tokens, before = batch * window, batch * positions
    kv = c.num_kv_heads * c.head_dim
    heads = c.num_heads * c.head_dim
    mlp = (2 if item == 4 and not cuda else 3) * c.intermediate_size
    one = tokens * (mlp * item + 2 * c.hidden_size * 4 + (2 * heads + kv) * item)
    one += 2 * kv * item * (tokens + before) + window * (window + positions) * item
    if cuda and positions and c.num_heads > c.num_kv_heads:
        one += 2 * heads * item * (tokens + before)
    if recompute:
        return c.num_layers * tokens * c.hidden_size * item + one
    return c.num_layers * one


def _scoring(c: LlamaConfig, item: int, cuda: bool) -> int:
    """Of the dense model's pass over a batch: a residual, an MLP, a chunk of logits."""
    logits = 4 * SCORED_LOGITS["cuda" if cuda else "cpu"]
    return BATCH_TOKENS * (2 * c.hidden_size + 3 * c.intermediate_size) * item + logits
