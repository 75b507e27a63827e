"""The embedded model on real text, at full size: a plain transformers loop gives the same figure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.data.documents import read
from lab.data.windows import cut
from lab.evaluate.score import score
from llama.load import load
from llama.tokenizer import HubTokenizer

TEXT = Path(__file__).parents[3] / "README.md"


@pytest.mark.slow
@torch.inference_mode()
def test_losses_of_real_text(embedded, full):
    data = cut(read(TEXT), HubTokenizer(embedded), 256, most=8 if full else 2)
    found = score(load(embedded, dtype="float32", device="cpu").model, data)
    theirs = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(embedded)(
        TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    ).input_ids
    for at, losses in enumerate(found.nll):
        window = torch.tensor(ids[256 * at : 256 * (at + 1)])
        expected = F.cross_entropy(theirs(window[None]).logits[0, :-1], window[1:], reduction="none")
        torch.testing.assert_close(losses[1:], expected, rtol=1e-3, atol=1e-3)
