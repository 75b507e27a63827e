"""One request answered in this process: store, model and engine for a single text, told in the lines of `/v1/generate`.

Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from cli.local import open_store
from cli.model import start_engine, to_serve
from cli.output import CommandError, Steps
from cli.registry import Answer
from engine.api import Engine, EngineError
from engine.request import Event, GenerationRequest, RequestDone, RequestFailed, SamplingParams, TokenEvent
from prompts_store.prompt import SoftPrompt
from prompts_store.reference import parse_reference
from prompts_store.resolution import Query
from prompts_store.store import PromptStore
from server.finder import Stitch, served
from server.seeds import seed
from server.settings import Settings


def answer(
    settings: Settings, text: str, chat: bool, ref: str | None, sampling: Mapping[str, Any], steps: Steps
) -> Iterator[Answer]:
    """`text` in each line, `prompt`, `usage` and `finish_reason` in the last. `sampling` as in SamplingParams.

    Raises CommandError, StoreError, ModelError.
    """
    query = None if ref is None else Query(parse_reference(ref), settings.resolution)
    params = SamplingParams(**{**sampling, "stop": tuple(sampling.get("stop", ()))})
    chosen, identity = to_serve(settings, steps)
    with open_store(chosen) as store:
        engine = start_engine(chosen, identity, steps)
        try:
            seed(store, engine, chosen)
            stitch = None if query is None else _find(store, query, engine)
            ids = _encode(engine, text, chat, stitch)
            for event in _events(engine, ids, stitch.prompt if stitch else None, params):
                if isinstance(event, TokenEvent):
                    yield {"text": event.text, "finish_reason": event.finish_reason}
                elif isinstance(event, RequestDone):
                    yield {"text": "", "prompt": stitch and stitch.told(engine.info), "usage": _usage(event)}
        finally:
            engine.close()


def _find(store: PromptStore, query: Query, engine: Engine) -> Stitch | None:
    resolved = store.resolve(query, served(engine.info))
    if resolved.version is None:
        return None
    return Stitch(store.load(resolved.version.digest), resolved.version, resolved.resolution)


def _encode(engine: Engine, text: str, chat: bool, stitch: Stitch | None) -> list[int]:
    try:
        if chat:
            return engine.tokenizer.encode_chat([{"role": "user", "content": text}])
        return engine.tokenizer.encode(text, stitch.prompt.bos if stitch else "tokenizer")
    except ValueError as error:
        raise CommandError(str(error)) from error


def _events(engine: Engine, ids: Sequence[int], prompt: SoftPrompt | None, params: SamplingParams) -> Iterator[Event]:
    """All events of one request, as they come. Raises CommandError."""
    told: SimpleQueue[Sequence[Event]] = SimpleQueue()
    try:
        engine.submit(GenerationRequest("generate", tuple(ids), prompt, params), told.put)
    except EngineError as error:
        raise CommandError(str(error)) from error
    while True:
        for event in told.get():
            if isinstance(event, RequestFailed):
                raise CommandError(event.message)
            yield event
            if isinstance(event, RequestDone):
                return


def _usage(done: RequestDone) -> dict[str, int]:
    return {
        "text_tokens": done.text_tokens,
        "soft_tokens": done.soft_tokens,
        "completion_tokens": done.completion_tokens,
    }
