"""One server for the tests that only ask."""

from collections.abc import Iterator

import pytest
from support.process import Process, running


@pytest.fixture(scope="module")
def default(embedded, tmp_path_factory) -> Iterator[Process]:
    """What `make serve` starts, on a new store."""
    folder = tmp_path_factory.mktemp("default")
    with running(embedded, "--level", "w3g64", "--store", folder / "store", log=folder / "log") as server:
        yield server
