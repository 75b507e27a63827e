"""`promptstitch serve` from outside: what is there on the first day, and after a stop or a kill."""

import shlex
import shutil
import signal
import subprocess

import pytest
import torch
from support.process import running

from prompts_store.file import PromptFile, Provenance, encode_prompt
from prompts_store.prompt import SoftPrompt

pytestmark = pytest.mark.slow


def test_the_first_request_is_stitched_with_the_bundled_prompt(default):
    body = {"task": "general", "text": "The capital of France is", "max_tokens": 8, "temperature": 0}
    answer = default.client.post("/v1/generate", json={**body, "resolution": "exact"}).json()
    assert answer["prompt"]["task"] == "general"
    assert answer["prompt"]["resolution"] == "exact"
    assert answer["prompt"]["same_weights"] is True  # round-to-nearest is bit-equal on every machine
    assert answer["usage"] == {**answer["usage"], "text_tokens": 5, "soft_tokens": 32, "completion_tokens": 8}


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_line_that_serve_prints_works(default):
    line = default.output().strip().splitlines()
    curl = next(text for text in line if text.startswith("curl "))
    done = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60, check=True)
    assert '"finish_reason"' in done.stdout


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_everything_is_where_it_was_after_a_restart(embedded, tmp_path, how):
    arguments = (embedded, "--level", "w3g64", "--store", tmp_path / "store")
    with running(*arguments, log=tmp_path / "first") as first:
        base = first.client.get("/v1/prompts/general/versions/1").json()["base"]
        generator = torch.Generator().manual_seed(0)
        rows = {"prompt_embeddings": torch.randn(9, 576, generator=generator) * 0.05}
        file = PromptFile(SoftPrompt("rows", base, rows), Provenance(level="w3g64"))
        headers = {"Content-Type": "application/octet-stream"}
        pushed = first.client.post("/v1/prompts/mine/versions", content=encode_prompt(file), headers=headers)
        assert pushed.status_code == 201
        assert first.client.put("/v1/prompts/mine/aliases/live", json={"version": 1}).status_code == 201
        ask = {"model": "mine:live", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        before = first.client.post("/v1/completions", json=ask).json()
        assert first.stop(how) == (0 if how == signal.SIGTERM else -signal.SIGKILL)
    with running(*arguments, log=tmp_path / "second") as second:
        after = second.client.post("/v1/completions", json=ask).json()
        assert after["prompt"] == before["prompt"]
        assert after["prompt"]["digest"] == file.prompt.digest
        assert after["choices"][0]["text"] == before["choices"][0]["text"]


def test_a_second_server_on_one_store_is_refused(default, embedded):
    store = default.process.args[default.process.args.index("--store") + 1]
    command = [default.process.args[0], "serve", str(embedded), "--store", store, "--port", "0"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode != 0
    assert "another process holds the store" in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr + refused.stdout
