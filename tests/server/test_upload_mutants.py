"""Thousands of broken files through the upload route: each is stored or refused as an independent checker says.

Nothing else may happen: no 5xx, no exception, and of what was refused no row, no blob and no temporary file.
"""

import dataclasses
import hashlib
import json
import os
import random
import tempfile
from collections import Counter

import pytest
from support import mutants
from support.checker import Model, No, check, need, parse
from support.fake_engine import FakeEngine
from support.in_process import in_process
from support.uploads import RAW

from prompts_store.file import PromptFile, encode_prompt
from prompts_store.store import PromptStore
from server.app import create_app
from server.settings import Settings

MUTANTS = 10_000 if os.environ.get("PROMPTSTITCH_FULL") == "1" else 300
MODEL = Model(8, mutants.BASE, mutants.HIDDEN, mutants.KV)
CONFIG = json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}).encode()
WAYS = ("plain", "level named", "adapter")


@pytest.fixture
def engine():
    """One that serves what the seeds are made for."""
    layers, heads, d = mutants.KV
    shape = {"hidden_size": mutants.HIDDEN, "num_layers": layers, "num_kv_heads": heads, "head_dim": d}
    made = FakeEngine()
    made.info = dataclasses.replace(made.info, base=mutants.BASE, dtype="float16", max_virtual_tokens=8, **shape)
    yield made
    made.close()


def expected(data: bytes, way: str):
    """The tensors, if this upload must be taken, else None."""
    try:
        tensors, (meta, _) = check(data, MODEL), parse(data)
        need("level" in meta if way == "plain" else meta.get("level", mutants.LEVEL) == mutants.LEVEL)
        need(way != "adapter" or set(tensors) == {"prompt_embeddings"})
    except No:
        return None
    return tensors


async def send(client, data: bytes, way: str):
    query = {} if way == "plain" else {"level": mutants.LEVEL}
    if way != "adapter":
        return await client.post("/v1/prompts/mutant/versions", content=data, headers=RAW, params=query)
    parts = {"adapter_config.json": CONFIG, "adapter_model.safetensors": data}
    files = {name: (name, content, RAW["Content-Type"]) for name, content in parts.items()}
    return await client.post("/v1/prompts/mutant/versions", files=files, params=query)


@pytest.mark.slow
async def test_every_upload_is_stored_or_refused_as_the_checker_says(tmp_path, monkeypatch, engine):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    chance, good, counts = random.Random(20230518), mutants.seeds(), Counter()
    stored: set[tuple[str, str]] = set()  # level and digest
    store_folder = tmp_path / "store"
    with PromptStore.open(store_folder) as store:
        async with in_process(create_app(Settings(store=str(store_folder)), lambda _: engine, store)) as client:
            for index in range(MUTANTS):
                data, way = mutants.mutant(chance, good), WAYS[index % len(WAYS)]
                answer, tensors = await send(client, data, way), expected(data, way)
                told = answer.json()
                where = (index, way, data, told)
                counts[answer.status_code] += 1
                if tensors is None:
                    assert answer.status_code == 422, where
                    assert told["error"]["type"] == "invalid_artifact", where
                    continue
                version = (told.get("level"), told.get("digest"))
                assert answer.status_code == (200 if version in stored else 201), where
                stored.add(version)
                prompt = store.load(told["digest"])
                assert {name: values.tobytes() for name, values in tensors.items()} == {
                    name: values.numpy().tobytes() for name, values in prompt.tensors.items()
                }, where
            listed = (await client.get("/v1/prompts/mutant", params={"limit": 1000})).json()["data"]
        assert {(version["level"], version["digest"]) for version in listed} == stored
        files = {encode_prompt(PromptFile(store.load(digest))) for _, digest in stored}
        assert store.stats().versions == len(stored)
    blobs = {path.name for path in (store_folder / "blobs" / "sha256").glob("*/*")}
    assert blobs == {hashlib.sha256(file).hexdigest() for file in files}
    assert not list((tmp_path / "tmp").iterdir())
    print(f"{MUTANTS} mutants: {dict(counts)}, {len(stored)} versions")
    assert MUTANTS * 0.02 < counts[200] + counts[201] < MUTANTS * 0.5  # both verdicts were put to the test
