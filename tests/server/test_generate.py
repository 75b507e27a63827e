"""`/v1/generate`: the answer says what was stitched; the fake engine says what it was asked."""

import json

import pytest
from support.fake_engine import BASE, expected_token
from support.served import prompt_file, serving, soft_prompt

from server.schemas.generate import GenerateAnswer


def generate(served, status=200, **body):
    answer = served.client.post("/v1/generate", json=body)
    assert answer.status_code == status, answer.text
    return answer


def error(served, status=400, **body):
    return generate(served, status, **body).json()["error"]


def events(answer) -> list:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def said(engine, count) -> str:
    """What the model says to the last request."""
    return bytes(expected_token(engine.submitted[-1], 0, k) for k in range(count)).decode()


def test_a_stitched_text(served):
    answer = generate(served, text="hi", task="haiku", max_tokens=6)
    body = answer.json()
    GenerateAnswer.model_validate(body)
    digest = soft_prompt(2).digest
    assert body["prompt"] == {
        "task": "haiku",
        "version": 2,
        "digest": digest,
        "level": "w4g128",
        "resolution": "exact",
        "same_weights": True,
        "same_chat_template": False,
    }
    assert answer.headers["x-prompt-digest"] == digest
    assert body["usage"] == {"text_tokens": 2, "soft_tokens": 4, "completion_tokens": 6}
    assert (body["text"], body["finish_reason"]) == (said(served.engine, 6), "length")
    assert served.engine.submitted[-1].prompt.digest == digest


def test_no_prompt_no_header(served):
    answer = generate(served, text="hi", max_tokens=2)
    assert answer.json()["prompt"] is None
    assert "x-prompt-digest" not in answer.headers
    assert served.engine.submitted[-1].prompt is None


@pytest.mark.parametrize(
    ("named", "version"),
    [({"prompt": "haiku@1"}, 1), ({"prompt": "haiku:best"}, 1), ({"task": "haiku", "prompt": "haiku@2"}, 2)],
)
def test_ways_to_name_a_prompt(served, named, version):
    assert generate(served, text="hi", max_tokens=1, **named).json()["prompt"]["version"] == version


def test_by_digest(served):
    digest = soft_prompt(1).digest
    assert generate(served, text="x", prompt=f"haiku@{digest}", max_tokens=1).json()["prompt"]["digest"] == digest


@pytest.mark.parametrize(
    ("task", "policy", "status", "how"),
    [
        ("haiku", "exact", 200, "exact"),
        ("haiku", "none", 200, None),
        ("deep", None, 200, "transferred"),
        ("deep", "transfer", 200, "transferred"),
        ("deep", "exact", 404, "prompt_unresolved"),
        ("deep", "optional", 200, "transferred"),
        ("deep", "none", 200, None),
        ("unheard-of", "optional", 404, "task_not_found"),
        ("unheard-of", "transfer", 404, "task_not_found"),
        ("unheard-of", "none", 200, None),
    ],
)
def test_policies(served, task, policy, status, how):
    body = {"text": "hi", "task": task, "max_tokens": 1} | ({"resolution": policy} if policy else {})
    answer = generate(served, status, **body).json()
    if status == 200:
        assert (answer["prompt"] and answer["prompt"]["resolution"]) == how
    else:
        assert answer["error"]["code"] == how


def test_a_transferred_prompt_says_that_nobody_measured_it(served):
    told = generate(served, text="hi", task="deep", max_tokens=1).json()["prompt"]
    assert (told["level"], told["measured"], told["same_weights"]) == ("w3g64", False, None)


