"""The `openai` package as its users use it: sync, async, streaming, errors, retries."""

import openai
import pytest
from support.fake_engine import WEIGHTS, expected_token

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def said(served, count) -> str:
    return bytes(expected_token(served.engine.submitted[-1], 0, k) for k in range(count)).decode()


def test_chat(client, served):
    reply = client.chat.completions.create(model="haiku@1", messages=USER, max_tokens=5)
    assert reply.choices[0].message.content == said(served, 5)
    assert reply.usage.prompt_tokens == 10
    assert reply.usage.model_extra["soft_tokens"] == 4
    assert reply.model_extra["prompt"]["version"] == 1
    assert reply.system_fingerprint == "fp_" + WEIGHTS[7:19]


def test_a_reply_can_be_sent_back(client):
    """The package dumps null fields (refusal, tool_calls, …) into the next request."""
    reply = client.chat.completions.create(model="tiny", messages=USER, max_tokens=5)
    again = [*USER, reply.choices[0].message, {"role": "user", "content": "more"}]
    client.chat.completions.create(model="tiny", messages=again, max_tokens=1)


def test_chat_stream(client, served):
    stream = client.chat.completions.create(
        model="haiku", messages=USER, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == said(served, 5)
    assert chunks[0].model_extra["prompt"]["version"] == 2
    assert chunks[-1].usage.completion_tokens == 5


def test_chat_stream_helper(client, served):
    letters = {"stop_token_ids": list(range(ord("a"), ord("z") + 1))}
    with client.chat.completions.stream(model="tiny", messages=USER, extra_body=letters) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


def test_completions_and_the_header(client, served):
    raw = client.completions.with_raw_response.create(model="haiku@1", prompt=["a", "b"], max_tokens=2, logprobs=1)
    assert raw.headers["x-prompt-digest"] == raw.parse().model_extra["prompt"]["digest"]
    assert [choice.index for choice in raw.parse().choices] == [0, 1]


def test_resolution_travels_as_an_extra_field(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="deep", prompt="a", extra_body={"resolution": "exact"})
    assert caught.value.code == "prompt_unresolved"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "deep", "haiku", "haiku:best"]
    assert client.models.retrieve("haiku@1").model_extra["prompt"]["version"] == 1
    assert client.models.retrieve("haiku:best").id == "haiku:best"


def test_errors_have_their_classes(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, temperature=9)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "/temperature")
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id == caught.value.body["request_id"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such", messages=USER)


def test_an_error_in_a_stream_is_raised(client, served):
    served.engine.fail_next = True
    with pytest.raises(openai.APIError) as caught:
        list(client.completions.create(model="tiny", prompt="a", stream=True))
    assert caught.value.code == "engine_error"


def test_a_conflict_is_not_tried_again(served):
    """The package retries 409 by itself unless x-should-retry says no."""
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", max_retries=3) as client:
        before = _requests(served, "4xx", "/v1/prompts/{task}/versions/{version}")
        with pytest.raises(openai.ConflictError):
            client.delete("/prompts/haiku/versions/1", cast_to=object)
    assert _requests(served, "4xx", "/v1/prompts/{task}/versions/{version}") == before + 1


def _requests(served, status, handler) -> float:
    text = served.client.get("/metrics").text
    wanted = f'http_requests_total{{handler="{handler}",method="DELETE",status="{status}"}} '
    return sum(float(line.removeprefix(wanted)) for line in text.splitlines() if line.startswith(wanted))


async def test_async(served):
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="any", max_retries=0) as client:
        reply = await client.chat.completions.create(model="tiny", messages=USER, max_tokens=3)
        assert reply.choices[0].message.content == said(served, 3)
        stream = await client.completions.create(model="haiku", prompt="a", max_tokens=3, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == said(served, 3)
