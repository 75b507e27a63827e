"""OpenAI's shapes on the wire: completions, chat, models."""

import json

import pytest
from support.fake_engine import WEIGHTS, expected_token
from support.served import soft_prompt

from server.schemas.chat import ChatAnswer
from server.schemas.completions import CompletionAnswer
from server.schemas.models import ModelAnswer, ModelList

USER = [{"role": "user", "content": "hi"}]


def post(served, path, status=200, **body):
    answer = served.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer


def complete(served, status=200, **body):
    return post(served, "/v1/completions", status, **{"model": "tiny", "prompt": "hi", "max_tokens": 3, **body}).json()


def chat(served, status=200, **body):
    whole = {"model": "tiny", "messages": USER, "max_tokens": 3, **body}
    return post(served, "/v1/chat/completions", status, **whole).json()


def chunks(served, path, **body) -> list:
    answer = post(served, path, stream=True, **body)
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def said(engine, count, index=0, back=1) -> str:
    return bytes(expected_token(engine.submitted[-back], index, k) for k in range(count)).decode()


# -- completions -----------------------------------------------------------------------------------------------------


def test_a_completion(served):
    body = complete(served, model="haiku@1")
    CompletionAnswer.model_validate(body)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "haiku@1"
    assert body["system_fingerprint"] == "fp_" + WEIGHTS[7:19]
    assert body["prompt"]["digest"] == soft_prompt(1).digest
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "soft_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["choices"][0]["text"] == said(served.engine, 3)


def test_sixteen_tokens_if_nobody_says(served):
    post(served, "/v1/completions", model="tiny", prompt="hi")
    assert served.engine.submitted[-1].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
def test_four_kinds_of_prompt(served, prompt, ids):
    body = complete(served, prompt=prompt)
    assert [request.token_ids for request in served.engine.submitted[-len(ids) :]] == ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(ids)))


def test_choice_k_of_text_i_has_the_index_i_n_plus_k(served):
    body = complete(served, prompt=["ab", "cd", "ef"], n=2, max_tokens=4)
    for index, choice in enumerate(body["choices"]):
        assert choice["index"] == index
        assert choice["text"] == said(served.engine, 4, index % 2, back=3 - index // 2)
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize(("prompt", "echo"), [("hé", "hé"), ([104, 105], "hi")])
@pytest.mark.parametrize("stream", [False, True])
def test_echo(served, prompt, echo, stream):
    asked = {"model": "haiku", "prompt": prompt, "echo": True, "max_tokens": 3}
    if stream:
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks(served, "/v1/completions", **asked))
    else:
        text = complete(served, **asked)["choices"][0]["text"]
    assert text == echo + said(served.engine, 3)


@pytest.mark.parametrize("model", ["tiny", "haiku"])
def test_echo_with_logprobs_begins_with_null_stitched_or_not(served, model):
    told = complete(served, model=model, prompt="hi!", echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert told["tokens"][:3] == ["h", "i", "!"]
    assert told["token_logprobs"] == [None, *[-0.5] * 5]
    assert told["top_logprobs"][0] is None
    assert told["text_offset"] == [0, 1, 2, 3, 4, 5]


def test_offsets_count_characters_that_are_spread_over_tokens_once(served):
    """Each of their tokens moved what follows by the length of its name, `bytes:` and all; and streams disagreed."""
    asked = {"model": "haiku", "prompt": "日é!", "echo": True, "logprobs": 0, "max_tokens": 3}
    told = complete(served, **asked)["choices"][0]
    assert told["logprobs"]["text_offset"] == [0, 0, 0, 1, 1, 2, 3, 4, 5]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks(served, "/v1/completions", **asked)]
    assert [at for piece in pieces if piece for at in piece["text_offset"]] == told["logprobs"]["text_offset"]


def test_a_text_can_be_scored_alone(served):
    body = complete(served, prompt="hi!", echo=True, logprobs=0, max_tokens=0)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi!", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert body["usage"]["completion_tokens"] == 0
    *_, last = chunks(
        served, "/v1/completions", model="tiny", prompt="hi!", echo=True, logprobs=0, max_tokens=0,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 3)