def test_the_server_sets_the_default_policy(tmp_path):
    with serving(
        tmp_path, prepare=lambda store: store.push(prompt_file(3, level="w3g64"), "deep"), resolution="exact"
    ) as served:
        assert error(served, 404, text="hi", task="deep")["code"] == "prompt_unresolved"
        assert (
            generate(served, text="hi", task="deep", resolution="transfer", max_tokens=1).json()["prompt"]["version"]
            == 1
        )


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "/text", "text or as messages"),
        ({"text": "a", "messages": [{"role": "user", "content": "b"}]}, "/text", "one of them"),
        ({"text": "a", "resolution": "exact"}, "/resolution", "name the task"),
        ({"text": "a", "task": "haiku", "prompt": "deep@1"}, "/prompt", "agree"),
        ({"text": "a", "prompt": "Write me a haiku"}, "/prompt", "goes in `text`"),
        ({"prompt": "Once upon a time"}, "/prompt", "goes in `text`"),
        ({"prompt": "Once upon a time " * 40}, "/prompt", "goes in `text`"),
        ({"prompt": [1, 2, 3]}, "/prompt", "goes in `text`"),
        ({"text": "a", "task": "Haiku"}, "/task", "task name"),
        ({"text": "a", "max_tokens": 0}, "/max_tokens", "echo"),
        ({"text": "a", "max_tokens": 2, "min_tokens": 3}, "/min_tokens", "more than max_tokens"),
        ({"text": ""}, "/text", "empty"),
        ({"text": "a", "stop_token_ids": [260]}, "/stop_token_ids", "token ids"),
        ({"text": "a", "logit_bias": {"260": 1}}, "/logit_bias", "token ids"),
    ],
)
def test_contradictions_are_named(served, body, param, words):
    told = error(served, **body)
    assert told["param"] == param
    assert words in told["message"]


def test_the_context_is_a_limit_of_its_own(served):
    told = error(served, text="a" * 3000)
    assert (told["code"], told["param"]) == ("context_length_exceeded", "/text")


def test_the_layout_of_the_prompt_decides_about_bos(fresh):
    fresh.store.push(prompt_file(5, bos="after_prompt"), "bos")
    generate(fresh, text="hi", task="bos", max_tokens=1)
    assert fresh.engine.submitted[-1].token_ids == (257, *b"hi")
    generate(fresh, messages=[{"role": "user", "content": "hi"}], task="bos", max_tokens=1)
    assert fresh.engine.submitted[-1].token_ids == (258, *b"user: hi\n")


def test_several_choices(served):
    body = generate(served, text="hi", n=3, max_tokens=4, temperature=1, seed=5).json()
    GenerateAnswer.model_validate(body)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert "text" not in body
    assert body["usage"]["completion_tokens"] == 12


def test_sampling_fields_reach_the_engine(served):
    generate(
        served, text="hi", temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=-0.2, logit_bias={"65": 1.5}, seed=-1, stop=["zzzz"],
        stop_token_ids=[7], max_tokens=3, max_completion_tokens=2, min_tokens=1, ignore_eos=True, n=2, timeout=9,
        logprobs=3,
    )  # fmt: skip
    request = served.engine.submitted[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.2, -0.2)
    assert (sampling.logit_bias, sampling.seed, sampling.stop) == (((65, 1.5),), 2**63 - 1, ("zzzz",))
    assert (sampling.stop_token_ids, sampling.max_tokens, sampling.min_tokens) == ((7,), 2, 1)
    assert (sampling.ignore_eos, sampling.logprobs, sampling.prompt_logprobs) == (True, 3, None)
    assert (request.n, request.timeout, request.namespace) == (2, 9, "default")


def test_null_is_the_default(served):
    from server.schemas.generate import GenerateBody

    nulls = dict.fromkeys(set(GenerateBody.model_fields) - {"text", "max_tokens"})
    generate(served, text="hi", max_tokens=1, **nulls)
    assert served.engine.submitted[-1].sampling.temperature == 1.0


def test_without_max_tokens_to_the_end_of_the_context(served):
    generate(served, text="hi")
    assert served.engine.submitted[-1].sampling.max_tokens is None


