"""The log line of a request, the metrics, and what must never be in either."""

import io
import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.served import prompt_bytes, serving, soft_prompt, stock, until

from server import logs

CANARY = "c4n4ry"


@pytest.fixture
def log():
    """The process's log at its most talkative, as a file."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    stream = io.StringIO()
    logs.configure("debug", stream)
    yield stream
    root.handlers, root.level = handlers, level


def lines(log, count: int) -> list[dict]:
    """The lines of requests, once there are so many: the last one is written just after its answer has left."""
    until(lambda: len(written(log)) >= count)
    return written(log)


def written(log) -> list[dict]:
    parsed = map(json.loads, log.getvalue().splitlines())
    return [line for line in parsed if line["logger"] == "promptstitch.access" and line["route"] != "/readyz"]


def test_one_line_a_request(served, log):
    answer = served.client.post("/v1/generate", json={"text": "hi", "task": "haiku", "max_tokens": 3})
    [line] = lines(log, 1)
    assert {name: line[name] for name in ("method", "route", "status", "request_id", "level")} == {
        "method": "POST",
        "route": "/v1/generate",
        "status": 200,
        "request_id": answer.headers["x-request-id"],
        "level": "info",
    }
    assert (line["task"], line["prompt_digest"]) == ("haiku", soft_prompt(2).digest)
    assert (line["text_tokens"], line["soft_tokens"], line["completion_tokens"]) == (2, 4, 3)
    assert line["finish_reason"] == "length"
    assert {"queued_ms", "prefill_ms", "decode_ms", "total_ms", "ts"} <= set(line)


def test_routes_are_templates_and_errors_have_their_code(served, log):
    served.client.get("/v1/prompts/none-such")
    served.client.get("/nope/" + CANARY)
    one, other = lines(log, 2)
    assert (one["route"], one["status"], one["code"]) == ("/v1/prompts/{task}", 404, "task_not_found")
    assert (other["route"], other["code"]) == ("none", "route_not_found")
    assert CANARY not in json.dumps(other)


def test_a_stream_is_logged_at_its_end(served, log):
    served.client.post(
        "/v1/completions", json={"model": "haiku", "prompt": ["a", "b"], "stream": True, "max_tokens": 2}
    )
    [line] = lines(log, 1)
    assert (line["status"], line["completion_tokens"], line["text_tokens"]) == (200, 4, 2)


def test_secrets_stay_in(tmp_path, log):
    """Canaries in keys, texts, headers, unknown fields, paths and files; then everything that leaves is searched."""
    secrets = {}

    def prepare(store):
        stock(store)
        secrets["key"] = store.keys.create("k", ["admin"])[1]

    with serving(tmp_path, prepare=prepare) as served:
        client = served.client
        answers = []
        for key in (secrets["key"], f"ps_{CANARY}"):
            headers = {"Authorization": f"Bearer {key}", "Cookie": CANARY, "X-Request-Id": CANARY + "!"}
            for method, path, extra in (
                ("POST", "/v1/generate", {"json": {"text": CANARY, "max_tokens": 2}}),
                ("POST", "/v1/generate", {"json": {"text": CANARY, "stream": True, "max_tokens": 2}}),
                ("POST", "/v1/generate", {"json": {"text": CANARY * 1000}}),
                ("POST", "/v1/generate", {"json": {"text": "a", "temperature": CANARY}}),
                ("POST", "/v1/generate", {"content": b'{"text": "' + CANARY.encode()}),
                ("POST", "/v1/chat/completions", {"json": {"model": "tiny", "messages": [{"role": CANARY}]}}),
                ("POST", "/v1/tokenize", {"json": {"prompt": CANARY}}),
                ("POST", "/v1/prompts/x/versions", {"content": CANARY.encode() + prompt_bytes(1)}),
                ("GET", "/metrics", {}),
                ("GET", "/version", {}),
                ("GET", "/openapi.json", {}),
            ):
                answers.append(client.request(method, path, headers=headers, **extra))
        assert {answer.status_code for answer in answers} >= {200, 400, 401, 415}
        served.engine.fail_next = True
        answers.append(
            client.post("/v1/generate", json={"text": CANARY}, headers={"Authorization": f"Bearer {secrets['key']}"})
        )
        told = log.getvalue() + "".join(answer.text + str(answer.headers) for answer in answers)
        assert len(lines(log, len(answers))) >= len(answers)
    assert secrets["key"] not in told
    assert CANARY not in told


# -- metrics ---------------------------------------------------------------------------------------------------------

GATEWAY = {"num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"}
NAMES = GATEWAY | {
    "cache_config_info", "prompt_loaded", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens", "request_soft_tokens",
    "prompt_tokens", "generation_tokens", "request_success", "requests_rejected", "request_aborted", "num_preemptions",
    "prefix_cache_queries", "prefix_cache_hits", "soft_prefix_hits", "soft_prefix_misses", "soft_prefix_restored",
    "engine_steps", "engine_last_step_age_seconds", "uploads",
    "upload_bytes", "upload_duration_seconds", "registry_versions", "registry_blob_bytes",
    "registry_op_duration_seconds", "blob_integrity_failures", "blob_orphans_removed", "auth_failures", "drain_state",
    "build_info",
}  # fmt: skip


def scrape(served) -> dict:
    text = served.client.get("/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families, family, suffix="", **labels) -> float:
    return sum(
        sample.value
        for sample in families[family].samples
        if sample.name == family + suffix and labels.items() <= sample.labels.items()
    )


def test_the_names(served):
    families = scrape(served)
    assert {f"promptstitch:{name}" for name in NAMES} <= set(families)
    assert {"http_requests", "http_request_duration_seconds", "process_cpu_seconds"} <= set(families)
    for name in GATEWAY:
        assert families[f"promptstitch:{name}"].type == "gauge"
        assert [sample.labels for sample in families[f"promptstitch:{name}"].samples] == [{"model_name": "tiny"}]


def test_what_a_request_counts(fresh):
    before = scrape(fresh)
    fresh.client.post("/v1/generate", json={"text": "abc", "task": "haiku", "max_tokens": 5, "n": 2})
    after = scrape(fresh)

    def grown(family, suffix="", **labels):
        name = "promptstitch:" + family
        return value(after, name, suffix, **labels) - value(before, name, suffix, **labels)

    assert grown("request_success", "_total", finished_reason="length") == 2
    assert grown("request_prompt_tokens", "_sum") == 3
    assert grown("request_soft_tokens", "_sum") == 4
    assert grown("request_generation_tokens", "_sum") == 10
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert grown(name + "_seconds", "_count") == 1
    assert grown("generation_tokens", "_total") == 10


def test_what_uploads_count(fresh):
    for content in (prompt_bytes(30), prompt_bytes(30), b"bad"):
        headers = {"Content-Type": "application/octet-stream"}
        fresh.client.post("/v1/prompts/new/versions", content=content, headers=headers)
    families = scrape(fresh)
    for result, code in (("accepted", ""), ("duplicate", ""), ("rejected", "truncated")):
        assert value(families, "promptstitch:uploads", "_total", result=result, code=code) == 1
    assert value(families, "promptstitch:registry_versions") == 4


def test_labels_are_ours(served):
    """A client must not be able to make series: neither by paths, nor methods, nor names."""
    for k in range(20):
        served.client.request(f"METHOD{k}", f"/path/{k}")
        served.client.post("/v1/generate", json={"text": "a", "task": f"task-{k}"})
    for family in scrape(served).values():
        for sample in family.samples:
            assert not any("METHOD" in text or "path/" in text or "task-" in text for text in sample.labels.values())
