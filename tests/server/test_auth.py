"""Every route needs its scope, whatever the URL looks like, and none is forgotten."""

import http.client
import itertools
import threading

import pytest
from fastapi.routing import iter_route_contexts
from support.served import prompt_bytes, serving, stock, until

from prompts_store.records import SCOPES
from prompts_store.store import PromptStore
from server.auth import PUBLIC, check_exposure, scope_of
from server.openapi import routes_of
from server.settings import Settings, SettingsError

# The whole surface. A route that is added must be added here, with the scope that it deserves.
ACCESS = {
    ("POST", "/v1/generate"): "infer",
    ("POST", "/v1/completions"): "infer",
    ("POST", "/v1/chat/completions"): "infer",
    ("POST", "/v1/tokenize"): "infer",
    ("GET", "/v1/models"): "infer",
    ("GET", "/v1/models/{model:path}"): "infer",
    ("GET", "/version"): "infer",
    ("GET", "/openapi.json"): "infer",
    ("GET", "/docs"): "infer",
    ("GET", "/v1/prompts"): "prompts:read",
    ("GET", "/v1/prompts/{task}"): "prompts:read",
    ("GET", "/v1/prompts/{task}/versions/{version}"): "prompts:read",
    ("GET", "/v1/prompts/{task}/versions/{version}/content"): "prompts:read",
    ("GET", "/v1/prompts/{task}/versions/{version}/measurements"): "prompts:read",
    ("GET", "/v1/prompts/{task}/aliases/{alias}"): "prompts:read",
    ("GET", "/metrics"): "prompts:read",
    ("POST", "/v1/prompts/{task}/versions"): "prompts:write",
    ("POST", "/v1/prompts/{task}/versions/{version}/measurements"): "prompts:write",
    ("DELETE", "/v1/prompts/{task}/versions/{version}"): "prompts:write",
    ("PUT", "/v1/prompts/{task}/aliases/{alias}"): "prompts:write",
    ("DELETE", "/v1/prompts/{task}/aliases/{alias}"): "prompts:write",
    ("GET", "/v1/keys"): "admin",
    ("POST", "/v1/keys"): "admin",
    ("DELETE", "/v1/keys/{key_id}"): "admin",
    ("GET", "/livez"): "public",
    ("GET", "/readyz"): "public",
    ("GET", "/startupz"): "public",
    ("GET", "/health"): "public",
}
PARTS = {
    "task": "none-such",
    "version": "99",
    "alias": "none-such",
    "key_id": "key_" + "0" * 16,
    "model:path": "none-such",
}


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with one key for each scope; `keys` maps scope to secret."""
    keys = {}

    def prepare(store):
        stock(store)
        for scope in SCOPES:
            keys[scope] = store.keys.create(scope, [scope])[1]

    with serving(tmp_path_factory.mktemp("locked"), prepare=prepare) as server:
        server.keys = keys
        yield server


def url(path: str) -> str:
    for name, value in PARTS.items():
        path = path.replace("{" + name + "}", value)
    return path


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_the_surface_is_this(served):
    app = served.server.config.app
    assert {(method, route.path): scope_of(route) for route in routes_of(app) for method in route.methods} == ACCESS
    assert {path for _, path in ACCESS if ACCESS[_, path] == "public"} == PUBLIC
    assert len(list(iter_route_contexts(app.routes))) == len(ACCESS)  # nothing is mounted beside FastAPI's routes


@pytest.mark.parametrize(("method", "path"), sorted(ACCESS))
def test_without_a_key(locked, method, path):
    answer = locked.client.request(method, url(path))
    if ACCESS[method, path] == "public":
        assert answer.status_code == 200
        return
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path", "scope"), [(*route, scope) for route, scope in itertools.product(sorted(ACCESS), SCOPES)]
)
def test_scopes_by_routes(locked, method, path, scope):
    answer = locked.client.request(method, url(path), headers=bearer(locked.keys[scope]))
    if ACCESS[method, path] in ("public", scope) or scope == "admin":
        assert answer.status_code not in (401, 403)
    else:
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "insufficient_scope"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Basic {}", "{}", "Bearer  x{}", "Bearer {}x", "bearer ' OR 1=1 --", "Bearer ps_" + "A" * 43,
     "Bearer " + "x" * 5000, "Bearer {}\t{}"],
)  # fmt: skip
def test_keys_that_are_none(locked, header):
    answer = locked.client.get("/v1/models", headers={"Authorization": header.replace("{}", locked.keys["infer"])})
    assert answer.status_code == 401


def test_the_scheme_has_no_case(locked):
    answer = locked.client.get("/v1/models", headers={"Authorization": f"bearer {locked.keys['infer']}"})
    assert answer.status_code == 200


def test_no_key_no_reading_of_a_body(locked):
    """An unknown caller learns nothing of the schema and makes us parse nothing."""
    headers = {"Content-Type": "application/json"}
    assert locked.client.post("/v1/generate", content=b"{", headers=headers).status_code == 401


HOSTS = [
    "localhost",
    "evil.example",
    "127.0.0.1/livez?",
    "127.0.0.1/livez#",
    "x@127.0.0.1",
    "[::1]",
    "",
    "a" * 300,
    "127.0.0.1:0",
]
PATHS = [
    "/livez/../v1/models", "/v1/models?/livez", "//v1/models", "/v1//models", "/v1/models/", "/v1/models/..",
    "/v1%2Fmodels", "/%761/models", "/V1/models", "/v1/models;/livez", "/livez/v1/models", "/livez%00/v1/models",
    "/v1/models#/livez", "http://evil.example/v1/models", "http://127.0.0.1/livez/../v1/models", "/./v1/models",
    "/v1/models%3F", "*",
]  # fmt: skip


@pytest.mark.parametrize("target", PATHS)
def test_no_host_and_no_path_gets_around_the_key(locked, target):
    """The prompt list stands for everything behind a key: nothing of it may come without one."""
    for host in HOSTS:
        connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=5)
        connection.putrequest("GET", target, skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status in (400, 401, 404), (host, target)
        assert b"haiku" not in body
        connection.close()


def test_where_there_are_no_keys_any_bearer_will_do(served):
    assert served.client.get("/v1/models", headers=bearer("anything")).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "", "127.0.0.1.evil.example"])
def test_a_web_page_cannot_point_its_own_name_at_loopback(served, host):
    answer = served.client.get("/v1/models", headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "[::1]:8000", "127.0.0.1"])
def test_loopback_has_several_names(served, host):
    assert served.client.get("/livez", headers={"Host": host}).status_code == 200


def test_the_network_needs_a_key(tmp_path):
    with serving(tmp_path) as served:
        outside = Settings(store=str(tmp_path), host="0.0.0.0")
        with pytest.raises(SettingsError, match=r"0\.0\.0\.0 is reachable from outside and no API key exists"):
            check_exposure(outside, served.store)
        check_exposure(outside.model_copy(update={"insecure": True}), served.store)
        served.store.keys.create("first", ["admin"])
        check_exposure(outside, served.store)


def test_keys_over_http(fresh):
    client = fresh.client
    refused = client.post("/v1/keys", json={"name": "app", "scopes": ["infer"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "admin_first")
    boss = client.post("/v1/keys", json={"name": "boss", "scopes": ["admin"]}).json()
    assert client.get("/v1/models").status_code == 401
    admin = bearer(boss["secret"])
    app = client.post("/v1/keys", json={"name": "app", "scopes": ["infer"]}, headers=admin).json()
    listed = client.get("/v1/keys", headers=admin).json()["data"]
    assert [key["name"] for key in listed] == ["boss", "app"]
    assert all("secret" not in key for key in listed)
    assert client.get("/v1/models", headers=bearer(app["secret"])).status_code == 200
    assert client.delete(f"/v1/keys/{app['id']}", headers=admin).status_code == 204
    assert client.get("/v1/models", headers=bearer(app["secret"])).status_code == 401
    assert client.delete(f"/v1/keys/{app['id']}", headers=admin).status_code == 404


def test_revoking_the_last_key_opens_nothing(fresh):
    boss = fresh.client.post("/v1/keys", json={"name": "boss", "scopes": ["admin"]}).json()
    assert fresh.client.delete(f"/v1/keys/{boss['id']}", headers=bearer(boss["secret"])).status_code == 204
    assert fresh.client.get("/v1/models").status_code == 401


def test_a_key_has_so_many_requests_at_once(tmp_path):
    with serving(tmp_path, key_concurrency=2) as served:
        served.engine.held.set()
        body = {"text": "hi", "max_tokens": 1}
        waiting = [
            threading.Thread(target=served.client.post, args=("/v1/generate",), kwargs={"json": body}) for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        until(lambda: served.engine.stats().waiting == 2)
        refused = served.client.post("/v1/generate", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        served.engine.held.clear()
        for thread in waiting:
            thread.join()
        assert served.client.post("/v1/generate", json=body).status_code == 200


@pytest.mark.parametrize(
    ("headers", "let_in"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "OWN"}, True),
    ],
)
def test_without_keys_a_page_of_another_site_changes_nothing(tmp_path, headers, let_in):
    """Uploads take no preflight: any page could put a prompt in the place of another."""
    with serving(tmp_path) as served:
        given = {name: served.url if value == "OWN" else value for name, value in headers.items()}
        path = "/v1/prompts/haiku/versions"
        answer = served.client.post(path, content=prompt_bytes(1), headers={**given, "Content-Type": ""})
        assert answer.status_code == (201 if let_in else 403)
        assert let_in or answer.json()["error"]["code"] == "cross_site_request"
        assert served.client.get("/v1/prompts", headers=given).status_code == 200


def test_revoking_the_last_key_opens_no_door_even_after_a_restart(tmp_path):
    with PromptStore.open(tmp_path) as store:
        key, _ = store.keys.create("ops", ["admin"])
        store.keys.revoke(key.id)
    with serving(tmp_path, wait=False) as served:
        assert served.client.get("/v1/prompts").status_code == 401