def test_a_stop_string_is_told_and_not_shown(served):
    whole = generate(served, text="stop", max_tokens=30, temperature=0).json()["text"]
    stop = whole[10:13]
    body = generate(served, text="stop", max_tokens=30, temperature=0, stop=stop).json()
    assert (body["text"], body["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert body["stop_reason"] == stop


def test_logprobs(served):
    told = generate(served, text="hi", max_tokens=3, logprobs=2).json()
    logprobs = told["logprobs"]
    assert "".join(logprobs["tokens"]) == told["text"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 3


def test_a_stream_ends_with_prompt_and_usage(served):
    answer = generate(served, text="hi", task="haiku", max_tokens=4, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-prompt-digest"] == soft_prompt(2).digest
    lines = events(answer)
    assert len({line["id"] for line in lines}) == 1
    assert "".join(line["text"] for line in lines) == said(served.engine, 4)
    assert [line["finish_reason"] for line in lines] == [None] * (len(lines) - 1) + ["length"]
    assert all("usage" not in line for line in lines[:-1])
    assert lines[-1]["prompt"]["version"] == 2
    assert lines[-1]["usage"] == {"text_tokens": 2, "soft_tokens": 4, "completion_tokens": 4}


def test_a_stream_of_choices_ends_each(served):
    lines = events(generate(served, text="hi", n=3, max_tokens=3, stream=True))
    ends = [line["index"] for line in lines if line["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]
    assert [("usage" in line) for line in lines] == [False] * (len(lines) - 1) + [True]


def test_a_failed_step_is_an_error_and_the_next_request_is_served(served):
    served.engine.fail_next = True
    assert error(served, 500, text="hi")["code"] == "engine_error"
    generate(served, text="hi", max_tokens=1)


def test_a_failed_step_of_a_stream_is_told_in_it(served):
    served.engine.fail_next = True
    *_, last = events(generate(served, text="hi", stream=True))
    assert last["error"]["code"] == "engine_error"


def test_a_deadline(served):
    served.engine.held.set()
    try:
        assert error(served, 504, text="hi", timeout=0.1)["code"] == "timeout"
        *_, last = events(generate(served, text="hi", timeout=0.1, stream=True))
        assert (last["error"]["code"], last["error"]["type"]) == ("timeout", "timeout")
    finally:
        served.engine.held.clear()
    assert served.engine.stats().waiting == 0


def test_a_prompt_of_another_base_is_never_stitched(fresh):
    other = "sha256:" + "0b" * 32
    fresh.store.push(prompt_file(7, base=other), "foreign")
    assert error(fresh, 409, text="hi", prompt="foreign@1")["code"] == "base_model_mismatch"
    assert error(fresh, 404, text="hi", task="foreign")["code"] == "prompt_unresolved"
    assert other != BASE


def test_a_damaged_blob_is_refused_by_its_own_name(fresh, tmp_path):
    digest = soft_prompt(1).digest
    for blob in (tmp_path / "store" / "blobs").rglob("*"):
        if blob.is_file() and blob.stat().st_size > 100:
            blob.chmod(0o600)
            data = bytearray(blob.read_bytes())
            data[-1] ^= 1
            blob.write_bytes(data)
    told = error(fresh, 500, text="hi", prompt=f"haiku@{digest}")
    assert told["code"] == "corrupt_blob"
    assert generate(fresh, text="hi", max_tokens=1).json()["prompt"] is None


def test_what_moves_is_seen_by_the_next_request(fresh):
    """Resolutions are remembered: every change of the registry must end that."""

    def version(**named):
        return generate(fresh, text="hi", max_tokens=1, **named).json()["prompt"]["version"]

    client = fresh.client
    assert (version(task="haiku"), version(prompt="haiku:best")) == (2, 1)
    tag = client.get("/v1/prompts/haiku/aliases/best").headers["etag"]
    moved = client.put("/v1/prompts/haiku/aliases/best", json={"version": 2}, headers={"If-Match": tag})
    assert moved.status_code == 200
    assert version(prompt="haiku:best") == 2
    assert client.put("/v1/prompts/haiku/aliases/default", json={"version": 1}).status_code == 201
    assert version(task="haiku") == 1
    assert client.delete("/v1/prompts/haiku/aliases/default").status_code == 204
    assert version(task="haiku") == 2
    assert client.delete("/v1/prompts/haiku/aliases/best").status_code == 204
    assert client.delete("/v1/prompts/haiku/versions/2").status_code == 204
    assert version(task="haiku") == 1
    assert error(fresh, 410, text="hi", prompt="haiku@2")["code"] == "version_deleted"
