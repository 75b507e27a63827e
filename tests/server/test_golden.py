"""Golden self-tests over HTTP. The fake engine gives every token a logprob of -0.5, so the right loss is 0.5."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from support import tiny
from support.fake_engine import LEVEL, VOCAB, WEIGHTS, FakeEngine
from support.served import serving, soft_prompt, until
from support.uploads import upload

from engine.engine import LocalEngine
from engine.options import EngineOptions
from engine.score import mean_loss
from engine.served import ServedModel
from prompts_store.errors import InvalidArtifact
from prompts_store.file import PromptFile, Provenance, encode_prompt, write_prompt
from prompts_store.golden import Golden
from prompts_store.store import PromptStore
from server.golden import NOT_LOADED, GoldenTests
from server.schemas.registry import VersionAnswer
from server.seeds import seed
from server.settings import Settings

IDS = (72, 101, 108, 108, 111)
RIGHT, WRONG = Golden(IDS, 0.5), Golden(IDS, 0.6)
OTHER_WEIGHTS = "sha256:" + "00" * 32
ONE = "/v1/prompts/new/versions/1"


def golden_file(golden: Golden | None = RIGHT, weights: str | None = WEIGHTS, number: int = 9) -> PromptFile:
    return PromptFile(soft_prompt(number), Provenance(level=LEVEL, weights=weights, golden=golden))


def refused(served, content, status=422):
    return upload(served, content, status).json()["error"]


def golden_bytes(*args, **options) -> bytes:
    return encode_prompt(golden_file(*args, **options))


def self_tests(served) -> list:
    return [request for request in served.engine.submitted if request.prompt and request.token_ids == IDS]


def counted(served, result: str) -> float:
    name = f'promptstitch:golden_tests_total{{result="{result}"}} '
    return sum(float(line.removeprefix(name)) for line in served.client.get("/metrics").text.splitlines()
               if line.startswith(name))  # fmt: skip


def test_a_file_that_passes_is_taken_and_says_so(fresh):
    told = upload(fresh, golden_bytes()).json()
    assert told["golden"] == {"expected": 0.5, "found": 0.5, "ok": True, "not_checked": None}
    VersionAnswer.model_validate(fresh.client.get(ONE).json())
    assert fresh.client.get(ONE).json()["golden"] == told["golden"]
    assert [version["golden"] for version in fresh.client.get("/v1/prompts/new").json()["data"]] == [told["golden"]]
    asked = fresh.engine.submitted[-1]
    assert (asked.token_ids, asked.prompt, asked.sampling.max_tokens) == (IDS, soft_prompt(9), 0)
    assert counted(fresh, "ok") == 1
    assert fresh.client.get(ONE + "/content").content == encode_prompt(
        replace(golden_file(), provenance=replace(golden_file().provenance, task="new"))
    )


def test_a_file_that_fails_leaves_nothing(fresh):
    before = fresh.store.stats()
    error = refused(fresh, golden_bytes(WRONG))
    assert (error["code"], error["param"]) == ("golden_mismatch", "golden")
    assert "0.6000" in error["message"]
    assert "0.5000" in error["message"]
    assert fresh.store.stats() == before
    assert fresh.client.get("/v1/prompts/new").status_code == 404
    assert counted(fresh, "mismatch") == 1
    upload(fresh, golden_bytes())  # the same rows with the right test


def test_the_tolerance_is_stated(fresh):
    assert (Golden(IDS, 0.5).tolerance, Golden(IDS, 4.0).tolerance) == (0.02, 0.04)
    upload(fresh, golden_bytes(Golden(IDS, 0.5199)))
    refused(fresh, golden_bytes(Golden(IDS, 0.5201)))
    assert not RIGHT.agrees(float("nan"))


def test_on_other_weights_of_its_level_it_tells_how_far_off_they_are(fresh):
    told = upload(fresh, golden_bytes(WRONG, OTHER_WEIGHTS)).json()
    why = "other weights are served than those that it was learned through"
    assert told["golden"] == {"expected": 0.6, "found": 0.5, "ok": None, "not_checked": why}
    VersionAnswer.model_validate(fresh.client.get(ONE).json())
    assert counted(fresh, "ok") == counted(fresh, "mismatch") == 0
    upload(fresh, golden_bytes(Golden((1, VOCAB), 0.5), OTHER_WEIGHTS, number=8))  # cannot be run, holds nothing up


@pytest.mark.parametrize(
    ("level", "weights", "why"),
    [
        (LEVEL, None, "the prompt does not say which weights it was learned through"),
        ("w2g64", OTHER_WEIGHTS, "other weights are served than those that it was learned through"),
    ],
)
def test_elsewhere_it_says_nothing_and_is_not_run(fresh, level, weights, why):
    asked = len(fresh.engine.submitted)
    file = PromptFile(soft_prompt(9), Provenance(level=level, weights=weights, golden=WRONG))
    told = upload(fresh, encode_prompt(file)).json()
    assert told["golden"] == {"expected": 0.6, "found": None, "ok": None, "not_checked": why}
    assert fresh.client.post("/v1/generate", json={"text": "a", "task": "new", "max_tokens": 1}).status_code == 200
    assert len(fresh.engine.submitted) == asked + 1


def test_ids_beyond_the_vocabulary(fresh):
    error = refused(fresh, golden_bytes(Golden((1, VOCAB), 0.5)))
    assert error["code"] == "golden_mismatch"
    assert "vocabulary" in error["message"]


def test_a_context_too_short_for_the_test(tmp_path):
    with serving(tmp_path, engine=FakeEngine(max_model_len=8)) as served:
        told = upload(served, golden_bytes()).json()
        assert "context of 8" in told["golden"]["not_checked"]


def test_without_a_test_there_is_nothing_to_tell(fresh):
    assert upload(fresh, golden_bytes(None)).json()["golden"] is None


def test_a_stored_prompt_is_tested_when_it_is_first_loaded(tmp_path):
    def prepare(store):
        store.push(golden_file(RIGHT), "good")
        store.push(golden_file(WRONG, number=8), "bad")

    with serving(tmp_path, prepare=prepare) as served:
        path, ask = "/v1/prompts/good/versions/1", {"text": "a", "max_tokens": 1}
        assert served.client.get(path).json()["golden"]["not_checked"] == NOT_LOADED
        for _ in range(3):
            assert served.client.post("/v1/generate", json={**ask, "task": "good"}).status_code == 200
        assert served.client.get(path).json()["golden"]["ok"] is True
        assert len(self_tests(served)) == 1  # once, however often it is asked for
        for route, name in (("/v1/generate", "task"), ("/v1/completions", "model")):
            answer = served.client.post(route, json={name: "bad", "prompt" if name == "model" else "text": "a"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "golden_mismatch")
            assert answer.headers["x-should-retry"] == "false"
        assert served.client.get("/v1/models/bad").json()["error"]["code"] == "golden_mismatch"
        told = served.client.get("/v1/prompts/bad/versions/1").json()["golden"]
        assert told == {"expected": 0.6, "found": 0.5, "ok": False, "not_checked": None}
        assert (counted(served, "ok"), counted(served, "mismatch")) == (1, 1)
        assert len(self_tests(served)) == 2


def test_one_prompt_with_two_tests_is_held_to_each(tmp_path):
    """The rows may be the same: what passed one version's test has not passed another's."""

    def prepare(store):
        store.push(golden_file(WRONG, OTHER_WEIGHTS), "elsewhere")
        store.push(golden_file(WRONG), "here")

    with serving(tmp_path, prepare=prepare) as served:
        for task, status in (("elsewhere", 200), ("here", 500)):
            answer = served.client.post("/v1/generate", json={"text": "a", "task": task, "max_tokens": 1})
            assert answer.status_code == status


def test_an_engine_that_fails_the_test_is_told_apart_from_a_test_that_fails(fresh):
    fresh.engine.fail_next = True
    error = refused(fresh, golden_bytes(), 500)
    assert error["code"] == "engine_error"
    upload(fresh, golden_bytes())


def test_seeds_are_tested(tmp_path):
    engine, store = FakeEngine(), PromptStore.open(tmp_path / "store")
    try:
        for name, golden in (("right", RIGHT), ("wrong", WRONG)):
            file = golden_file(golden)
            write_prompt(tmp_path / name, replace(file, provenance=replace(file.provenance, task="general")))
        with pytest.raises(InvalidArtifact) as refusal:
            seed(store, engine, Settings(seed_prompts=(tmp_path / "wrong",)), GoldenTests())
        assert refusal.value.code == "golden_mismatch"
        assert store.stats().versions == 0
        seed(store, engine, Settings(seed_prompts=(tmp_path / "right",)), GoldenTests())
        assert store.stats().versions == 1
    finally:
        store.close()
        engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_model_passes_its_own_test_and_not_that_of_another(tmp_path, dtype):
    """Learned in fp32, served in either dtype; a BOS too many, or another layout of the ids, shows."""
    torch.set_num_threads(1)
    model = ServedModel("tiny", tiny.BASE, "dense", WEIGHTS, 0)
    options = EngineOptions(page_size=4, kv_bytes=1 << 20, max_virtual_tokens=64)

    def make(dtype):
        return LocalEngine(tiny.ours(tiny.reference(), dtype), tiny.ByteTokenizer(), model, options)

    prompt = tiny.rows(17, 64)
    ids = tuple(b"the quick brown fox jumps over the lazy dog, and then some more of it"[:64])
    learner = make(torch.float32)
    golden = Golden(ids, mean_loss(learner, ids, prompt))
    shifted = Golden((257, *ids[:-1]), golden.loss)
    learner.close()
    with serving(tmp_path, engine_factory=lambda _: make(dtype)) as served:

        def put(test):
            file = PromptFile(prompt, Provenance(level="dense", weights=WEIGHTS, golden=test))
            return served.client.post("/v1/prompts/t/versions", content=encode_prompt(file),
                                      headers={"Content-Type": "application/octet-stream"})  # fmt: skip

        assert put(shifted).json()["error"]["code"] == "golden_mismatch"
        told = put(golden).json()["golden"]
        assert told["ok"]
        assert abs(told["found"] - golden.loss) < (1e-5 if dtype == torch.float32 else golden.tolerance)


def test_self_tests_that_wait_hold_nobody_else_up(tmp_path):
    """Forty of them took all threads: probes waited half a minute, and /livez said that a busy server was dead."""
    with serving(tmp_path) as served, ThreadPoolExecutor(60) as clients:
        served.engine.held.set()
        files = [golden_bytes(number=100 + i) for i in range(50)]
        post = partial(served.client.post, "/v1/prompts/slow/versions", timeout=60)
        waiting = [clients.submit(post, content=each) for each in files]
        until(lambda: served.engine.stats().waiting + served.engine.stats().running >= 16, 30)
        for path in ("/livez", "/readyz", "/metrics", "/v1/prompts"):
            began = time.monotonic()
            assert served.client.get(path).status_code == 200
            assert time.monotonic() - began < 2
        served.engine.held.clear()
        assert {each.result().status_code for each in waiting} <= {201, 422}
