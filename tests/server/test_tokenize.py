"""`POST /v1/tokenize`, as vLLM's."""

import pytest

USER = [{"role": "user", "content": "hi"}]


def tokenize(served, status=200, **body):
    answer = served.client.post("/v1/tokenize", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_tokenize(served):
    assert tokenize(served, prompt="hé") == {"count": 3, "max_model_len": 2048, "tokens": [104, 195, 169]}
    assert tokenize(served, messages=USER)["tokens"] == [258, *b"user: hi\n"]
    assert tokenize(served, prompt="")["count"] == 0
    assert tokenize(served, model="haiku", prompt="a", add_special_tokens=False)["tokens"] == [97]


def test_a_long_text_is_tokenised_too(served):
    assert tokenize(served, prompt="x" * 100_000)["count"] == 100_000


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "/prompt"),
        ({"prompt": "a", "messages": USER}, 400, "/prompt"),
        ({"messages": USER, "add_special_tokens": True}, 400, "/add_special_tokens"),
        ({"prompt": "a", "model": "no-such"}, 404, "/model"),
        ({"prompt": "a", "return_token_strs": True}, 400, "/return_token_strs"),
    ],
)
def test_bad_tokenize(served, body, status, param):
    assert tokenize(served, status, **body)["error"]["param"] == param
