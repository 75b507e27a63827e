"""What the engine's sizes come to for a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.options import EngineOptions

SEVENTY = SimpleNamespace(
    num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, vocab_size=128_256, max_len=131_072, tied=False
)


@pytest.fixture
def free(monkeypatch):
    """free(bytes): so much is left on a GPU."""

    def left(size: float) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (int(size), 80_000_000_000))

    return left


def on_gpu(config=SEVENTY):
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, config=config)


def test_pages_on_a_gpu_leave_room_for_what_steps_take(free):
    """They took nine tenths of what was free, and the first large step found no memory."""
    page = 2 * 80 * 16 * 8 * 128 * 2
    stretches = 2 * 4 * 256 * 64 * (131_072 // 256) * (128 + 2)
    free(60e9)
    assert EngineOptions().num_pages(on_gpu()) * page < 0.9 * 60e9 - stretches
    free(9e9)
    with pytest.raises(ValueError, match=r"KV budget of 0 bytes holds 0 pages .* --kv-memory"):
        EngineOptions().num_pages(on_gpu())
    assert EngineOptions(kv_bytes=1 << 30).num_pages(on_gpu()) == (1 << 30) // page
    # Fewer at once, and shorter ones, need less.
    assert EngineOptions(max_running=32, max_model_len=8192).num_pages(on_gpu()) > 1000
