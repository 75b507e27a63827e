"""A checkpoint's files as named tensors: shapes from the headers, values by rows, and who asked for what.

Values are views of memory-mapped files wherever they can be: copy what is to outlive the loading. Knows no layer and no
format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.errors import BrokenCheckpoint
from llama.shards import open_shard, read_json, tensor_files


class Checkpoint:
    """The Hub's layout in `directory`: config.json and safetensors, sharded or not.

    Raises BrokenCheckpoint if files are missing or torn, UnsupportedModel if it is no LLaMA.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.raw_config = read_json(directory / "config.json")
        self.config = LlamaConfig.from_hf(self.raw_config)
        files = tensor_files(directory)
        shards = {path: open_shard(path) for path in set(files.values())}
        self._shards = {name: shards[path] for name, path in files.items()}
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        """Raise BrokenCheckpoint unless the tensor is there with this shape and one of these dtypes (`F32`, …)."""
        piece = self._slice(name)
        found, dtype = tuple(piece.get_shape()), piece.get_dtype()
        if found != shape:
            raise BrokenCheckpoint(f"{name} has shape {list(found)}, expected {list(shape)}")
        if dtype not in dtypes:
            raise BrokenCheckpoint(f"{name} is {dtype}, expected {' or '.join(dtypes)}")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """tensor[start:stop] as stored. Raises BrokenCheckpoint for a weight that is NaN or infinite."""
        return _finite(name, self._slice(name)[start:stop], start)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """tensor[:, start:stop] as stored."""
        columns: Tensor = self._slice(name)[:, start:stop]
        return columns

    def tensor(self, name: str) -> Tensor:
        """The whole tensor as stored. Raises BrokenCheckpoint for a weight that is NaN or infinite."""
        self._slice(name)
        return _finite(name, self._shards[name].get_tensor(name))

    def octets(self, name: str) -> Tensor:
        """The bytes of a tensor (n,) uint8, whatever dtype they are filed under."""
        self._slice(name)
        stored: Tensor = self._shards[name].get_tensor(name)
        return stored.flatten().view(torch.uint8)

    def unused(self) -> list[str]:
        """Names that nobody asked for, in order."""
        return sorted(self._shards.keys() - self._used)

    def disk_bytes(self) -> int:
        """Bytes of the tensors' files."""
        return sum(path.stat().st_size for path in set(tensor_files(self.directory).values()))

    def _slice(self, name: str) -> Any:
        if name not in self._shards:
            raise BrokenCheckpoint(f"{self.directory} lacks the tensor {name}")
        self._used.add(name)
        return self._shards[name].get_slice(name)


def _finite(name: str, values: Tensor, first: int = 0) -> Tensor:
    """`values` of a weight or bias, which begin at row `first`; scales are judged by who knows their module."""
    if not (values.is_floating_point() and name.endswith((".weight", ".bias"))):
        return values
    if bool(values.sum(dtype=torch.float32).isfinite()):  # four times as fast as looking at each
        return values
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        row, *column = bad[0].tolist()
        raise BrokenCheckpoint(f"{name}{[first + row, *column]} is NaN or infinite")
    return values