def test_logprobs_of_a_stream_are_those_of_the_whole(served):
    asked = {"model": "tiny", "prompt": "hi", "max_tokens": 5, "echo": True, "logprobs": 2}
    whole = complete(served, **asked)["choices"][0]["logprobs"]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks(served, "/v1/completions", **asked)]
    assert {name: [item for piece in pieces for item in piece[name]] for name in whole} == whole


def test_a_completion_stream(served):
    got = chunks(
        served, "/v1/completions", model="haiku", prompt=["a", "b"], n=2, max_tokens=3,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert len({chunk["id"] for chunk in got}) == 1
    assert got[0]["prompt"]["version"] == 2
    assert all("prompt" not in chunk for chunk in got[1:])
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["soft_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in got[:-1])
    ends = [choice["index"] for chunk in got for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]


# -- chat ------------------------------------------------------------------------------------------------------------


def test_a_reply(served):
    body = chat(served, model="haiku:best")
    ChatAnswer.model_validate(body)
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": said(served.engine, 3), "refusal": None}
    assert body["prompt"]["version"] == 1
    assert body["usage"]["soft_tokens"] == 4


def test_a_reply_goes_to_the_end_of_the_context(served):
    post(served, "/v1/chat/completions", model="tiny", messages=USER)
    assert served.engine.submitted[-1].sampling.max_tokens is None


def test_the_longer_name_wins(served):
    chat(served, max_tokens=9, max_completion_tokens=2)
    assert served.engine.submitted[-1].sampling.max_tokens == 2


def test_roles_and_parts(served):
    chat(
        served,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "hi", "name": "ada"},
            {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "go"},
        ],
    )
    assert served.engine.submitted[-1].token_ids == (
        258, *b"system: be brief\n", 258, *b"user: hi\n", 258, *b"assistant: yes\n", 258, *b"user: go\n",
    )  # fmt: skip


def test_chat_logprobs(served):
    told = chat(served, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert [token["logprob"] for token in told["content"]] == [-0.5] * 3
    first = told["content"][0]
    assert bytes(first["bytes"]).decode() == first["token"]
    assert len(first["top_logprobs"]) == 2


def test_a_chat_stream(served):
    got = chunks(
        served, "/v1/chat/completions", model="haiku", messages=USER, n=2, max_tokens=3,
        stream_options={"include_usage": True}, logprobs=True,
    )  # fmt: skip
    assert {chunk["object"] for chunk in got} == {"chat.completion.chunk"}
    assert [choice["delta"] for choice in got[0]["choices"]] == [{"role": "assistant", "content": ""}] * 2
    assert got[0]["prompt"]["version"] == 2
    text = {0: "", 1: ""}
    for chunk in got[1:-1]:
        for choice in chunk["choices"]:
            text[choice["index"]] += choice["delta"].get("content", "")
            assert len(choice["logprobs"]["content"]) == 1
    assert text == {0: said(served.engine, 3, 0), 1: said(served.engine, 3, 1)}
    assert got[-1]["usage"]["completion_tokens"] == 6


# -- fields of real clients ------------------------------------------------------------------------------------------

INERT = {
    "user": "ada", "metadata": {"run": "7"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
    "prompt_cache_key": "k", "stream_options": None, "skip_special_tokens": True, "use_beam_search": False,
}  # fmt: skip
NEUTRAL_CHAT = {
    "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "none",
    "response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "reasoning_effort": None,
    "chat_template_kwargs": {}, "add_generation_prompt": True,
}  # fmt: skip


def test_fields_without_effect_are_taken(served):
    chat(served, **INERT, **NEUTRAL_CHAT)
    complete(served, **INERT, suffix=None, best_of=2, n=2)


@pytest.mark.parametrize(
    ("ask", "field", "value"),
    [
        (chat, "tools", [{"type": "function"}]),
        (chat, "tool_choice", "required"),
        (chat, "response_format", {"type": "json_object"}),
        (chat, "store", True),
        (chat, "modalities", ["audio"]),
        (chat, "audio", {"voice": "x"}),
        (chat, "chat_template", "{{ messages }}"),
        (chat, "chat_template_kwargs", {"a": 1}),
        (chat, "reasoning_effort", "high"),
        (chat, "stream_options", {"include_obfuscation": True}),
        (complete, "suffix", "end"),
        (complete, "best_of", 2),
        (complete, "use_beam_search", True),
    ],
)
def test_what_would_be_a_lie_is_refused_by_name(served, ask, field, value):
    told = ask(served, 400, **{field: value})["error"]
    assert told["code"] == "unsupported_parameter"
    assert told["param"].startswith(f"/{field}")
    assert field in told["message"]


@pytest.mark.parametrize("ask", [chat, complete])
def test_an_unknown_field_is_refused_by_name(served, ask):
    told = ask(served, 400, guided_json={})["error"]
    assert (told["code"], told["param"]) == ("unsupported_parameter", "/guided_json")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "/messages"),
        ([{"role": "tool", "content": "x"}], "/messages/0/role"),
        ([{"role": "user", "content": None}], "/messages/0/content"),
        ([{"role": "user", "content": []}], "/messages/0/content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "/messages/0/content/0/type",
        ),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "/messages/0/tool_calls"),
        ([{"role": "assistant", "content": "the template refuses this"}], "/messages"),
        ("hi", "/messages"),
    ],
)
def test_bad_messages_are_named(served, messages, param):
    assert chat(served, 400, messages=messages)["error"]["param"] == param


