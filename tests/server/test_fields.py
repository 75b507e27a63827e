"""Every field of every route, as the OpenAPI document lists them: at its bounds, beyond, of the wrong type, absurd.

What the document forbids is refused by name; what it allows is taken, unless the table below says by which rule not.
"""

import json
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

import pytest
from support.fake_engine import LEVEL
from support.fields import HOSTILE, PLAIN, Document, Field
from support.served import prompt_bytes, serving, stock
from support.uploads import RAW

FULL = os.environ.get("PROMPTSTITCH_FULL") == "1"
SPOT = "@@spot@@"
DIGEST = "sha256:" + "ab" * 32
MESSAGE = {"role": "user", "content": "hi"}
# A good request of each route that takes a body.
BODIES = {
    ("POST", "/v1/generate"): {"text": "hi", "max_tokens": 1},
    ("POST", "/v1/completions"): {"model": "tiny", "prompt": "hi", "max_tokens": 1},
    ("POST", "/v1/chat/completions"): {"model": "tiny", "messages": [MESSAGE], "max_tokens": 1},
    ("POST", "/v1/tokenize"): {"prompt": "hi"},
    ("PUT", "/v1/prompts/{task}/aliases/{alias}"): {"version": 1},
    ("POST", "/v1/prompts/{task}/versions/{version}/measurements"): {
        "metric": "perplexity", "value": 9.5, "dataset": DIGEST, "split": "test", "served_level": "w4g128"
    },
    ("POST", "/v1/keys"): {"name": "first", "scopes": ["infer"]},
}  # fmt: skip
PATH = {"task": "haiku", "version": "1", "alias": "best", "model": "tiny", "key_id": "key_" + "0" * 16}


@dataclass(frozen=True)
class Row:
    """How one field is tried.

    `around` is what the request holds beside it, SPOT in its place; `codes` are those of rules that no schema can
    say; `good` and `bad` are values that cannot be made from the schema.
    """

    around: dict = field(default_factory=dict)
    codes: tuple[str, ...] = ()
    good: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def body(names: str, **how) -> dict[str, Row]:
    return dict.fromkeys([f"body /{name}" for name in names.split()], Row(**how))


def message(**parts) -> dict:
    return {"around": {"messages": [{**MESSAGE, **parts}]}, "without": ("text", "prompt")}


