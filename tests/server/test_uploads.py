"""Uploads: what comes is hashed, bounded, read strictly and pushed once."""

import base64
import hashlib
import http.client
import json
import tempfile

import pytest
from support.fake_engine import BASE, LEVEL
from support.served import prompt_bytes, prompt_file, serving, soft_prompt
from support.uploads import RAW, refused, upload

from prompts_store.file import PromptFile, encode_prompt, read_prompt
from server.schemas.registry import UploadAnswer


def plain(seed=0, **changes) -> bytes:
    """A file of another tool: rows, and nothing said about them."""
    rows = soft_prompt(seed, **changes).tensors["prompt_embeddings"].numpy().astype("<f4").tobytes()
    shape = list(soft_prompt(seed, **changes).shape)
    header = json.dumps(
        {"prompt_embeddings": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(rows)]}}
    ).encode()
    return len(header).to_bytes(8, "little") + header + rows


def adapter(seed=0, **config):
    whole = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 8, **config}
    return json.dumps(whole).encode(), plain(seed)


def test_a_new_version(fresh):
    answer = upload(fresh, prompt_bytes(9))
    body = answer.json()
    UploadAnswer.model_validate(body)
    assert answer.headers["location"] == "/v1/prompts/new/versions/1"
    assert answer.headers["etag"] == f'"{soft_prompt(9).digest}"'
    assert (body["task"], body["version"], body["level"], body["base_bound"]) == ("new", 1, LEVEL, False)
    assert (body["digest"], body["num_virtual_tokens"], body["hidden_size"]) == (soft_prompt(9).digest, 4, 8)
    assert fresh.client.get(answer.headers["location"]).json()["digest"] == soft_prompt(9).digest


def test_the_same_again_is_200_and_no_new_version(fresh):
    first = upload(fresh, prompt_bytes(9)).json()
    assert upload(fresh, prompt_bytes(9), 200).json() == first
    assert upload(fresh, prompt_bytes(10)).json()["version"] == 2


def test_it_is_served_at_once(fresh):
    upload(fresh, prompt_bytes(9))
    told = fresh.client.post("/v1/generate", json={"text": "hi", "task": "new", "max_tokens": 1}).json()
    assert told["prompt"]["digest"] == soft_prompt(9).digest


