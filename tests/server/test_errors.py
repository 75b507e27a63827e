"""The table of errors is complete, and every error has the one form."""

import inspect

import pytest

from engine import api as engine_api
from prompts_store import errors as store_errors
from server.errors import RULES, TYPES, ApiError, translate

RAISED_AT_START = {store_errors.StoreLocked, store_errors.SchemaTooNew}
SAMPLES = {
    store_errors.InvalidArtifact: store_errors.InvalidArtifact("duplicate_key", "twice", "rows"),
    store_errors.BadLevel: store_errors.BadLevel("no", None),
    store_errors.NotFound: store_errors.NotFound("task", "none"),
    store_errors.Unresolved: store_errors.Unresolved("none fits", "w4g128", ["w3g64"]),
    store_errors.Conflict: store_errors.Conflict("version_aliased", "aliased"),
    store_errors.CorruptBlob: store_errors.CorruptBlob("sha256:00", "are torn"),
    engine_api.InvalidRequest: engine_api.InvalidRequest("n", "too many"),
    engine_api.Overloaded: engine_api.Overloaded("queue_full", 3.2),
}
EXPECTED = {
    store_errors.StoreError: (500, "store_error"),
    store_errors.InvalidArtifact: (422, "duplicate_key"),
    store_errors.BadReference: (400, "invalid_reference"),
    store_errors.BadLevel: (400, "invalid_level"),
    store_errors.BadMeasurement: (400, "invalid_measurement"),
    store_errors.BadKey: (400, "invalid_key"),
    store_errors.NotFound: (404, "task_not_found"),
    store_errors.Unresolved: (404, "prompt_unresolved"),
    store_errors.Gone: (410, "version_deleted"),
    store_errors.Conflict: (409, "version_aliased"),
    store_errors.WrongBase: (409, "base_model_mismatch"),
    store_errors.PreconditionRequired: (428, "precondition_required"),
    store_errors.PreconditionFailed: (412, "precondition_failed"),
    store_errors.CorruptBlob: (500, "corrupt_blob"),
    store_errors.GoldenMismatch: (500, "golden_mismatch"),
    store_errors.StorageFull: (507, "storage_full"),
    engine_api.InvalidRequest: (400, "invalid_value"),
    engine_api.ContextTooLong: (400, "context_length_exceeded"),
    engine_api.Overloaded: (503, "server_is_overloaded"),
    engine_api.EngineClosed: (503, "server_is_draining"),
}


def domain_errors():
    for module, root in ((store_errors, store_errors.StoreError), (engine_api, engine_api.EngineError)):
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, root) and kind is not engine_api.EngineError:
                yield kind


@pytest.mark.parametrize("kind", sorted(set(domain_errors()) - RAISED_AT_START, key=lambda kind: kind.__name__))
def test_every_domain_error_has_its_status(kind):
    error = SAMPLES.get(kind) or kind("why")
    told = translate(error)
    assert (told.status, told.code) == EXPECTED[kind]
    assert told.status in TYPES


def test_the_table_names_nothing_that_is_not_raised():
    assert set(RULES) <= set(domain_errors())


def test_what_is_not_in_the_table_tells_nothing():
    told = translate(RuntimeError("/secret/path and password"))
    assert (told.status, told.code) == (500, "internal_error")
    assert "secret" not in told.message


def test_retry_after_of_an_overload_comes_from_the_engine():
    assert translate(SAMPLES[engine_api.Overloaded]).retry_after == 3.2


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "retry"),
    [
        ("GET", "/nope", 404, "route_not_found", "false"),
        ("GET", "/v1/prompts/none-such", 404, "task_not_found", "false"),
        ("GET", "/v1/prompts/Bad_Name!", 400, "invalid_value", "false"),
        ("GET", "/v1/prompts?limit=0", 400, "invalid_value", "false"),
        ("GET", "/v1/prompts?limits=5", 400, "unknown_parameter", "false"),
        ("POST", "/v1/generate", 415, "unsupported_format", "false"),
        ("TRACE", "/v1/generate", 405, "method_not_allowed", "false"),
    ],
)
def test_one_envelope(served, method, path, status, code, retry):
    answer = served.client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert (error["code"], error["type"]) == (code, TYPES[status])
    assert error["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["x-should-retry"] == retry
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/generate", "POST"),
        ("/v1/prompts/haiku/versions/1", "DELETE, GET"),
        ("/v1/prompts/haiku/aliases/best", "DELETE, GET, PUT"),
        ("/v1/prompts/haiku/versions/1/measurements", "GET, POST"),
        ("/livez", "GET"),
    ],
)
def test_405_names_all_methods_of_the_path(served, path, allowed):
    """The router's own Allow names the methods of the first route of a path only."""
    answer = served.client.request("PATCH", path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("given", ["abc-DEF_123", "x" * 128])
def test_a_request_id_is_taken_over(served, given):
    assert served.client.get("/livez", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", 'a"b', "ü".encode("latin-1")])
def test_a_request_id_that_could_break_a_log_is_not(served, given):
    made = served.client.get("/livez", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert len(made) == 32
    int(made, 16)


def test_api_error_keeps_its_own_headers():
    assert ApiError(405, "x", "y", headers={"Allow": "GET"}).headers == {"Allow": "GET"}
