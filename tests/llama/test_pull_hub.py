"""Pulling from a Hub that the real client talks to: no pickles, no code, whole or not at all."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from llama.errors import UnsupportedModel
from llama.fingerprint import weights_digest
from llama.manifest import Manifest
from llama.pull import PullFailed, pull

COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as its client asks for. `files` of one repository, `cut` breaks one download."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    cut: str | None = None
    asked: list[tuple[str, str, str | None]] = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        type(self).asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.send(200, json.dumps(entries).encode(), body)
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self.send(200, json.dumps(info).encode(), body)
        elif path.startswith("/org/tiny/resolve/") and path.split("/", 5)[5] in self.files:
            self.send_file(path.split("/", 5)[5], body)
        else:
            self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name, body):
        data = self.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.cut == name and body:
            type(self).cut = None
            self.send(200, data[: len(data) // 2], body, {**headers, "Content-Length": str(len(data))})
            self.close_connection = True
            return
        if start and body:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if start and body else 200, data[start:], body, headers)

    def send(self, status, data, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(make_checkpoint, monkeypatch):
    folder = make_checkpoint("upstream", shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = dict.fromkeys(["pytorch_model.bin", "modeling_evil.py", "original/model.safetensors", "README.md"], b"x")
    handler = type("TinyHub", (Hub,), {"files": files | extra, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_repository_comes_without_pickles_and_code(tmp_path, hub, make_checkpoint):
    target = pull("org/tiny", tmp_path / "got")
    assert sorted(path.name for path in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "promptstitch.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    fetched = {path.rsplit("/", 1)[1] for method, path, _ in hub.asked if "/resolve/" in path}
    assert not fetched & {"pytorch_model.bin", "modeling_evil.py"}
    manifest = Manifest.read(target)
    assert manifest.source == f"hub:org/tiny@{COMMIT}"
    assert manifest.weights == weights_digest(make_checkpoint("whole"))


def test_a_cut_download_leaves_nothing_in_place_and_goes_on(tmp_path, hub):
    shards = [name for name in hub.files if name.startswith("model-")]
    hub.cut = shards[1]
    try:
        pull("org/tiny", tmp_path / "got")
    except PullFailed:
        assert not (tmp_path / "got").exists()
        pull("org/tiny", tmp_path / "got")
    target = tmp_path / "got"
    assert {name: (target / name).read_bytes() for name in shards} == {name: hub.files[name] for name in shards}
    bodies = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(shards[0])]
    assert len(bodies) == 1  # the finished shard was not fetched a second time


def test_a_hub_repository_of_pickles_is_refused(tmp_path, hub):
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith(".safetensors")}
    with pytest.raises(UnsupportedModel, match="pickled weights are never read"):
        pull("org/tiny", tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_an_unknown_repository_is_named(tmp_path, hub):
    with pytest.raises(PullFailed, match="org/absent"):
        pull("org/absent", tmp_path / "got")
