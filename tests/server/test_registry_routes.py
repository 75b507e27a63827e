"""Versions, aliases and measurements over HTTP."""

import pytest
from support.fake_engine import BASE, LEVEL, WEIGHTS
from support.served import prompt_file, soft_prompt

from server.schemas.registry import AliasAnswer, MeasurementAnswer, TaskAnswer, TaskListing, VersionAnswer

MEASURED = {
    "metric": "perplexity",
    "value": 9.5,
    "dataset": "sha256:" + "cd" * 32,
    "served_level": LEVEL,
    "scored_tokens": 1000,
}
BEST = "/v1/prompts/haiku/aliases/best"
ONE = "/v1/prompts/haiku/versions/1"


def get(served, path, status=200, **params):
    answer = served.client.get(path, params=params)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_tasks(served):
    body = get(served, "/v1/prompts")
    assert [TaskAnswer.model_validate(task).task for task in body["data"]] == ["deep", "haiku"]
    assert (body["object"], body["has_more"], body["next"]) == ("list", False, None)
    assert [task["task"] for task in get(served, "/v1/prompts", level="w3g64")["data"]] == ["deep"]
    assert get(served, "/v1/prompts", base="sha256:" + "00" * 32)["data"] == []


def test_pages(served):
    first = get(served, "/v1/prompts", limit=1)
    assert (first["has_more"], first["next"]) == (True, "deep")
    last = get(served, "/v1/prompts", limit=1, after=first["next"])
    assert ([task["task"] for task in last["data"]], last["has_more"]) == (["haiku"], False)
    versions = get(served, "/v1/prompts/haiku", limit=1)
    assert [version["version"] for version in versions["data"]] == [1]
    assert [v["version"] for v in get(served, "/v1/prompts/haiku", after=versions["next"])["data"]] == [2]


def test_a_task(served):
    body = get(served, "/v1/prompts/haiku")
    TaskListing.model_validate(body)
    assert [version["version"] for version in body["data"]] == [1, 2]
    assert [(alias["alias"], alias["version"]) for alias in body["aliases"]] == [("best", 1)]


def test_a_version(served):
    answer = served.client.get(ONE)
    VersionAnswer.model_validate(answer.json())
    assert answer.json()["digest"] == soft_prompt(1).digest
    assert answer.headers["etag"] == f'"{soft_prompt(1).digest}"'


@pytest.mark.parametrize(
    ("path", "params", "param"),
    [
        ("/v1/prompts", {"limit": "0"}, "limit"),
        ("/v1/prompts", {"limit": "1001"}, "limit"),
        ("/v1/prompts", {"limit": "x"}, "limit"),
        ("/v1/prompts", {"limit": "9" * 5000}, "limit"),
        ("/v1/prompts", {"base": "sha256:xyz"}, "base"),
        ("/v1/prompts", {"level": "W4"}, "level"),
        ("/v1/prompts", {"after": ""}, "after"),
        ("/v1/prompts", {"after": "a\0"}, "after"),
        ("/v1/prompts/haiku", {"after": "x"}, "after"),
        ("/v1/prompts/haiku/versions/0", {}, "version"),
        ("/v1/prompts/haiku/versions/-1", {}, "version"),
        ("/v1/prompts/haiku/versions/1e3", {}, "version"),
        ("/v1/prompts/haiku/versions/99999999999999999999", {}, "version"),
        ("/v1/prompts/haiku/aliases/-x", {}, "alias"),
        ("/v1/prompts/%2e%2e%2fetc", {}, None),
        ("/v1/prompts/a%00b", {}, "task"),
        ("/v1/prompts/" + "a" * 129, {}, "task"),
        ("/v1/prompts/Ⅸ", {}, "task"),
        ("/v1/prompts/con.", {}, "task"),
    ],
)
def test_bad_names_and_numbers(served, path, params, param):
    answer = served.client.get(path, params=params)
    if param is None:
        assert answer.status_code == 404
        return
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_delete_leaves_a_tombstone(fresh):
    client = fresh.client
    assert client.delete(ONE).json()["error"]["code"] == "version_aliased"
    assert client.delete(BEST).status_code == 204
    assert client.delete(ONE).status_code == 204
    assert client.delete(ONE).status_code == 404
    assert (client.get(ONE).status_code, client.get(ONE).json()["error"]["code"]) == (410, "version_deleted")
    assert client.get(ONE + "/content").status_code == 410
    fresh.store.push(prompt_file(1), "haiku")
    assert [version["version"] for version in get(fresh, "/v1/prompts/haiku")["data"]] == [2, 3]


