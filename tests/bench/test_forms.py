"""Each form is the same job: the same soft rows, or a cached text of the same length, then the same text."""

import base64
import io

import torch
from safetensors.torch import load_file

from bench import forms, soft_prompts
from bench.workload import Job, load_tokenizer

JOB = Job("water house", 2, "bench1")
BARE = Job("water house", 2)


def test_named_asks_for_the_prompt_as_a_model():
    form = forms.named("base")
    assert form(JOB) == {"model": "bench1", "prompt": "water house"}
    assert form(BARE) == {"model": "base", "prompt": "water house"}


def test_prefix_is_exactly_as_long_as_the_prompt_and_its_own(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    form = forms.text_prefix("base", tokenizer, tokens=64)
    text = form(JOB)["prompt"]
    assert text.endswith("\nwater house")
    assert len(tokenizer.encode(text).ids) == 64 + 2
    assert form(JOB) == form(JOB)
    assert form(Job("water house", 2, "bench2"))["prompt"] != text
    assert form(BARE)["prompt"] == "water house"


def test_embeds_are_soft_rows_then_embedded_text(checkpoint, tmp_path):
    names = soft_prompts.write_prompts(checkpoint, tmp_path, count=2, rows=5)
    assert names == ("bench0", "bench1")
    tokenizer = load_tokenizer(checkpoint)
    form = forms.prompt_embeds("base", tokenizer, checkpoint, tmp_path, torch.float32)
    body = form(JOB)
    sent = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    rows = load_file(tmp_path / "bench1.safetensors")["prompt_embeddings"]
    table = forms.embedding_table(checkpoint)
    assert torch.equal(sent, torch.cat([rows, table[tokenizer.encode("water house").ids]]))
    assert "prompt" not in body
    assert form(BARE) == {"model": "base", "prompt": "water house"}
