"""The checkpoint of `support.hub`, in a folder of the test's own."""

import pytest
from support.hub import tensors, write_checkpoint


@pytest.fixture
def make_checkpoint(tmp_path):
    """make_checkpoint(name, config=…, state=…, shards=…, template=…) -> folder."""
    return lambda name="model", **changes: write_checkpoint(tmp_path / name, **changes)


@pytest.fixture
def state():
    """The tensors of the checkpoint that make_checkpoint writes by default."""
    return tensors()
