"""Small prompts and stores for the registry's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prompts_store.prompt import SoftPrompt
from prompts_store.store import PromptStore

MakePrompt = Callable[..., SoftPrompt]


@pytest.fixture(scope="session")
def base() -> str:
    return "sha256:" + "ba" * 32


@pytest.fixture(scope="session")
def other_base() -> str:
    return "sha256:" + "0b" * 32


@pytest.fixture(scope="session")
def rows(base: str) -> MakePrompt:
    """rows(seed, n, h): a prompt of kind rows; one seed, one digest."""

    def make(seed: int = 0, n: int = 4, h: int = 8, base: str = base, **layout: str) -> SoftPrompt:
        values = torch.randn(n, h, generator=torch.Generator().manual_seed(seed))
        return SoftPrompt("rows", base, {"prompt_embeddings": values}, **layout)

    return make


@pytest.fixture(scope="session")
def kv(base: str) -> MakePrompt:
    """kv(seed, layers, heads, n, d): a deep prompt."""

    def make(seed: int = 0, layers: int = 2, heads: int = 1, n: int = 3, d: int = 4) -> SoftPrompt:
        random = torch.Generator().manual_seed(seed)
        keys, values = (torch.randn(layers, heads, n, d, generator=random) for _ in range(2))
        return SoftPrompt("kv", base, {"keys": keys, "values": values})

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PromptStore]:
    with PromptStore.open(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def blob_files(tmp_path: Path) -> Callable[[], list[str]]:
    """The names of the blobs of `store`."""
    return lambda: sorted(path.name for path in (tmp_path / "store" / "blobs" / "sha256").glob("*/*"))
