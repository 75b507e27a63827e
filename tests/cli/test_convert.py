"""PEFT adapters in and out, on a local store and through a server."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from support import tiny

from prompts_store.file import read_prompt

# peft reads a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, narrow):
    """A folder that PEFT wrote: five rows for the tiny model, and those rows."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    learner = get_peft_model(tiny.reference(**narrow), config)
    folder = tmp_path_factory.mktemp("adapter")
    learner.save_pretrained(folder)
    return folder, load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def test_an_adapter_is_pushed_with_its_rows(answer, cli, place, adapter, narrow_model, tmp_path):
    folder, rows = adapter
    bound = () if place[0] == "--url" else ("--model", narrow_model)
    options = ("--task", "haiku", *place, *bound)
    assert "level" in cli("prompts", "import-peft", folder, *options).stderr
    pushed = answer("prompts", "import-peft", folder, "--level", "w3g64", *options)
    assert (pushed["num_virtual_tokens"], pushed["base_bound"], pushed["level"]) == (5, True, "w3g64")

    out = tmp_path / "back"
    answer("prompts", "export-peft", "haiku", out, "--base-model", "org/tiny", *place)
    assert torch.equal(load_file(out / "adapter_model.safetensors")["prompt_embeddings"], rows)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"


def test_an_exported_file_loads_in_peft(answer, model, tmp_path):
    file, out = tmp_path / "brief.safetensors", tmp_path / "adapter"
    answer("prompts", "from-text", "be brief", "--model", model, "--out", file)
    answer("prompts", "export-peft", file, out)
    loaded = PeftModel.from_pretrained(tiny.reference(), out)
    rows = loaded.prompt_encoder["default"].embedding.weight
    assert torch.equal(rows, read_prompt(file).prompt.tensors["prompt_embeddings"])


def test_an_adapter_becomes_a_file(answer, adapter, narrow_model, tmp_path):
    folder, rows = adapter
    out = tmp_path / "out.safetensors"
    filed = ("--task", "haiku", "--level", "int8", "--model", narrow_model)
    answer("prompts", "import-peft", folder, "--out", out, *filed)
    file = read_prompt(out)
    assert (file.provenance.task, file.provenance.level) == ("haiku", "int8")
    assert torch.equal(file.prompt.tensors["prompt_embeddings"], rows)


def test_without_a_base_the_option_is_named(cli, adapter, tmp_path):
    refused = cli("prompts", "import-peft", adapter[0], "--task", "t", "--level", "int8", "--store", tmp_path / "s")
    assert refused.exit_code == 2
    assert "base" in refused.stderr
    assert "--model" in refused.stderr


def test_a_pickled_adapter_is_refused_with_the_way_out(cli, adapter, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(adapter[0], folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused = cli("prompts", "import-peft", folder, "--task", "t", "--level", "int8", "--store", tmp_path / "s")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "safe_serialization=True" in refused.stderr
