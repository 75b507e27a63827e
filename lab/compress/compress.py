"""One compression from its order to the finished folder: what is checked before, what is told after.

Everything on the way lies in a run folder; the checkpoint appears in its place whole, as the last step. Knows files
and sizes; knows no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.compress.block import step_shapes
from lab.compress.folder import GrowingFolder, check_free
from lab.compress.job import EMBEDDING, FINAL_NORM, HEAD, Tokens, compress_blocks
from lab.compress.level import Level
from lab.compress.methods import Recipe, choose
from lab.compress.state import LayerReport, State
from lab.compress.storage import DenseStorage, PackedStorage, Storage
from llama.checkpoint import Checkpoint
from llama.config import LlamaConfig
from llama.errors import UnsupportedModel
from llama.identity import Identity, identify
from llama.load import load
from llama.manifest import Manifest

EXPORTS = ("packed", "dense")


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted. `method` None is the solver, `clip` None is yes where the solver makes a grid without sparsity;
    `sweeps` as in `Recipe`, for the solver alone; `export` is one of EXPORTS."""

    source: Path
    out: Path
    level: str
    method: str | None = None
    clip: bool | None = None
    sweeps: int = 3
    export: str = "packed"
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Result:
    """A finished checkpoint. Bytes are real ones, of files and of the loaded model; `paper_bytes` count as the paper
    does: codes of the linear weights that are kept, nothing for scales, masks, embeddings and norms."""

    folder: Path
    manifest: Manifest
    method: str
    clip: bool
    disk_bytes: int
    dense_disk_bytes: int
    resident_bytes: int
    paper_bytes: int
    layers: tuple[LayerReport, ...]


def compress(order: Order, tokens: Tokens | None, run: Path, progress: Callable[[int, int], None]) -> Result:
    """Carry the order out. `run` is its folder for what is not finished; `progress` hears of blocks done, and of all.

    `tokens` may be None for a method that does not look at inputs. Raises ModelError, OSError; either way nothing
    stands at `order.out`, and the same order goes on where this one stopped.
    """
    check_free(order.out)
    checkpoint, identity, recipe, storage = prepared(order)
    file, config = run / "state.safetensors", checkpoint.config
    growing = run / "model"
    folder = GrowingFolder(order.out, growing, config.num_layers + 1)

    def save(state: State) -> None:
        state.save(file)
        progress(state.done, config.num_layers)

    state = State.load(file)
    progress(state.done if state else 0, config.num_layers)
    device = torch.device(order.device)
    layers = compress_blocks(checkpoint, folder, storage, recipe, tokens, device, state, save)
    ends = [EMBEDDING, FINAL_NORM, *(() if config.tied else (HEAD,))]
    folder.add(config.num_layers, {name: checkpoint.tensor(name) for name in ends})
    raw = {key: value for key, value in checkpoint.raw_config.items() if key != "quantization_config"}
    if quantisation := storage.quantisation():
        raw["quantization_config"] = quantisation
    origin = f"{identity.weights} {recipe.method.name}"
    manifest = folder.finish(order.source, raw, identity.base, order.level, identity.name, origin)
    file.unlink()
    loaded = load(order.out, device="cpu")  # what is told is measured, and the folder is known to load
    return Result(
        folder=order.out,
        manifest=manifest,
        method=recipe.method.name,
        clip=recipe.clip,
        disk_bytes=loaded.disk_bytes,
        dense_disk_bytes=checkpoint.disk_bytes(),
        resident_bytes=loaded.resident_bytes,
        paper_bytes=paper_bytes(config, recipe.level),
        layers=layers,
    )


def prepared(order: Order) -> tuple[Checkpoint, Identity, Recipe, Storage]:
    """What the order comes to, found out without reading a weight. Raises ModelError for what it cannot have."""
    level = Level.parse(order.level)
    method = choose(order.method, level)
    identity = identify(order.source)
    if identity.level != "dense":
        raise UnsupportedModel(f"{order.source} is {identity.level} already; compress the dense checkpoint")
    checkpoint = Checkpoint(order.source)
    level.check({step: inputs for step, (_, inputs) in step_shapes(checkpoint.config).items()})
    clip = method.solves and not level.sparsity if order.clip is None else order.clip
    if clip and not level.grid:
        raise UnsupportedModel(f"level {order.level} has no grid whose scales could be searched; leave --clip out")
    return checkpoint, identity, Recipe(level, method, clip, order.sweeps), _storage(order.export, level, checkpoint)


def paper_bytes(config: LlamaConfig, level: Level) -> int:
    """The size as the paper counts it: of 16-bit weights if there is no grid."""
    bits = level.grid.bits if level.grid else 16
    kept = level.sparsity.keep / level.sparsity.of if level.sparsity else 1.0
    return round(linear_weights(config) * bits * kept / 8)


def linear_weights(config: LlamaConfig) -> int:
    """Weights of all linear layers of all blocks."""
    return config.num_layers * sum(sum(rows) * inputs for rows, inputs in step_shapes(config).values())


def _storage(export: str, level: Level, checkpoint: Checkpoint) -> Storage:
    if export not in EXPORTS:
        raise UnsupportedModel(f"export is {export!r}; choose one of: {', '.join(EXPORTS)}")
    if export == "dense":
        return DenseStorage(checkpoint.tensor("model.layers.0.mlp.down_proj.weight").dtype)
    if level.grid and not level.sparsity:
        return PackedStorage(level.grid)
    raise UnsupportedModel(f"level {level.name} has no packed form; --export dense")
