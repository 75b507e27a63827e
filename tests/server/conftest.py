"""One server for the tests that only ask, and fresh ones for those that change it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.served import Served, serving, stock


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("PROMPTSTITCH_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    """A server with the prompts of `stock`."""
    with serving(tmp_path_factory.mktemp("store"), prepare=stock) as server:
        yield server


@pytest.fixture
def fresh(tmp_path) -> Iterator[Served]:
    """The same, for one test alone."""
    with serving(tmp_path / "store", prepare=stock) as server:
        yield server