def test_what_goes_up_comes_down(fresh):
    upload(fresh, prompt_bytes(9))
    answer = fresh.client.get("/v1/prompts/new/versions/1/content")
    assert answer.headers["content-disposition"] == 'attachment; filename="new-1.safetensors"'
    file = read_prompt(answer.content)
    assert (file.prompt.digest, file.provenance.task) == (soft_prompt(9).digest, "new")
    same = fresh.client.get(answer.request.url.path, headers={"If-None-Match": answer.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    assert fresh.client.get(answer.request.url.path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_file_that_does_not_say_is_bound_and_told(fresh):
    assert refused(fresh, plain(9)) == "level_unknown"
    body = upload(fresh, plain(9), level="w3g64", bos="none").json()
    assert (body["base"], body["base_bound"], body["level"], body["bos"]) == (BASE, True, "w3g64", "none")


@pytest.mark.parametrize(
    ("content", "query", "code"),
    [
        (prompt_bytes(1, base="sha256:" + "0b" * 32), {}, "base_model_mismatch"),
        (prompt_bytes(1, h=16), {}, "hidden_size_mismatch"),
        (prompt_bytes(1, n=65), {}, "too_many_virtual_tokens"),
        (prompt_bytes(1), {"level": "w3g64"}, "level_mismatch"),
        (b"\x80\x05cos\nsystem\n", {}, "unsupported_format"),
        (b"PK\x03\x04" + b"\0" * 100, {}, "unsupported_format"),
        (b"", {}, "truncated"),
        (prompt_bytes(1)[:-1], {}, None),
        (prompt_bytes(1) + b"x", {}, None),
    ],
)
def test_artefacts_that_are_refused(served, content, query, code):
    before = served.store.stats()
    told = refused(served, content, task="bad", **query)
    assert code in (None, told)
    assert served.store.stats() == before


def test_what_the_engine_says_no_to_is_a_bad_artefact(served, monkeypatch):
    from engine.api import InvalidRequest

    def no(prompt):
        raise InvalidRequest("prompt", "not for this model", "not_for_us")

    monkeypatch.setattr(served.engine, "check_prompt", no)
    assert refused(served, prompt_bytes(11)) == "not_for_us"


@pytest.mark.parametrize(
    ("query", "param"),
    [({"level": "W4"}, "level"), ({"bos": "maybe"}, "bos"), ({"lvl": "w4"}, "lvl"), ({"level": "x" * 65}, "level")],
)
def test_bad_query(served, query, param):
    assert upload(served, prompt_bytes(1), 400, **query).json()["error"]["param"] == param


def test_a_level_that_is_none(served):
    assert refused(served, plain(1), 400, level="w99") == "invalid_level"


@pytest.mark.parametrize("kind", ["application/zip", "application/x-tar", "text/plain", "application/json", "x"])
def test_other_media_types(served, kind):
    answer = served.client.post("/v1/prompts/new/versions", content=b"PK", headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_format")


def test_compressed_bodies_are_not_unpacked(served):
    assert refused(served, prompt_bytes(1), 415, headers={"Content-Encoding": "gzip"}) == "unsupported_format"


def test_the_base_is_no_task(served):
    assert refused(served, prompt_bytes(1), 409, task="tiny") == "task_reserved"


# -- Content-Digest --------------------------------------------------------------------------------------------------


def digest_of(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def test_content_digest(fresh):
    content = prompt_bytes(12)
    good, other = digest_of(content), digest_of(b"other")
    assert refused(fresh, content, headers={"Content-Digest": f"sha-256=:{other}:"}) == "digest_mismatch"
    for header in (f"sha-512=:{other}:", "sha-256=:AAAA:", "sha-256", f"md5=:{good}:", "sha-256=:====:"):
        assert refused(fresh, content, 400, headers={"Content-Digest": header}) == "invalid_value"
    assert fresh.client.get("/v1/prompts/new").status_code == 404
    upload(fresh, content, headers={"Content-Digest": f"sha-512=:{other}:, sha-256=:{good}:"})


# -- PEFT ------------------------------------------------------------------------------------------------------------


def send_parts(served, files, status=201, **query):
    answer = served.client.post("/v1/prompts/peft/versions", files=files, params={"level": LEVEL, **query})
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize("by_field", [True, False])
def test_an_adapter_in_two_parts(fresh, by_field):
    config, weights = adapter(13)
    names = ("adapter_config.json", "adapter_model.safetensors")
    parts = zip(names, (config, weights), strict=True)
    files = [(n, (f"blob-{n}", c)) if by_field else (f"file-{n}", (n, c)) for n, c in parts]
    body = send_parts(fresh, files)
    assert (body["digest"], body["base_bound"]) == (soft_prompt(13).digest, True)


def test_a_prefix_is_kept_as_kv(fresh):
    config, _ = adapter(peft_type="PREFIX_TUNING", num_attention_heads=2)
    files = {"adapter_config.json": config, "adapter_model.safetensors": plain(13, h=2 * 2 * 8)}
    body = send_parts(fresh, {name: (name, content) for name, content in files.items()})
    assert (body["kind"], body["num_virtual_tokens"], body["train"]["peft"]["type"]) == ("kv", 4, "PREFIX_TUNING")


def test_a_large_adapter_goes_over_the_disk(tmp_path):
    """Beyond a megabyte the parts are in files while they come."""
    from support.fake_engine import FakeEngine

    engine = FakeEngine()
    engine.info = engine.info.__class__(
        **{name: getattr(engine.info, name) for name in engine.info.__dataclass_fields__} | {"hidden_size": 8192}
    )
    with serving(tmp_path / "store", engine=engine) as served:
        config, _ = adapter(num_virtual_tokens=64, token_dim=8192)
        files = {"adapter_config.json": config, "adapter_model.safetensors": plain(1, n=64, h=8192)}
        body = send_parts(served, {name: (name, content) for name, content in files.items()})
        assert body["digest"] == soft_prompt(1, n=64, h=8192).digest


@pytest.mark.parametrize(
    ("names", "status", "code"),
    [
        (["adapter_config.json"], 422, "wrong_parts"),
        (["adapter_config.json", "adapter_model.bin"], 422, "wrong_parts"),
        (["adapter_config.json", "adapter_config.json"], 422, "wrong_parts"),
        (["adapter_config.json", "adapter_model.safetensors", "README.md"], 400, "invalid_multipart"),
        ([f"part-{k}" for k in range(1000)], 400, "invalid_multipart"),
    ],
)
def test_other_parts(served, names, status, code):
    files = [(name, (name, b"{}")) for name in names]
    assert send_parts(served, files, status)["error"]["code"] == code


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"peft_type": "LORA"}, "unsupported_peft_type"),
        ({"peft_type": "PREFIX_TUNING"}, "invalid_adapter_config"),
        ({"num_virtual_tokens": 10**9}, None),
        ({"padding": "x" * 70_000}, "invalid_adapter_config"),
    ],
)
def test_adapters_that_are_refused(served, config, code):
    files = dict(zip(("adapter_config.json", "adapter_model.safetensors"), adapter(13, **config), strict=True))
    error = send_parts(served, {name: (name, content) for name, content in files.items()}, 422)["error"]
    assert code in (None, error["code"])


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=" + "x" * 20_000, b"--x"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n--x--\r\n',
        ),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; filename=y\r\n\r\nz"),
    ],
)
def test_multipart_that_is_none(served, kind, body):
    answer = served.client.post("/v1/prompts/peft/versions", content=body, headers={"Content-Type": kind})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["code"] in ("invalid_multipart", "wrong_parts")


