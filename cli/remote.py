"""A server's registry, and its `/v1/generate`, over its own HTTP API. Knows httpx; knows no store and no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.progress import open as open_with_bar

from cli.output import CommandError
from cli.registry import Answer, Source, Task
from prompts_store.peft import CONFIG_NAME, WEIGHTS_NAME

PAGE = 1000
BAR_BYTES = 8 << 20  # a smaller file is gone before anyone could look
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 600.0  # the longest that a server takes by default
USAGE = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)


@contextmanager
def client(url: str, key: str | None) -> Iterator[httpx.Client]:
    """A connection to the server at `url`, with its API key. Every failure of transport becomes a CommandError."""
    if key and not key.isascii():
        raise CommandError("--key: an API key holds no such characters; take it as it was shown", usage=True)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    try:
        with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout) as http:
            yield http
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CommandError(f"--url {url}: {error or type(error).__name__}; is a server running there?") from error


class RemoteRegistry:
    """See `registry.Registry`."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def tasks(self, level: str | None, base: str | None) -> list[Answer]:
        pages = self._pages("/v1/prompts", level=level, base=base)
        return [item for page in pages for item in page["data"]]

    def task(self, task: str, level: str | None, base: str | None) -> Task:
        pages = list(self._pages(f"/v1/prompts/{_part(task)}", level=level, base=base))
        return Task([version for page in pages for version in page["data"]], pages[0]["aliases"])

    def push(self, source: Source, task: str, level: str | None, bos: str | None) -> Answer:
        with ExitStack() as files:
            weights = files.enter_context(_opened(source.weights))
            body: Mapping[str, Any] = {"content": weights, "headers": {"Content-Type": "application/octet-stream"}}
            if source.config is not None:
                config = files.enter_context(source.config.open("rb"))
                body = {"files": {CONFIG_NAME: (CONFIG_NAME, config), WEIGHTS_NAME: (WEIGHTS_NAME, weights)}}
            path = f"/v1/prompts/{_part(task)}/versions"
            response = self._call("POST", path, params=_given(level=level, bos=bos), **body)
        return {**response.json(), "new": response.status_code == HTTPStatus.CREATED}

    def content(self, task: str, version: int) -> bytes:
        return self._call("GET", f"/v1/prompts/{_part(task)}/versions/{version}/content").content

    def delete(self, task: str, version: int) -> None:
        self._call("DELETE", f"/v1/prompts/{_part(task)}/versions/{version}")

    def put_alias(self, task: str, alias: str, version: int, gain: bool = False) -> Answer:
        path, body = f"/v1/prompts/{_part(task)}/aliases/{_part(alias)}", {"version": version}
        query = {"require": "gain"} if gain else {}
        response = self._send("PUT", path, json=body, params=query)
        if response.status_code == HTTPStatus.PRECONDITION_REQUIRED:  # it exists, and points elsewhere
            response = self._send("PUT", path, json=body, params=query, headers={"If-Match": "*"})
        return {**checked(response).json(), "new": response.status_code == HTTPStatus.CREATED}

    def delete_alias(self, alias: Answer) -> None:
        path = f"/v1/prompts/{_part(alias['task'])}/aliases/{_part(alias['alias'])}"
        self._call("DELETE", path, params={"level": alias["level"], "base": alias["base"]})

    def measurements(self, task: str, version: int) -> list[Answer]:
        pages = self._pages(f"/v1/prompts/{_part(task)}/versions/{version}/measurements")
        return [item for page in pages for item in page["data"]]

    def measure(self, task: str, version: int, measurement: Answer) -> None:
        """Write a measurement down, given as the API takes it."""
        self._call("POST", f"/v1/prompts/{_part(task)}/versions/{version}/measurements", json=measurement)

    def create_key(self, name: str, scopes: Sequence[str]) -> Answer:
        answer: Answer = self._call("POST", "/v1/keys", json={"name": name, "scopes": list(scopes)}).json()
        return answer

    def keys(self) -> list[Answer]:
        return [item for page in self._pages("/v1/keys") for item in page["data"]]

    def revoke_key(self, key_id: str) -> None:
        self._call("DELETE", f"/v1/keys/{_part(key_id)}")

    def served_level(self) -> str:
        return str(self._call("GET", "/version").json()["level"])

    def generate(self, body: Mapping[str, Any]) -> Iterator[Answer]:
        """The lines of a streamed answer: `text` in each, `prompt` and `usage` in the last."""
        with self._http.stream("POST", "/v1/generate", json={**body, "stream": True}) as response:
            if response.is_error:
                response.read()
            for line in checked(response).iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data and data != "[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise CommandError(event["error"]["message"])
                    yield event

    def _pages(self, path: str, **query: str | None) -> Iterator[Answer]:
        after = None
        while True:
            page: Answer = self._call("GET", path, params=_given(limit=PAGE, after=after, **query)).json()
            yield page
            if (after := page["next"]) is None:
                return

    def _call(self, method: str, path: str, **request: Any) -> httpx.Response:
        return checked(self._send(method, path, **request))

    def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self._http.request(method, path, **request)


def checked(response: httpx.Response) -> httpx.Response:
    """The response, if it is a good one. Raises CommandError with what the server says."""
    if response.is_success:
        return response
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{response.request.url} answered {response.status_code}; is that a promptstitch server?"
    if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        message += " (--key or PROMPTSTITCH_API_KEY)"
    raise CommandError(message, usage=response.status_code in USAGE)


def _opened(path: Path) -> Any:
    """A file to upload, with a bar on stderr if that takes a while."""
    console = Console(stderr=True)
    if path.stat().st_size < BAR_BYTES or not console.is_terminal:
        return path.open("rb")
    return open_with_bar(path, "rb", description="upload", transient=True, console=console)


def _given(**query: Any) -> dict[str, Any]:
    return {name: value for name, value in query.items() if value is not None}


def _part(name: str) -> str:
    """One segment of a path, whatever stands in it."""
    return quote(name, safe="")
