"""One compression from its order to the finished folder: what is checked before, what is told after.

Knows files, names and sizes; knows no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lab.compress.allocation import ALLOCATIONS, Allocation, allocate
from lab.compress.block import STEPS, step_shapes
from lab.compress.folder import GrowingFolder, check_free
from lab.compress.job import LAYER, Job, Tokens
from lab.compress.level import Level
from lab.compress.methods import Recipe, choose
from lab.compress.sensitivity import TOKENS as MEASURED
from lab.compress.sensitivity import sensitivity
from lab.compress.storage import DenseStorage, PackedStorage, SparseStorage, Storage, Table
from lab.progress import Report
from lab.run import STATE, Run
from llama.checkpoint import Checkpoint
from llama.config import LlamaConfig
from llama.errors import UnsupportedModel
from llama.formats.promptstitch import with_q8_tables
from llama.identity import Identity, identify
from llama.load import choose_device, load
from llama.manifest import Manifest

EXPORTS = ("packed", "dense")
EMBEDDINGS = ("keep", "q8")
SWEEPS = 3
ALLOCATED = "allocated"  # among a run's figures: block, step and which of the level's alternatives
SEALED = "manifest"  # among a run's figures: what the checkpoint says of itself
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted. `method` None is the solver; `clip` None is yes where the solver makes a grid without sparsity;
    `sweeps`, as in `Recipe`, are the solver's alone; `export` is one of EXPORTS, `embedding`, the head's too, one of
    EMBEDDINGS, `allocation` one of ALLOCATIONS.
    """

    source: Path
    out: Path
    level: str
    method: str | None = None
    clip: bool | None = None
    sweeps: int = SWEEPS
    export: str = "packed"
    embedding: str = "keep"
    device: str = "auto"
    allocation: str = "uniform"


