"""Every field of every JSON body at its bounds, beyond and of the wrong type: refused by name, and no harm done."""

import json
import resource

import pytest
from pydantic import BaseModel, ValidationError

from server.openapi import _body_model, routes_of
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.schemas.generate import GenerateBody
from server.schemas.models import TokenizeBody
from server.schemas.registry import AliasBody, KeyBody, MeasurementBody

DIGEST = "sha256:" + "ab" * 32
BODIES: dict[str, tuple[type[BaseModel], dict]] = {
    "/v1/generate": (GenerateBody, {"text": "hi", "max_tokens": 1}),
    "/v1/completions": (CompletionBody, {"model": "tiny", "prompt": "hi", "max_tokens": 1}),
    "/v1/chat/completions": (
        ChatBody,
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    ),
    "/v1/tokenize": (TokenizeBody, {"prompt": "hi"}),
    "/v1/prompts/haiku/aliases/new": (AliasBody, {"version": 1}),
    "/v1/prompts/haiku/versions/1/measurements": (
        MeasurementBody,
        {"metric": "perplexity", "value": 9.5, "dataset": DIGEST, "split": "test", "served_level": "w4g128"},
    ),
    "/v1/keys": (KeyBody, {"name": "first", "scopes": ["infer"]}),
}
# Raw JSON, because some of these Python's encoder would not write.
HOSTILE = [
    "-1", "0", "1", "2147483648", "9223372036854775808", "1e308", "-1e308", "1e999", "NaN", "-Infinity", "1.5",
    "9" * 5000,
    "true", "false", "null", '""', '"1"', '"\\u0000"', '"a\\u0000b"', '"\\ud800"', json.dumps("x" * 5000), "[]", "{}",
    '[""]', "[null]", "[-1]", "[1e999]", '{"a": 1}', '{"\\u0000": "\\u0000"}', "[" * 500 + "]" * 500,
    '{"a":' * 300 + "1" + "}" * 300,
    json.dumps(["x"] * 2000), json.dumps([0] * 2000), "[[]]", "[[[]]]", '[{"role": "user"}]',
]  # fmt: skip
CASES = [(path, field) for path, (model, _) in BODIES.items() for field in model.model_fields]


def test_every_body_of_the_api_is_here(served):
    app = served.server.config.app
    assert {_body_model(route) for route in routes_of(app)} - {None} == {model for model, _ in BODIES.values()}


@pytest.mark.parametrize(("path", "field"), CASES, ids=[f"{path}:{field}" for path, field in CASES])
def test_a_hostile_value(served, path, field):
    """4xx that names the field, or a value that the schema takes; never a 5xx, and the next request is served."""
    model, good = BODIES[path]
    method = "PUT" if path.endswith("/new") else "POST"
    rest = json.dumps({name: value for name, value in good.items() if name != field})[1:-1]
    for value in HOSTILE:
        raw = "{" + f'{rest}{", " if rest else ""}"{field}": {value}' + "}"
        headers = {"Content-Type": "application/json"}
        answer = served.client.request(method, path, content=raw, headers=headers)
        if answer.status_code < 400:
            model.model_validate_json(raw)
            continue
        error = answer.json()["error"]
        assert answer.status_code in (400, 404, 409), (value, answer.text)
        named = f"{error['param']} {error['message']}"
        assert field in named or "not JSON" in error["message"] or _valid(model, raw), (value, answer.text)
    assert served.client.post("/v1/generate", json={"text": "hi", "max_tokens": 1}).status_code == 200


def _valid(model: type[BaseModel], raw: str) -> bool:
    """Whether it was not the schema that said no: then a rule that spans fields, the engine or the registry did."""
    try:
        model.model_validate_json(raw)
    except ValidationError as error:
        return any(item["type"] == "refused" for item in error.errors())
    return True


@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"a": "\xff"}', b"{}" * 2, b"[" * 100_000, b'{"":' * 100_000,
     b"0" * 300_000],
    ids=["empty", "open", "list", "string", "null", "utf16", "latin1", "two", "deep list", "deep object", "number"],
)  # fmt: skip
def test_a_body_that_is_no_object(served, path, raw):
    method = "PUT" if path.endswith("/new") else "POST"
    answer = served.client.request(method, path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_json", "invalid_value")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"text": "x", ' + b", ".join(b'"k%d": 1' % k for k in range(300_000)) + b"}",
        b'{"text": "x", "logit_bias": {' + b", ".join(b'"k%d": "x"' % k for k in range(250_000)) + b"}}",
        b'{"text": "x", "stop_token_ids": [' + b",".join([b'"x"'] * 800_000) + b"]}",
    ],
    ids=["fields", "keys", "items"],
)
def test_a_million_mistakes_cost_one(served, raw):
    """Every mistake was a report of half a kilobyte once: 4 MB of them took 400 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    headers = {"Content-Type": "application/json"}
    answer = served.client.post("/v1/generate", content=raw, headers=headers)
    assert answer.status_code == 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 120_000  # KiB; parsing alone takes 60