# -- aliases ---------------------------------------------------------------------------------------------------------


def test_an_alias_is_made_without_and_moved_with_its_revision(fresh):
    client, path = fresh.client, "/v1/prompts/haiku/aliases/stable"
    made = client.put(path, json={"version": 1})
    AliasAnswer.model_validate(made.json())
    assert (made.status_code, made.json()["level"], made.json()["base"]) == (201, LEVEL, BASE)
    tag = made.headers["etag"]
    assert client.put(path, json={"version": 1}).status_code == 200  # it points there already
    assert client.put(path, json={"version": 2}).status_code == 428
    moved = client.put(path, json={"version": 2}, headers={"If-Match": tag})
    assert (moved.status_code, moved.json()["version"]) == (200, 2)
    assert moved.headers["etag"] != tag
    stale = client.put(path, json={"version": 1}, headers={"If-Match": tag})
    assert (stale.status_code, stale.json()["error"]["type"]) == (412, "precondition_failed")
    assert stale.headers["x-should-retry"] == "false"
    assert client.put(path, json={"version": 1}, headers={"If-Match": "*"}).status_code == 200
    assert client.get(path).json()["version"] == 1


def test_an_alias_that_is_not_there_cannot_be_moved(fresh):
    answer = fresh.client.put("/v1/prompts/haiku/aliases/none", json={"version": 1}, headers={"If-Match": '"7"'})
    assert answer.status_code == 412


def test_delete_an_alias(fresh):
    client = fresh.client
    assert client.delete(BEST, headers={"If-Match": '"999"'}).status_code == 412
    assert client.delete(BEST, headers={"If-Match": client.get(BEST).headers["etag"]}).status_code == 204
    assert client.get(BEST).status_code == 404
    assert client.delete(BEST).status_code == 404


def test_an_alias_lives_at_the_level_of_its_version(fresh):
    client, path = fresh.client, "/v1/prompts/deep/aliases/best"
    assert client.put(path, json={"version": 1}).json()["level"] == "w3g64"
    assert client.get(path).json()["level"] == "w3g64"  # none of this name at the served level, and no other
    assert client.get(path, params={"level": LEVEL}).status_code == 404
    assert client.get(path, params={"level": "w3g64"}).json()["version"] == 1
    assert "deep:best" in [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert client.delete(path).status_code == 404  # a name alone takes nothing away at another level
    assert client.delete(path, params={"level": "w3g64"}).status_code == 204
    assert client.get(path, params={"level": "w3g64"}).status_code == 404


def test_an_alias_at_several_levels_is_told_apart_by_its_level(fresh):
    client, path = fresh.client, "/v1/prompts/deep/aliases/best"
    for seed, level in ((31, "w3g64"), (32, "w8g64")):
        version, _ = fresh.store.push(prompt_file(seed, level=level), "deep")
        client.put(path, json={"version": version.version})
    assert client.get(path).status_code == 404
    assert client.get(path, params={"level": "w8g64"}).json()["level"] == "w8g64"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]].count("deep:best") == 1


@pytest.mark.parametrize("tag", ["7", 'W/"7"', '"7", "8"', '""', '"', "x" * 300])
def test_if_match_takes_one_strong_tag(served, tag):
    answer = served.client.put(BEST, json={"version": 2}, headers={"If-Match": tag})
    assert (answer.status_code, answer.json()["error"]["param"].lower()) == (400, "if-match")


def test_an_alias_of_nothing(served):
    assert served.client.put("/v1/prompts/haiku/aliases/x", json={"version": 99}).status_code == 404
    assert served.client.put("/v1/prompts/none-such/aliases/x", json={"version": 1}).status_code == 404


# -- measurements ----------------------------------------------------------------------------------------------------


