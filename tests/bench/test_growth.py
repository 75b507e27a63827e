"""How cost grows, measured on a fake server and written down; the registry filled as its own pushes would."""

import json
import sys
from pathlib import Path

import pytest
from support.served import prompt_file

from bench import forms, growth, page
from bench.growth import Axis, Growth
from bench.server import Contestant
from bench.workload import load_tokenizer
from prompts_store.store import PromptStore

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


def test_an_axis_is_measured_at_each_contestant_in_turn_and_drawn(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(FAKE_SERVER), "{port}"]
    both = [Contestant(name, "bf16", command, forms.named("base")) for name in ("ours", "vllm")]
    axis = Axis("concurrency", "requests at a time", (1, 8), True)
    points = list(Growth(checkpoint, load_tokenizer(checkpoint), tmp_path).measure(axis, both, tmp_path))
    assert [(p.x, p.contestant) for p in points] == [(1, "ours"), (1, "vllm"), (8, "ours"), (8, "vllm")]
    assert [p.figures.errors for p in points] == [{}] * 4
    assert points[2].figures.output_tokens_per_second > points[0].figures.output_tokens_per_second
    told = tmp_path / "growth.json"
    told.write_text(json.dumps(growth.report(points)))
    page.main([told], tmp_path / "docs")
    text = (tmp_path / "docs/performance.md").read_text()
    assert f"| 8 | {page.short(points[2].figures.output_tokens_per_second)} |" in text
    assert "Not measured." in text  # of the other axes
    assert "<svg" in (tmp_path / "docs/performance/concurrency.svg").read_text()


def test_the_registry_is_filled_with_versions_that_it_can_count(tmp_path):
    with PromptStore.open(tmp_path / "store") as store:
        store.push(prompt_file(), "bench0")
    for versions in (10, 50):
        growth.fill(tmp_path / "store", "bench0", versions)
    with PromptStore.open(tmp_path / "store") as store:
        assert store.stats().versions == 51