@pytest.mark.parametrize("prompt", [[], [[]], [1.5], ["a", 1], [1, "a"], {}, 7, None, [[1], "a"], [True], [-1]])
def test_bad_prompts_are_named(served, prompt):
    assert complete(served, 400, prompt=prompt)["error"]["param"].startswith("/prompt")


def test_n_times_texts_is_bounded(served):
    assert complete(served, 400, prompt=["a"] * 200, n=2)["error"]["param"] == "/n"


def test_usage_in_a_stream_takes_a_stream(served):
    assert chat(served, 400, stream_options={"include_usage": True})["error"]["param"] == "/stream_options"


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["no-such", "haiku@99", "GPT 4", "haiku@", "@", "a/b"])
def test_an_unknown_model(served, model):
    told = complete(served, 404, model=model)["error"]
    assert (told["code"], told["param"]) == ("model_not_found", "/model")
    assert "the base is tiny" in told["message"]


def test_a_task_that_does_not_fit_says_so(served):
    assert complete(served, 404, model="deep", resolution="exact")["error"]["code"] == "prompt_unresolved"
    assert complete(served, 404, model="haiku:no-such")["error"]["code"] == "prompt_unresolved"
    assert complete(served, model="deep", resolution="none")["prompt"] is None


def test_there_is_nothing_to_resolve_for_the_base(served):
    assert complete(served, 400, resolution="transfer")["error"]["param"] == "/resolution"


def test_models_are_base_tasks_and_aliases(served):
    body = served.client.get("/v1/models").json()
    ModelList.model_validate(body)
    assert [(model["id"], model["parent"]) for model in body["data"]] == [
        ("tiny", None),
        ("deep", "tiny"),
        ("haiku", "tiny"),
        ("haiku:best", "tiny"),
    ]


@pytest.mark.parametrize(
    ("path", "version"),
    [("haiku", 2), ("haiku%401", 1), ("haiku@1", 1), ("haiku%3Abest", 1), ("haiku:best", 1), ("deep", 1)],
)
def test_one_model(served, path, version):
    body = served.client.get(f"/v1/models/{path}").json()
    ModelAnswer.model_validate(body)
    assert body["prompt"]["version"] == version


def test_the_base_as_a_model(served):
    assert served.client.get("/v1/models/tiny").json()["parent"] is None
    assert served.client.get("/v1/models/none-such").status_code == 404