@dataclass(frozen=True, slots=True)
class Plan:
    """What an order comes to. Made by `planned`."""

    order: Order
    checkpoint: Checkpoint
    identity: Identity
    recipe: Recipe
    storage: Storage
    device: torch.device

    def config(self, data: str | None) -> dict[str, Any]:
        """All that the outcome depends on, for the run; `data` is the digest of the windows."""
        recipe = self.recipe
        return {
            "command": "compress",
            "base": self.identity.base,
            "source": self.identity.weights,
            "level": recipe.level.name,
            "method": recipe.method.name,
            "clip": recipe.clip,
            "sweeps": recipe.sweeps,
            "export": self.order.export,
            "embedding": self.order.embedding,
            "device": self.device.type,
            **({"allocation": self.order.allocation} if self.order.allocation != "uniform" else {}),
            "data": data,
            "out": str(self.order.out.absolute()),
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on disk of the dense and of the compressed checkpoint, of the latter in memory as it is served, and what
    the paper counts: 16-bit weights of the linear layers, and of the compressed ones just the codes that are kept, with
    nothing for scales and masks.
    """

    dense_disk: int
    disk: int
    resident: int
    paper_dense: int
    paper: int


def planned(order: Order) -> Plan:
    """Everything that can be found wrong without reading a weight is found here. Raises ModelError."""
    if Manifest.read(order.out) is None:  # ours may be of this very run, which then just tells of it
        check_free(order.out)
    level = Level.parse(order.level)
    method = choose(order.method, level)
    identity = identify(order.source)
    if identity.level != "dense":
        raise UnsupportedModel(f"{order.source} is {identity.level} already; compress the dense checkpoint")
    checkpoint = Checkpoint(order.source)
    level.check({step: inputs for step, (_, inputs) in step_shapes(checkpoint.config).items()})
    clip = method.solves and not level.sparsity if order.clip is None else order.clip
    if clip and not level.grid:
        raise UnsupportedModel(f"level {order.level} has no grid whose scales could be fitted; leave --scales out")
    if order.sweeps < 0:
        raise UnsupportedModel(f"sweeps is {order.sweeps}; it must be at least 0")
    if order.allocation not in ALLOCATIONS:
        raise UnsupportedModel(f"allocation is {order.allocation!r}; choose one of: {', '.join(ALLOCATIONS)}")
    if order.allocation != "uniform":
        level.alternatives()  # refuses a level that has none
        if not method.calibrated:
            raise UnsupportedModel(f"{method.name} looks at no text, and {order.allocation} is measured on it")
    recipe = Recipe(level, method, clip, order.sweeps if method.solves else 0)
    return Plan(order, checkpoint, identity, recipe, _storage(order, level, checkpoint), choose_device(order.device))


def compress(plan: Plan, tokens: Tokens | None, run: Run, report: Report) -> tuple[Manifest, Sizes]:
    """Carry the plan out, or on where `run` stands. `tokens` may be None for a method that looks at no inputs.

    The checkpoint appears in its place whole, after the last block. Raises ModelError, RunError.
    """
    checkpoint, config = plan.checkpoint, plan.checkpoint.config
    manifest = Manifest.read(plan.order.out)
    if manifest is None or run.figures.get(SEALED) != asdict(manifest):
        manifest = _solve(plan, tokens, run, report)
    loaded = load(plan.order.out, device="cpu")  # sizes that are told are measured, and the folder is known to load
    layers = linear_weights(config)
    sizes = Sizes(
        checkpoint.disk_bytes(),
        loaded.disk_bytes,
        loaded.resident_bytes,
        2 * layers,
        paper_bytes(layers, plan.recipe.level),
    )
    run.tell(layers=[{k: v for k, v in event.items() if k not in ("time", "event")} for event in run.events(LAYER)])
    (run.folder / STATE).unlink(missing_ok=True)  # hidden states, of no use any more
    return manifest, sizes


def _solve(plan: Plan, tokens: Tokens | None, run: Run, report: Report) -> Manifest:
    """Block after block into a folder that gets its name when it is whole. What it will say of itself is told first,
    so that a run that is cut off after it got its name knows it again."""
    checkpoint, order, config = plan.checkpoint, plan.order, plan.checkpoint.config
    folder = GrowingFolder(order.out, config.num_layers + 1)
    in_8_bits = order.embedding == "q8"
    tables = [Table.of(checkpoint, name, in_8_bits) for name in (EMBEDDING, *(() if config.tied else (HEAD,)))]
    embedded = None if tokens is None else tables[0].rows(tokens.ids)
    levels = {} if tokens is None else _levels(plan, tokens, tables, run, report)
    job = Job(checkpoint, plan.recipe, levels, plan.storage, folder, plan.device)
    for done in job.blocks(tokens, embedded, run):
        report("compress", done, config.num_layers)
    last = {name: tensor for table in tables for name, tensor in table.tensors.items()}
    folder.add(config.num_layers, {**last, FINAL_NORM: checkpoint.tensor(FINAL_NORM)})
    raw = {key: value for key, value in checkpoint.raw_config.items() if key != "quantization_config"}
    others = {
        f"model.layers.{index}.{name}": level
        for (index, step), level in sorted(levels.items())
        if level != plan.recipe.level
        for name in STEPS[step]
    }
    quantisation = plan.storage.quantisation(others)
    if quantisation := with_q8_tables(quantisation) if in_8_bits else quantisation:
        raw["quantization_config"] = quantisation
    identity = plan.identity

    def seal(weights: str) -> Manifest:
        how = "" if order.allocation == "uniform" else f", allocated by {order.allocation},"
        source = f"{plan.recipe.method.name}{how} of {identity.weights}"
        manifest = Manifest(identity.base, plan.recipe.level.name, weights, identity.name, source)
        run.tell(**{SEALED: asdict(manifest)}, embedding_lossless=all(table.lossless for table in tables))
        return manifest

    return folder.finish(order.source, raw, seal)


def _levels(plan: Plan, tokens: Tokens, tables: Sequence[Table], run: Run, report: Report) -> Allocation:
    """The level of each layer: found once, told in the run's figures and read there when it goes on."""
    if plan.order.allocation == "uniform":
        return {}
    choices = plan.recipe.level.alternatives()
    if ALLOCATED not in run.figures:
        few = Tokens(tokens.ids[: (n := -(-MEASURED // tokens.ids.shape[1]))], tokens.real[:n])
        head = plan.checkpoint.tensor(f"{tables[-1].module}.weight").to(plan.device, torch.float32)
        costs = sensitivity(plan.checkpoint, few, tables[0].rows(few.ids), choices, head, report)
        found = allocate(costs, choices, step_shapes(plan.checkpoint.config), plan.recipe.level)
        run.tell(**{ALLOCATED: [[*layer, choices.index(level)] for layer, level in sorted(found.items())]})
    return {(index, step): choices[choice] for index, step, choice in run.figures[ALLOCATED]}


def paper_bytes(weights: int, level: Level) -> int:
    """Bytes of so many weights as the paper counts them: codes of what is kept, or 16-bit weights without a grid."""
    bits = level.grid.bits if level.grid else 16
    kept = level.sparsity.keep / level.sparsity.of if level.sparsity else 1.0
    return round(weights * bits * kept / 8)


def linear_weights(config: LlamaConfig) -> int:
    """Weights of all linear layers of all blocks."""
    return config.num_layers * sum(sum(rows) * inputs for rows, inputs in step_shapes(config).values())


def _storage(order: Order, level: Level, checkpoint: Checkpoint) -> Storage:
    if order.export not in EXPORTS:
        raise UnsupportedModel(f"export is {order.export!r}; choose one of: {', '.join(EXPORTS)}")
    if order.embedding not in EMBEDDINGS:
        raise UnsupportedModel(f"embedding is {order.embedding!r}; choose one of: {', '.join(EMBEDDINGS)}")
    if order.export == "dense":
        return DenseStorage(checkpoint.tensor("model.layers.0.mlp.down_proj.weight").dtype)
    if level.grid and not level.sparsity:
        return PackedStorage(level.grid)
    return SparseStorage(level.name)
