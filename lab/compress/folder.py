"""A checkpoint folder that grows shard by shard and appears whole or not at all.

It is filled under a name of its own beside the place where it is to stand; the last step gives it that name. Every
shard is complete once it has its name. Knows the Hub's layout; knows no tensor by name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llama.errors import ModelError
from llama.fingerprint import weights_digest
from llama.manifest import Manifest
from llama.shards import INDEX, open_shard

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class GrowingFolder:
    """`growing` is where it is filled; `place` where it will stand, which must be free."""

    def __init__(self, place: Path, growing: Path, shards: int) -> None:
        self.place, self._growing, self._shards = place, growing, shards
        check_free(place)
        growing.mkdir(parents=True, exist_ok=True)

    def add(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number` (from 0); one that is there already is replaced. Raises OSError."""
        target = self._growing / self._name(number)
        scratch = target.with_suffix(".part")
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, scratch, metadata={"format": "pt"})
        publish(scratch, target)

    def finish(
        self, source: Path, config: Mapping[str, Any], base: str, level: str, name: str, origin: str
    ) -> Manifest:
        """Write all that is not tensors, then give the folder its name. Raises OSError, BrokenCheckpoint."""
        placed: dict[str, str] = {}
        total = 0
        for number in range(self._shards):
            file = self._growing / self._name(number)
            total += file.stat().st_size
            with open_shard(file) as shard:
                placed |= dict.fromkeys(shard.keys(), file.name)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        _write_json(self._growing / INDEX, index)
        _write_json(self._growing / "config.json", config)
        for file_name in COPIED:
            if (source / file_name).is_file():
                shutil.copyfile(source / file_name, self._growing / file_name)
        manifest = Manifest(base, level, weights_digest(self._growing), name, origin)
        manifest.write(self._growing)
        check_free(self.place)
        publish(self._growing, self.place)
        return manifest

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"


def check_free(place: Path) -> None:
    """Raise ModelError unless `place` is free or an empty folder."""
    if place.is_dir() and not any(place.iterdir()):
        return
    if place.exists():
        raise ModelError(f"{place} is there already and not empty; choose another folder for --out, or remove it")


def publish(scratch: Path, target: Path) -> None:
    """Give what was written as `scratch` its name, so that it outlives a crash of the machine. Raises OSError."""
    _sync(scratch)
    os.replace(scratch, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
