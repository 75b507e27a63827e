"""Nested prompts: a request may use the first positions of a prompt alone."""

import pytest
from support.served import soft_prompt

STORED = soft_prompt(2)
ROUTES = {
    "/v1/generate": {"text": "hi", "task": "haiku"},
    "/v1/completions": {"prompt": "hi", "model": "haiku"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "model": "haiku"},
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_first_positions_are_stitched_and_the_stored_prompt_is_named(served, path, stream):
    for n in (1, 3, 4, 3):
        body = {**ROUTES[path], "soft_tokens": n, "max_tokens": 2, "stream": stream}
        if stream and path != "/v1/generate":
            body["stream_options"] = {"include_usage": True}
        answer = served.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-prompt-digest"] == STORED.digest
        stitched = served.engine.submitted[-1].prompt
        assert stitched == STORED.first(n)
        if stream:
            assert f'"soft_tokens":{n}' in answer.text.replace(" ", "")
            continue
        told = answer.json()
        assert told["usage"]["soft_tokens"] == n
        assert told["prompt"]["digest"] == STORED.digest


def test_a_part_is_made_once(served):
    body = {**ROUTES["/v1/generate"], "soft_tokens": 2, "max_tokens": 1}
    for _ in range(2):
        served.client.post("/v1/generate", json=body)
    assert served.engine.submitted[-1].prompt is served.engine.submitted[-2].prompt


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("n", [0, -1, 5, 10**9, 2.0, "2", True])
def test_out_of_bounds(served, path, n):
    answer = served.client.post(path, json={**ROUTES[path], "soft_tokens": n, "max_tokens": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "/soft_tokens")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"text": "hi"}),
        ("/v1/generate", {"text": "hi", "task": "haiku", "resolution": "none"}),
        ("/v1/completions", {"prompt": "hi", "model": "tiny"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "model": "tiny"}),
    ],
)
def test_without_a_prompt(served, path, body):
    running = served.engine.stats().running
    answer = served.client.post(path, json={**body, "soft_tokens": 1, "max_tokens": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "/soft_tokens")
    assert served.engine.stats().running == running
