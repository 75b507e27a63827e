"""A prompt's identity: what is part of it, and that it never changes between releases."""

from dataclasses import replace

import pytest
import torch

from prompts_store.prompt import SoftPrompt

BASE = "sha256:" + "ba" * 32


def prompt(**changes) -> SoftPrompt:
    rows = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    return replace(SoftPrompt("rows", BASE, {"prompt_embeddings": rows}), **changes)


def test_the_digest_is_the_one_that_stored_prompts_have():
    assert prompt().digest == "sha256:614501a52a4fdb8568b698ddefef2bde04a846b2aa2382f171892e334164fc19"


@pytest.mark.parametrize(
    "changes",
    [
        {"base": "sha256:" + "0b" * 32},
        {"bos": "none"},
        {"chat_template": "sha256:" + "c0" * 32},
        {"tensors": {"prompt_embeddings": torch.arange(6, dtype=torch.float32).reshape(3, 2)}},
        {"tensors": {"prompt_embeddings": torch.arange(6, dtype=torch.float32).reshape(2, 3) + 2**-20}},
    ],
    ids=["base", "bos", "chat_template", "shape", "values"],
)
def test_every_part_of_the_identity_changes_the_digest(changes):
    assert prompt(**changes).digest != prompt().digest
    assert prompt(**changes) != prompt()


def test_keys_and_values_do_not_swap():
    one, two = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    there = SoftPrompt("kv", BASE, {"keys": one, "values": two})
    back = SoftPrompt("kv", BASE, {"keys": two, "values": one})
    assert there.digest != back.digest
    assert there.digest == SoftPrompt("kv", BASE, {"values": two, "keys": one}).digest


def test_counts():
    assert (prompt().num_virtual_tokens, prompt().hidden_size) == (2, 3)
    deep = SoftPrompt("kv", BASE, {name: torch.zeros(5, 1, 7, 4) for name in ("keys", "values")})
    assert (deep.num_virtual_tokens, deep.hidden_size) == (7, None)


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("rows", {"rows": torch.zeros(2, 3)}),
        ("rows", {"prompt_embeddings": torch.zeros(2, 3, dtype=torch.float64)}),
        ("rows", {"prompt_embeddings": torch.zeros(3, 2).t()}),
        ("rows", {"prompt_embeddings": torch.zeros(6)}),
        ("rows", {"prompt_embeddings": torch.zeros(0, 3)}),
        ("kv", {"keys": torch.zeros(1, 1, 2, 4)}),
        ("kv", {"keys": torch.zeros(1, 1, 2, 4), "values": torch.zeros(1, 1, 3, 4)}),
    ],
    ids=["name", "dtype", "stride", "rank", "empty", "no values", "two shapes"],
)
def test_what_is_no_prompt(kind, tensors):
    with pytest.raises(ValueError):
        SoftPrompt(kind, BASE, tensors)


def test_the_first_positions_are_a_prompt_of_their_own(rows, kv):
    cut = rows(1, n=4).first(3)
    assert torch.equal(cut.tensors["prompt_embeddings"], rows(1, n=4).tensors["prompt_embeddings"][:3])
    deep = kv(1, n=3).first(2)
    assert (deep.shape, deep.tensors["keys"].tolist()) == ((2, 1, 2, 4), kv(1, n=3).tensors["keys"][:, :, :2].tolist())
    assert len({cut.digest, rows(1, n=4).digest, rows(1, n=4).first(2).digest}) == 3
    assert rows(1, n=4, bos="none").first(3).bos == "none"
    assert rows(1).first(4) == rows(1)
    for n in (0, 5, -1):
        with pytest.raises(ValueError):
            rows(1, n=4).first(n)
