"""The roofline on the CPU at a tiny shape: every figure is there, of work that was done."""

from dataclasses import replace

import torch

from bench import roofline
from bench.quantised_peer import nf4_model
from bench.roofline import LLAMA_7B, Roof

TINY = replace(LLAMA_7B, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
               intermediate_size=256, vocab_size=512)  # fmt: skip


def test_figures_are_of_both_levels(monkeypatch):
    monkeypatch.setattr(roofline, "TRIES", 1)
    with torch.inference_mode():
        found = roofline.measure(TINY, torch.device("cpu"), side=64, text=16)
    assert [(f.level, f.must) for f in found] == [("bf16", m) for m in (0.7, 0.5, 0.97, 0.5)] + [
        ("w4g128", 0.4), ("w4g128", 0.5), ("nf4", 10.0), ("w4g128", 0.97), ("w4g128", 0.5)
    ]  # fmt: skip
    assert all(f.milliseconds > 0 and f.share > 0 for f in found)


def test_the_peer_runs_all_of_its_blocks_in_nf4():
    model = nf4_model(TINY, torch.device("cpu"))
    linears = [layer for layer in model.model.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linears) == 7 * TINY.num_layers
    assert all(layer.weight.quant_state.quant_type == "nf4" for layer in linears)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_roof_is_what_takes_longer():
    roof = Roof(copied=10.0, multiplied=100.0)
    assert roof.seconds(read=50, operations=100) == 5
    assert roof.seconds(read=5, operations=100) == 1