def test_measurements_are_written_and_read(fresh):
    path = ONE + "/measurements"
    made = fresh.client.post(path, json=MEASURED)
    assert made.status_code == 201
    MeasurementAnswer.model_validate(made.json())
    fresh.client.post(path, json={**MEASURED, "value": 9, "split": None})
    listed = get(fresh, path)
    assert {(item["split"], item["gain"]) for item in listed["data"]} == {("select", None)}
    assert [item["value"] for item in listed["data"]] == [9.5, 9.0]
    assert [item["value"] for item in get(fresh, path, after=listed["data"][0]["id"])["data"]] == [9.0]


def test_resolution_reads_them(fresh):
    fresh.store.push(prompt_file(4, level="w3g64", weights=None), "deep")
    for version, value in ((1, 8.0), (2, 9.0)):
        path = f"/v1/prompts/deep/versions/{version}/measurements"
        assert fresh.client.post(path, json={**MEASURED, "value": value}).status_code == 201
    told = fresh.client.post("/v1/generate", json={"text": "a", "task": "deep", "max_tokens": 1}).json()["prompt"]
    assert (told["version"], told["resolution"], told["measured"]) == (1, "transferred", True)


def test_resolution_does_not_read_what_is_reported(fresh):
    fresh.store.push(prompt_file(4, level="w3g64", weights=None), "deep")
    for version, value, split in ((1, 8.0, "select"), (2, 1.0, "report"), (2, 1.0, "test")):
        path = f"/v1/prompts/deep/versions/{version}/measurements"
        assert fresh.client.post(path, json={**MEASURED, "value": value, "split": split}).status_code == 201
    told = fresh.client.post("/v1/generate", json={"text": "a", "task": "deep", "max_tokens": 1}).json()["prompt"]
    assert told["version"] == 1


def test_an_alias_may_ask_for_a_measured_gain(fresh):
    client, path, measurements = fresh.client, "/v1/prompts/haiku/aliases/stable", ONE + "/measurements"
    gain = {"gain": 0.2, "gain_low": 0.1, "gain_high": 0.3}

    def put(version=1, **headers):
        return client.put(path, params={"require": "gain"}, json={"version": version}, headers=headers)

    refused = put()
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "gain_not_shown")
    assert refused.headers["x-should-retry"] == "false"
    assert "promptstitch evaluate" in refused.json()["error"]["message"]
    client.post(measurements, json={**MEASURED, **gain})  # on weights that nobody knows
    client.post(measurements, json={**MEASURED, **gain, "served_weights": "sha256:" + "00" * 32})
    client.post(measurements, json={**MEASURED, **gain, "served_weights": WEIGHTS, "gain_low": 0.0})
    assert put().status_code == 409
    assert client.get(path).status_code == 404
    made = client.post(measurements, json={**MEASURED, **gain, "served_weights": WEIGHTS, "split": "report"})
    assert {name: made.json()[name] for name in gain} == gain
    assert put().status_code == 201
    assert put(2, **{"If-Match": "*"}).status_code == 409
    assert client.put(path, json={"version": 2}, headers={"If-Match": "*"}).status_code == 200  # nobody asked
    bad = client.put(path, params={"require": "luck"}, json={"version": 1})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "require")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"value": "9"}, "/value"),
        ({"metric": "Perplexity!"}, "/metric"),
        ({"dataset": "c4"}, "/dataset"),
        ({"served_level": "w99"}, "/served_level"),
        ({"scored_tokens": 0}, "/scored_tokens"),
        ({"served_weights": "x"}, "/served_weights"),
        ({"note": "x"}, "/note"),
        ({"split": "Report"}, "/split"),
        ({"gain": 0.1}, "/gain_low"),
        ({"gain": 0.1, "gain_low": 0.2, "gain_high": 0.3}, "/gain"),
        ({"gain": 0.1, "gain_low": 0.0, "gain_high": 1e9}, "/gain_high"),
        ({"gain": "0.1", "gain_low": 0.0, "gain_high": 0.2}, "/gain"),
    ],
)
def test_bad_measurements(served, change, param):
    answer = served.client.post(ONE + "/measurements", json={**MEASURED, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_measurements_of_nothing(served):
    assert served.client.get("/v1/prompts/haiku/versions/99/measurements").status_code == 404
    assert served.client.post("/v1/prompts/none/versions/1/measurements", json=MEASURED).status_code == 404
