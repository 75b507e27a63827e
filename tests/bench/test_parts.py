"""The parts of a decode step on a tiny model: all of them, floors that are arithmetic, and the page that tells them."""

import json

import pytest
import torch
from support import checkpoints

from bench import page, parts
from bench.parts import Rates


@pytest.mark.parametrize("level", [None, "w4g32"])
def test_every_part_of_a_step_stands_beside_its_floor(tmp_path, level, monkeypatch):
    monkeypatch.setattr(parts, "TRIES", 2)
    checkpoint = checkpoints.save(tmp_path / "model", checkpoints.model())
    rates = Rates(read=1e9, bf16=1e12, int8=2e12)
    with torch.inference_mode():
        found = parts.parts(checkpoint, level, 2, rates)
    by_name = {part.name: part for part in found}
    names = ["qkv", "o", "gate_up", "down", "attention", "head", "between them, through Python", "all, as served"]
    assert list(by_name) == names
    assert all(part.took > 0 for part in found)
    floors = [part.floor for part in found[:6]]
    assert by_name["all, as served"].floor == pytest.approx(sum(floors))
    assert {part.bound for part in found[:6]} == {"reading"}  # at these rates
    if level is None:
        weight = found[3]  # down: layers * hidden * inner in bf16
        config = json.loads((checkpoint / "config.json").read_text())
        read = 2 * config["num_hidden_layers"] * config["hidden_size"] * config["intermediate_size"]
        assert weight.floor == pytest.approx(read / 1e9 * 1e3, rel=0.3)  # rows are filled up to whole panels
    told = tmp_path / "parts.json"
    told.write_text(json.dumps(parts.report(rates, found)))
    page.main([told], tmp_path / "docs")
    text = (tmp_path / "docs/performance.md").read_text()
    assert f"| head | {page.short(by_name['head'].took)} | {page.short(by_name['head'].floor)} | reading |" in text


def test_rates_are_those_of_a_machine():
    rates = Rates.measured(side=64)
    assert min(rates.read, rates.bf16, rates.int8) > 1e6
