"""Who a model is once it is loaded: the manifest's word, or the fingerprints of a checkpoint that has none.

Nothing is written and nothing is guessed from a path. Reads no weights where a manifest is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llama.errors import ModelError, UnsupportedModel
from llama.fingerprint import base_digest, derived_weights, weights_digest
from llama.formats import check_load_level, quantiser
from llama.level import declared_level
from llama.manifest import FILE, Manifest
from llama.shards import read_json

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
UNKNOWN_BASE = (
    "the dense model of this quantised checkpoint is unknown, so its own fingerprint is its base and prompts of the "
    "dense model may not fit; name the dense model's folder or digest as base"
)
_SPARSE = re.compile(r"s([0-9]+|2of4)")


@dataclass(frozen=True, slots=True)
class Identity:
    """`base` and `weights` are `sha256:<hex>`. `notes` tell people how they were found, where that matters."""

    name: str
    base: str
    level: str
    weights: str
    at_load: str | None = None  # what the dense weights are quantised to while they load
    notes: tuple[str, ...] = ()


def identify(directory: Path, level: str | None = None, base: str | None = None) -> Identity:
    """Who the checkpoint in `directory` is when loaded at `level` (None: as it is stored).

    `base` is the dense model that a foreign checkpoint was made from: its digest, or the folder of its checkpoint.
    Raises UnsupportedModel for a level that cannot be had, ModelError for a base that contradicts the manifest.
    """
    raw = read_json(directory / "config.json")
    declared = declared_level(raw)
    stored = _stored(directory, declared, None if base is None else base_of(base))
    if level is None or level == stored.level:
        return stored
    if declared != "dense":
        raise UnsupportedModel(
            f"the checkpoint is quantised already ({stored.level}) and cannot be loaded at {level}; "
            "leave the level out, or load the dense checkpoint that it was made from"
        )
    check_load_level(level)
    sparse = _SPARSE.fullmatch(stored.level) is not None
    if level == "dense" or not (sparse or stored.level == "dense"):
        raise UnsupportedModel(f"the checkpoint is {stored.level} and cannot be loaded at {level}")
    made = f"{level}-{stored.level}" if sparse else level
    weights = derived_weights(stored.weights, made, quantiser(level))
    return Identity(stored.name, stored.base, made, weights, level, stored.notes)


def _stored(directory: Path, declared: str, base: str | None) -> Identity:
    if manifest := Manifest.read(directory):
        if base not in (None, manifest.base):
            raise ModelError(f"the base given is {base}, but {directory / FILE} says {manifest.base}")
        return Identity(manifest.name, manifest.base, manifest.level, manifest.weights)
    notes = [f"{directory.name} has no {FILE}: its fingerprints were computed, which `promptstitch pull` saves"]
    if base is None and declared != "dense":
        notes.append(UNKNOWN_BASE)
    weights = weights_digest(directory)
    return Identity(directory.resolve().name, base or base_digest(directory), declared, weights, notes=tuple(notes))


def names_itself(directory: Path) -> bool:
    """Whether a quantised checkpoint was brought here without word of its dense model. Raises ModelError."""
    known = Manifest.read(directory)
    if known is None or known.level == "dense" or not known.source.startswith(("dir", "hub:")):
        return False
    return known.base == base_digest(directory)


def base_of(base: str) -> str:
    """The digest that is given, or that of the dense checkpoint in the folder that is. Raises ModelError."""
    if _DIGEST.fullmatch(base):
        return base
    directory = Path(base).expanduser()
    if not base or not directory.is_dir():
        raise ModelError(f"base is {base!r}; it must be sha256:<64 hex digits> or the folder of a dense checkpoint")
    manifest = Manifest.read(directory)
    return manifest.base if manifest else base_digest(directory)
