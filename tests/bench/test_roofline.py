"""The roofline on the CPU at a tiny shape: every figure is there, of work that was done."""

import sys
from dataclasses import replace

import torch

from bench import roofline
from bench.quantised_peer import nf4_model
from bench.roofline import LLAMA_7B, Figure, Roof

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


def test_vllm_stands_beside_our_steps_in_bf16(tmp_path):
    """Run by another Python: here one whose vLLM takes 2 ms a token, whatever the batch."""
    (tmp_path / "vllm.py").write_text(
        "import time\n"
        "class SamplingParams:\n"
        "    def __init__(self, max_tokens, **_): self.max_tokens = max_tokens\n"
        "class LLM:\n"
        "    def __init__(self, model, load_format, max_num_seqs, **_):\n"
        "        assert open(model + '/config.json').read() and load_format == 'dummy' and max_num_seqs == 64\n"
        "    def generate(self, prompts, params, use_tqdm):\n"
        "        assert all(len(each['prompt_token_ids']) == 16 for each in prompts)\n"
        "        time.sleep(0.002 * params.max_tokens)\n"
        "        print('a log line')\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    ours = [Figure(f"decode, {batch} at once", "bf16", 1.0, 1.0, 0.7) for batch in (1, 64)]
    found = roofline.beside_vllm(TINY, ours, python, "cpu", text=16)
    assert [f.what for f in found] == ["1 at once beside vLLM", "64 at once beside vLLM"]
    assert all(1 < f.milliseconds < 6 and f.share == f.milliseconds for f in found)
