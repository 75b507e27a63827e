"""A checkpoint folder that grows shard by shard and appears whole or not at all.

It is filled under another name beside the place where it is to stand; the last step gives it its own. So is each shard.
Knows the Hub's layout; knows no tensor by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from lab.disk import give_name, saving, write_file, write_json
from lab.errors import RunError
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
    """A checkpoint of so many shards on its way to `place`, which must be free. Raises ModelError, RunError."""

    def __init__(self, place: Path, shards: int) -> None:
        check_free(place)
        self.place, self._shards = place, shards
        self._growing = place.with_name(f".{place.name}.part")
        self._lock = FileLock(place.with_name(f".{place.name}.lock"), timeout=0)
        with saving(self._growing):
            self._growing.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise RunError(f"another process is writing {place}; wait for it, or choose another --out") from error

    def add(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number` (from 0); one that is there already is replaced. Raises RunError."""
        target = self._growing / self._name(number)
        held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with saving(target):
            write_file(target, lambda part: save_file(held, part, {"format": "pt"}))

    def require(self, count: int) -> None:
        """Raise RunError unless the first `count` shards are there, as a run that goes on believes."""
        for number in range(count):
            if not (self._growing / self._name(number)).is_file():
                raise RunError(f"{self._growing} lacks {self._name(number)}; remove the run's folder to start anew")

    def finish(self, source: Path, config: Mapping[str, Any], seal: Callable[[str], Manifest]) -> Manifest:
        """Write all that is not tensors, some of it copied from `source`; then give the folder its name.

        `seal` makes the manifest of the weights' digest. Raises RunError, ModelError.
        """
        with saving(self._growing):
            write_json(self._growing / INDEX, self._index())
            write_json(self._growing / "config.json", config)
            for name in COPIED:
                if (source / name).is_file():
                    shutil.copyfile(source / name, self._growing / name)
            manifest = seal(weights_digest(self._growing))
            manifest.write(self._growing)
            check_free(self.place)
            give_name(self._growing, self.place)
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
        return manifest

    def _index(self) -> dict[str, Any]:
        placed: dict[str, str] = {}
        total = 0
        for number in range(self._shards):
            file = self._growing / self._name(number)
            total += file.stat().st_size
            with open_shard(file) as shard:
                placed |= dict.fromkeys(shard.keys(), file.name)
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"


def check_free(place: Path) -> None:
    """Raise ModelError unless `place` is free or an empty folder."""
    if place.is_dir() and not any(place.iterdir()):
        return
    if place.exists():
        raise ModelError(f"{place} is there already and not empty; choose another folder for --out, or remove it")
