"""A written prompt as rows: what is answered behind it is what would be answered behind the text itself."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from prompts_store.file import read_prompt

GREEDY = ("--temperature", 0, "--max-tokens", 24, "--dtype", "float32", "--kv-memory", "16MiB")


@pytest.mark.parametrize("which", ["model", "model_with_bos"])
def test_rows_answer_as_the_text_does(answer, tmp_path, request, which):
    folder, store = request.getfixturevalue(which), tmp_path / "store"
    written, asked = "Answer in one word. ", "The capital of France is"
    pushed = answer("prompts", "from-text", written, "--model", folder, "--task", "brief", "--store", store)
    local = ("--model", folder, "--store", store, *GREEDY)

    stitched = answer("generate", asked, "--task", "brief", *local)
    assert stitched["prompt"]["digest"] == pushed["digest"]
    assert stitched["usage"]["soft_tokens"] == len(written) + (which == "model_with_bos")

    in_front = answer("generate", written + asked, *local)
    assert in_front["prompt"] is None
    assert stitched["text"] == in_front["text"] != answer("generate", asked, *local)["text"]


def test_the_file_holds_the_rows_of_the_embedding_table(answer, model, base, tmp_path):
    out = tmp_path / "brief.safetensors"
    told = answer("prompts", "from-text", "be brief", "--model", model, "--level", "w3g64", "--out", out)
    file = read_prompt(out)
    assert told["digest"] == file.prompt.digest
    assert (file.prompt.base, file.prompt.bos, file.provenance.level) == (base, "tokenizer", "w3g64")
    assert file.provenance.train == {"method": "written", "text": "be brief"}

    table = load_file(model / "model.safetensors")["model.embed_tokens.weight"].float()
    rows = file.prompt.tensors["prompt_embeddings"]
    found = [(table == row).all(1).nonzero()[0, 0].item() for row in rows]
    assert torch.equal(table[found], rows)
    assert len(found) == len("be brief")


def test_the_level_is_that_of_the_model_unless_given(answer, model, tmp_path):
    out = tmp_path / "a"
    assert answer("prompts", "from-text", "x", "--model", model, "--out", out)["level"] == "dense"


def test_text_comes_from_standard_input_too(answer, model, tmp_path):
    told = answer("prompts", "from-text", "-", "--model", model, "--out", tmp_path / "a", input="12345")
    assert told["num_virtual_tokens"] == 5


@pytest.mark.parametrize("given", [("\udcff",), ("-",)])
def test_text_that_is_no_utf_8_is_refused(cli, model, tmp_path, given):
    refused = cli("prompts", "from-text", *given, "--model", model, "--out", tmp_path / "a", input=b"caf\xe9")
    assert refused.exit_code == 2
    assert "the text is not UTF-8" in refused.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("words", "options"), [("", ("--out", "a")), ("x", ())])
def test_nothing_written_and_nowhere_to_go_are_usage_errors(cli, model, words, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = cli("prompts", "from-text", words, "--model", model, *options)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "a").exists()