CONTEXT, VALUE, UNKNOWN = "context_length_exceeded", "invalid_value", ("task_not_found", "invalid_reference")
PART = {"type": "text", "text": "hi"}
TABLE: dict[str, Row] = {
    # Sampling.
    **body("temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop stop/*"),
    **body("ignore_eos stream n echo"),
    **body("soft_tokens", around={"task": "haiku"}, codes=(VALUE,)),
    **body("logprobs", codes=(VALUE,)),  # generate has no stream of them
    **body("top_logprobs", around={"logprobs": True}),
    **body("logit_bias", codes=(VALUE, "invalid_json")),  # keys are token ids
    **body("logit_bias/{}", around={"logit_bias": {"5": SPOT}}),
    **body("stop_token_ids stop_token_ids/*", codes=(VALUE,)),  # below the size of the vocabulary
    **body("max_tokens max_completion_tokens", codes=(VALUE, CONTEXT)),  # 0 goes with echo
    **body("min_tokens", codes=(VALUE,)),  # not above max_tokens
    **body("timeout", codes=("deadline_exceeded", "timeout")),  # 5e-324 seconds are over
    # What is asked.
    **body("text", codes=(VALUE, CONTEXT)),
    **body("prompt prompt/* prompt/*/*", codes=(VALUE, CONTEXT, *UNKNOWN)),
    **body("model task", codes=(VALUE, "model_not_found", *UNKNOWN)),
    **body("resolution", around={"task": "haiku"}),
    **body("add_special_tokens add_generation_prompt", codes=(VALUE,)),
    **body("messages messages/*", codes=(VALUE, CONTEXT), without=("text", "prompt")),
    **body("messages/*/role", **message(role=SPOT), codes=(VALUE,)),  # the template's rules
    **body("messages/*/content", **message(content=SPOT), codes=(VALUE, CONTEXT)),
    **body("messages/*/content/*", **message(content=[SPOT])),
    **body("messages/*/content/*/type", **message(content=[{**PART, "type": SPOT}])),
    **body("messages/*/content/*/text", **message(content=[{**PART, "text": SPOT}]), codes=(CONTEXT,)),
    **{
        key: row
        for name in ("name", "refusal", "tool_calls", "function_call", "audio", "annotations")
        for key, row in body(f"messages/*/{name}", **message(**{name: SPOT})).items()
    },
    # What clients send without effect.
    **body("user safety_identifier prompt_cache_key prompt_cache_retention metadata store service_tier tools"),
    **body("tool_choice parallel_tool_calls functions function_call response_format modalities modalities/* audio"),
    **body("prediction reasoning_effort verbosity web_search_options continue_final_message chat_template"),
    **body("chat_template_kwargs suffix use_beam_search skip_special_tokens spaces_between_special_tokens"),
    **body("include_stop_str_in_output"),
    **body("best_of", codes=("unsupported_parameter",)),  # only equal to n
    **body("metadata/{}", around={"metadata": {"k": SPOT}}),
    **body("response_format/type", around={"response_format": {"type": SPOT}}),
    **body("stream_options", around={"stream": True}),
    **body("stream_options/include_usage", around={"stream": True, "stream_options": {"include_usage": SPOT}}),
    **body(
        "stream_options/include_obfuscation", around={"stream": True, "stream_options": {"include_obfuscation": SPOT}}
    ),
    # The registry.
    **body("version", codes=("version_not_found",)),
    **body(
        "metric split dataset served_weights scored_tokens value gain gain_low gain_high",
        codes=("invalid_measurement",),
    ),
    **body("served_level", codes=("invalid_level",)),
    **body("name scopes scopes/*"),
    "path task": Row(codes=("task_not_found", "version_not_found", "alias_not_found", "version_deleted")),
    "path version": Row(codes=("version_not_found", "version_aliased", "version_deleted")),
    "path alias": Row(codes=("alias_not_found", "precondition_required")),
    "path model": Row(codes=("model_not_found",)),
    "path key_id": Row(codes=("key_not_found",), good=("key_" + "a" * 16,), bad=("key_" + "A" * 16, "key_" + "a" * 17)),
    "query limit": Row(),
    "query require": Row(codes=("gain_not_shown", "precondition_required"), good=("gain",)),
    "query after": Row(codes=(VALUE, "invalid_reference")),
    "query level": Row(codes=("invalid_level", "alias_not_found", "precondition_required"), good=("w4g128", "nf4")),
    "query base": Row(
        codes=("alias_not_found", "precondition_required"), good=(DIGEST,), bad=(DIGEST.upper(), DIGEST + "0")
    ),
    "query bos": Row(codes=("bos_mismatch",), good=("none", "after_prompt", "tokenizer")),
    "header idempotency-key": Row(codes=("idempotency_key_reused",), good=("k" * 255,), bad=("k" * 256,)),
    "header content-digest": Row(codes=(VALUE,)),
    "header if-match": Row(codes=("precondition_failed", VALUE), bad=("x" * 257,)),
    "header if-none-match": Row(bad=("x" * 1025,)),
    "part /adapter_config.json": Row(
        codes=("invalid_adapter_config", "unsupported_peft_type", "shape_mismatch", "non_finite"),
        bad=(
            *("", "{", "[]", "null", "NaN", "[" * 500, '{"a":' * 300, "{}", '{"peft_type": null}', '{"peft_type": 5}'),
            *(
                '{"peft_type": "LORA"}',
                '{"peft_type": "\\u0000"}',
                '{"peft_type": "' + "x" * 5000 + '"}',
                "{}" + " " * 70_000,
            ),
            *(
                f'{{"peft_type": "PROMPT_TUNING", "{name}": {value}}}'
                for name in ("num_virtual_tokens", "token_dim", "num_transformer_submodules")
                for value in ("-1", "0", "1.5", "1e999", "NaN", "9" * 5000, '"4"', "[]", "true", "999999999")
            ),
        ),
    ),
    "part /adapter_model.safetensors": Row(
        codes=("unsupported_format", "truncated", "invalid_header", "header_too_large"),
        bad=("", "{", "x" * 100_000, "PK\3\4" + "\0" * 64, "\x08" + "\0" * 7 + "[" * 8, "\x7f" * 64),
    ),
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with keys, whose client may do everything."""
    secret = {}

    def prepare(store):
        stock(store)
        secret["key"] = store.keys.create("boss", ["admin"])[1]

    with serving(tmp_path_factory.mktemp("store"), prepare=prepare) as server:
        server.client.headers["Authorization"] = f"Bearer {secret['key']}"
        yield server


@pytest.fixture(scope="module")
def document(locked) -> Document:
    return Document(locked.client.get("/openapi.json").json())


def url(path: str, **given: str) -> str:
    for name, value in {**PATH, **given}.items():
        path = path.replace("{" + name + "}", quote(value, safe="").replace(".", "%2E"))
    return path


def in_body(locked, one: Field, row: Row, value: str):
    """The answer to a request that holds this JSON at this place."""
    around, places = dict(row.around), one.pointer.split("/")[1:]
    if "task" in around and "model" in BODIES[one.method, one.path]:
        around["model"] = around.pop("task")  # as OpenAI's routes call it
    if SPOT not in json.dumps(around):
        around[places[0]] = SPOT if len(places) == 1 else [[SPOT]] if len(places) == 3 else [SPOT]
    good = {name: given for name, given in BODIES[one.method, one.path].items() if name not in row.without}
    raw = json.dumps({**good, **around}).replace(f'"{SPOT}"', value)
    headers = {"Content-Type": "application/json", **({"If-Match": "*"} if one.method == "PUT" else {})}
    return locked.client.request(one.method, url(one.path), content=raw, headers=headers)


def in_head(locked, one: Field, row: Row, value: str):
    """The same for a path, a query or a header; an upload gets its file, another route its body."""
    given, headers, content = {one.name: value}, {"Content-Type": "application/json"}, None
    if (one.method, one.path) in BODIES:
        content = json.dumps(BODIES[one.method, one.path])
    elif one.method == "POST":
        content, headers = prompt_bytes(1, level=None if one.name == "level" else LEVEL), dict(RAW)
    if one.place == "header":
        headers |= {one.name: value.encode("latin-1")}
    path = url(one.path, **(given if one.place == "path" else {}))
    query = given if one.place == "query" else None
    return locked.client.request(one.method, path, params=query, headers=headers, content=content)


def in_part(locked, one: Field, row: Row, value: str):
    """The same for a part of an adapter."""
    parts = {"adapter_config.json": b'{"peft_type": "PROMPT_TUNING"}', "adapter_model.safetensors": prompt_bytes(1)}
    parts[one.name] = value.encode("latin-1")
    files = {name: (name, content, RAW["Content-Type"]) for name, content in parts.items()}
    return locked.client.post(url(one.path), files=files)


def tries(document: Document, one: Field, row: Row, which: int) -> Iterator[tuple[str, bool]]:
    """Values, and whether the document allows each. Bounded: the absurd ones are dealt out over the fields."""
    hostile, plain = (HOSTILE, PLAIN) if FULL else (HOSTILE[which % 4 :: 4], PLAIN[which % 2 :: 2])
    bounds = list(document.bounds(one.schema))
    if one.place == "part":
        yield from ((text, False) for text in row.bad)
    elif one.place == "body":
        for raw in (*hostile, *bounds, *row.good, *row.bad):
            if FULL or len(raw) < 100_000:
                yield raw, document.takes(one.schema, raw)
    else:
        null = () if one.place == "header" else ("a\0b",)
        for text in (*plain, *(str(json.loads(raw)) for raw in bounds), *null, *row.good, *row.bad):
            number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text
            value = number if one.schema.get("type") == "integer" else text
            yield text, document.holds(one.schema, value)


SEND = {"body": in_body, "part": in_part, "path": in_head, "query": in_head, "header": in_head}


@pytest.mark.parametrize("key", sorted(TABLE))
def test_a_field(locked, document, key):
    row = TABLE[key]
    for which, one in enumerate(one for one in document.fields() if one.key == key):
        for value, allowed in tries(document, one, row, which + len(key)):
            answer = SEND[one.place](locked, one, row, value)
            where = (one.method, one.path, value[:80], answer.status_code, answer.text[:300])
            error = answer.json()["error"] if answer.status_code >= 400 else {"code": None}
            if allowed or one.place == "part":
                assert error["code"] in ((None, *row.codes) if allowed else row.codes), where
                assert answer.status_code < 500 or answer.status_code == 504, where
                continue
            assert 400 <= answer.status_code < 500, where
            named = f"{error['param']} {error['message']}".lower()
            assert one.name.lower() in named or error["code"] == "invalid_json", where
        assert locked.client.post("/v1/generate", json={"text": "hi", "max_tokens": 1}).status_code == 200
    stats = locked.engine.stats()
    assert stats.waiting == stats.running == 0


def test_no_field_is_left_out(document):
    """A new field fails here until it has a row that says how it is tried."""
    assert {one.key for one in document.fields()} == set(TABLE)
    assert {(one.method, one.path) for one in document.fields() if one.place == "body"} == set(BODIES)


@pytest.mark.parametrize(("method", "path"), sorted(BODIES))
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"a": "\xff"}', b"{}" * 2, b"[" * 100_000, b'{"":' * 100_000,
     b"0" * 300_000],
    ids=["empty", "open", "list", "string", "null", "utf16", "latin1", "two", "deep list", "deep object", "number"],
)  # fmt: skip
def test_a_body_that_is_no_object(served, method, path, raw):
    answer = served.client.request(method, url(path), content=raw, headers={"Content-Type": "application/json"})
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
