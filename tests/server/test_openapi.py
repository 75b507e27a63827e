"""The document says what the server does: read by eye here, and driven by schemathesis in all its phases."""

import json
import os
import subprocess
import sys

import pytest
from support.served import serving, stock

from server.auth import SCOPE_KEY

EXAMPLES = 500 if os.environ.get("PROMPTSTITCH_FULL") == "1" else 100


@pytest.fixture(scope="module")
def document(served):
    return served.client.get("/openapi.json").json()


def operations(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_operation_is_whole(document):
    for path, method, operation in operations(document):
        where = f"{method} {path}"
        assert operation[SCOPE_KEY], where
        assert operation["summary"], where
        assert operation["description"], where
        assert (operation.get("security") == [{"key": []}]) == (operation[SCOPE_KEY] != "public"), where
        assert {"400", "431", "500"} <= set(operation["responses"]), where
        for status, answer in operation["responses"].items():
            assert "X-Request-Id" in answer["headers"], (where, status)
            if status[0] in "45" and path not in ("/livez", "/readyz", "/startupz", "/health"):
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}, (where, status)


def test_every_reference_resolves(document):
    raw = json.dumps(document)
    names = {part.split('"')[0] for part in raw.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_nothing_takes_a_url(document):
    """No field from which the server could be made to fetch something."""
    assert '"format": "uri"' not in json.dumps(document)


def test_every_body_field_has_bounds(document):
    """Strings have a length, a pattern or a list of values, numbers an upper and a lower bound, lists a length."""

    def walk(schema, where):
        if "$ref" in schema:
            return walk(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], where)
        for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            walk(branch, where)
        for name, inner in schema.get("properties", {}).items():
            walk(inner, f"{where}/{name}")
        kind = schema.get("type")
        closed = "enum" in schema or "const" in schema
        if kind == "string":
            assert closed or {"maxLength", "pattern"} & set(schema), where
        if kind in ("integer", "number") and where != "MeasurementBody/value":
            assert closed or ({"minimum", "exclusiveMinimum"} & set(schema) and "maximum" in schema), where
        if kind == "array":
            assert "maxItems" in schema, where
            walk(schema.get("items", {}), where)
        if kind == "object":
            assert schema.get("additionalProperties") is False or "maxProperties" in schema, where
        return None

    bodies = [operation["requestBody"] for _, _, operation in operations(document) if "requestBody" in operation]
    for body in bodies:
        if "application/json" in body["content"]:
            schema = body["content"]["application/json"]["schema"]
            walk(schema, schema["$ref"].rpartition("/")[2])
    assert len(bodies) == 8


def test_the_document_can_be_switched_off(tmp_path):
    with serving(tmp_path, docs=False) as served:
        assert served.client.get("/openapi.json").status_code == 404
        assert served.client.get("/docs").status_code == 404


def test_the_page_may_load_its_own_script_only(served):
    answer = served.client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.slow
def test_schemathesis(tmp_path):
    """All phases, valid and invalid data. One check is left out: rules that span fields are in no schema."""
    secret = {}

    def prepare(store):
        stock(store)
        secret["key"] = store.keys.create("schemathesis", ["admin"])[1]

    with serving(tmp_path, prepare=prepare) as served:
        headers = {"Authorization": f"Bearer {secret['key']}"}
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", served.url + "/openapi.json",
            "--header", f"Authorization: {headers['Authorization']}",
            "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--mode", "all",
            "--max-examples", str(EXAMPLES), "--continue-on-failure", "--seed", "1",
            "--generation-database", "none", "--warnings", "off", "--no-color",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2000:]
        for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
            assert f"✅ {phase}" in run.stdout, run.stdout[-3000:]
        metrics = served.client.get("/metrics", headers=headers)
        assert metrics.status_code == 200  # its key is alive, so all this was not one long 401
        assert 'status="5xx"' not in metrics.text
        assert 'handler="/v1/generate",method="POST",status="2xx"' in metrics.text
        assert served.engine.stats().waiting == served.engine.stats().running == 0
