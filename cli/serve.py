"""`promptstitch serve`: settings, a store, a model, and the server over them; says what is served once it is.

The options are the server's settings. Knows no HTTP beyond the `curl` line that it prints.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Config, takes_settings
from cli.output import progress, say

if TYPE_CHECKING:
    from engine.api import EngineInfo
    from engine.engine import LocalEngine
    from prompts_store.store import PromptStore

MIB = 1 << 20
PANELS = {
    "Model": ("level", "dtype", "compute", "device", "base", "served_model_name"),
    "Prompts": ("store", "blobs", "seed_prompts", "resolution", "prompt_cache"),
    "Engine": (
        "max_model_len",
        "max_prompt_tokens",
        "max_prompt_norm",
        "kv_memory",
        "kv_disk",
        "kv_folder",
        "page_size",
        "max_running",
        "max_batch_tokens",
        "max_queue",
        "max_queued_tokens",
    ),
    "Requests": (
        "max_tokens_default",
        "max_body",
        "max_upload",
        "request_timeout",
        "receipt_timeout",
        "key_concurrency",
    ),
    "Server": (
        "host",
        "port",
        "insecure",
        "allowed_hosts",
        "docs",
        "log_level",
        "drain",
        "drain_delay",
        "liveness_timeout",
    ),
}
Model = Annotated[
    str | None,
    typer.Argument(help="Checkpoint folder, or a name that was pulled; else the embedded model.", show_default=False),
]


@takes_settings(PANELS)
def serve(model: Model = None, config: Config = None, **flags: Any) -> None:
    """Serve a model over HTTP, with the right soft prompt in front of every request.

    Every option can also be set by an environment variable (--max-running: PROMPTSTITCH_MAX_RUNNING) or a key of the
    TOML file (max_running); a flag comes before a variable, a variable before the file. Lists are repeated flags, or
    one variable with commas; sizes may be written 256MiB.
    """
    from server.settings import load_settings

    settings = load_settings(config, model=model, **flags)

    import torch

    from cli.local import open_store
    from cli.model import start_engine, to_serve
    from server.auth import check_exposure
    from server.run import serve as run

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    with open_store(settings) as store, progress(quiet=False) as steps:
        check_exposure(settings, store)
        settings, identity = to_serve(settings, steps)

        def ready(info: EngineInfo, url: str) -> None:
            announce(info, url, store)

        code = run(settings, lambda chosen: alone(cores, start_engine, chosen, identity, steps), store, ready)
    raise typer.Exit(code)


def alone(cores: int, start: Callable[..., LocalEngine], *arguments: Any) -> LocalEngine:
    """The engine that `start` makes on so many cores, in a thread that ends with it; others compute on one each.

    OpenMP keeps workers for every thread that ever computed in parallel. Once there are more of them than cores, they
    sleep between two products instead of waiting, which costs a decoding step a third of its speed.
    """
    import torch

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(cores,)) as thread:
        engine = thread.submit(start, *arguments).result()
    torch.set_num_threads(1)
    return engine


def announce(info: EngineInfo, url: str, store: PromptStore) -> None:
    """What is served, and a line to try it with."""
    stats = store.stats()
    url = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")  # every address is no address to ask
    pages = f"{info.num_pages} pages of {info.page_size} tokens ({info.kv_bytes / MIB:.0f} MiB)"
    computes = info.dtype if info.compute == info.dtype else f"{info.dtype}, products in {info.compute},"
    say(f"model    {info.model} at {info.level}, {info.weight_bytes / MIB:.0f} MiB, {computes} on {info.device}")
    say(f"base     {info.base}")
    say(f"weights  {info.weights}")
    say(f"context  {info.max_model_len} tokens; KV cache: {pages}")
    say(f"prompts  {stats.versions} for {stats.tasks} tasks")
    say(f"ready    {url}  (documentation: {url}/docs)")
    say("")
    say(try_it(info, url, store))


def try_it(info: EngineInfo, url: str, store: PromptStore) -> str:
    """A `curl` line that works against this server now."""
    tasks = store.versions.tasks(limit=1, level=info.level, base=info.base).items
    body: dict[str, Any] = {"text": "The capital of France is"}
    if tasks:
        if store.versions.get(tasks[0].task, tasks[0].latest).chat_template == info.chat_template != "none":
            body = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
        body = {"task": tasks[0].task, **body}
    body |= {"max_tokens": 16, "temperature": 0}
    words = ["curl", "-s", f"{url}/v1/generate", "-H", "Content-Type: application/json"]
    key = ' -H "Authorization: Bearer $PROMPTSTITCH_API_KEY"' if store.keys.any() else ""
    return f"{shlex.join(words)}{key} -d {shlex.quote(json.dumps(body))}"