# -- size and time ---------------------------------------------------------------------------------------------------


def test_the_cap_counts_bytes_that_came(tmp_path, monkeypatch):
    """Chunked, so that no Content-Length could tell beforehand; nothing stays on the disk."""
    monkeypatch.setattr("server.uploads.WRITE_BYTES", 1024)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "staged"))
    (tmp_path / "staged").mkdir()
    with serving(tmp_path / "store", max_upload=64 * 1024) as served:
        assert refused(served, iter([b"x" * 1024] * 65), 413) == "file_too_large"
        assert refused(served, b"x" * (64 * 1024 + 1), 413) == "file_too_large"
        assert refused(served, b"x" * (64 * 1024)) == "unsupported_format"
        assert not list((tmp_path / "staged").iterdir())


def test_a_declared_size_is_refused_before_it_comes(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.putrequest("POST", "/v1/prompts/new/versions")
    connection.putheader("Content-Type", RAW["Content-Type"])
    connection.putheader("Content-Length", str(10**15))
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert json.loads(answer.read())["error"]["code"] == "file_too_large"


def test_while_one_uploads_slowly_others_are_served(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    connection.putrequest("POST", "/v1/prompts/slow/versions")
    connection.putheader("Content-Type", RAW["Content-Type"])
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    connection.send(b"x")
    assert served.client.get("/livez").elapsed.total_seconds() < 0.5
    connection.close()


def test_a_disk_that_is_full(served, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.uploads.WRITE_BYTES", 64)  # else it stays in memory
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    answer = upload(served, prompt_bytes(1), 507)
    assert answer.json()["error"]["code"] == "storage_full"


# -- seeds -----------------------------------------------------------------------------------------------------------


def test_a_new_registry_starts_with_its_seeds(tmp_path):
    files = []
    for seed, base in ((1, BASE), (2, BASE), (3, "sha256:" + "0b" * 32)):
        file = prompt_file(seed, base=base)
        named = PromptFile(file.prompt, file.provenance.__class__(task=f"task{seed}", level=LEVEL))
        files.append(tmp_path / f"{seed}.safetensors")
        files[-1].write_bytes(encode_prompt(named))
    with serving(tmp_path / "store", seed_prompts=tuple(files)) as served:
        assert [task["task"] for task in served.client.get("/v1/prompts").json()["data"]] == ["task1", "task2"]
        for task in ("task1", "task2"):
            assert served.client.delete(f"/v1/prompts/{task}/versions/1").status_code == 204
    with serving(tmp_path / "store", seed_prompts=tuple(files)) as served:  # deleted is deleted
        assert served.client.get("/v1/prompts").json()["data"] == []
