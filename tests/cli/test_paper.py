"""Prompts that the paper's code saved come in, and nothing that a pickle holds besides is run."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from prompts_store.file import read_prompt

FILED = ("--level", "w4g64-s50", "--task", "paper")


def saved(form: str):
    rows = nn.Parameter(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    embedding = nn.Embedding(5, 64)
    embedding.weight = rows
    state = {"soft_prompt.weight": rows, "model.norm.weight": torch.ones(64)}
    held = {
        "best.pth": {"model": state, "optimizer": {"lr": 1e-3}},
        "parallel": {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        "save_soft_prompt": embedding,
        "state": embedding.state_dict(),
    }
    return held[form], rows.detach().float()


@pytest.mark.parametrize("form", ["best.pth", "parallel", "save_soft_prompt", "state"])
def test_rows_come_in_bit_for_bit(answer, model, base, tmp_path, form):
    held, rows = saved(form)
    torch.save(held, tmp_path / "saved")
    out = tmp_path / "out.safetensors"
    answer("prompts", "import-paper", tmp_path / "saved", "--model", model, *FILED, "--out", out)
    file = read_prompt(out)
    assert torch.equal(file.prompt.tensors["prompt_embeddings"], rows)
    assert (file.prompt.base, file.prompt.bos) == (base, "none")  # the paper's own layout has none
    assert (file.provenance.level, file.provenance.task) == ("w4g64-s50", "paper")
    pushed = answer(
        "prompts", "import-paper", tmp_path / "saved", "--model", model, *FILED, "--store", tmp_path / "store"
    )
    assert (pushed["digest"], pushed["task"], pushed["new"]) == (file.prompt.digest, "paper", True)


class Harm:
    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize(
    ("held", "word"),
    [
        (Harm, "nothing else is let in"),
        (lambda _: {"model": {"other.weight": torch.ones(5, 64)}}, "soft_prompt.weight"),
        (lambda _: {"soft_prompt.weight": torch.ones(5, 64).to_sparse()}, "soft_prompt.weight"),
        (lambda _: {"soft_prompt.weight": torch.ones(5, 64, dtype=torch.int64)}, "soft_prompt.weight"),
        (lambda _: {"soft_prompt.weight": torch.ones(5, 32)}, "32"),
        (lambda _: {"soft_prompt.weight": torch.full((5, 64), float("nan"))}, "finite"),
        (lambda _: [1, 2], "soft_prompt.weight"),
    ],
)
def test_anything_else_is_one_line_and_is_not_run(cli, model, tmp_path, held, word):
    torch.save(held(str(tmp_path / "harm")), tmp_path / "saved")
    out = tmp_path / "out.safetensors"
    refused = cli("prompts", "import-paper", tmp_path / "saved", "--model", model, *FILED, "--out", out)
    assert refused.exit_code in (1, 2)
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert word in refused.stderr
    assert not (tmp_path / "harm").exists()
    assert not out.exists()


def test_what_is_no_pickle_is_one_line(cli, model, tmp_path):
    (tmp_path / "saved").write_bytes(b"not this")
    refused = cli("prompts", "import-paper", tmp_path / "saved", "--model", model, *FILED)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1), refused.stderr
