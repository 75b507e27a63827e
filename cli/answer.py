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
from engine.score import ScoringFailed
from prompts_store.prompt import SoftPrompt
from prompts_store.reference import parse_reference
from prompts_store.resolution import Query
from prompts_store.store import PromptStore
from server.finder import Stitch, served
from server.golden import GoldenTests
from server.seeds import seed
from server.settings import Settings


def answer(
    settings: Settings,
    text: str,
    chat: bool,
    ref: str | None,
    soft_tokens: int | None,
    sampling: Mapping[str, Any],
    steps: Steps,
) -> Iterator[Answer]:
    """`text` in each line, `prompt`, `usage` and `finish_reason` in the last. `sampling` as in SamplingParams.

    `soft_tokens`: use the first positions of the prompt alone. Raises CommandError, StoreError, ModelError.
    """
    query = None if ref is None else Query(parse_reference(ref), settings.resolution)
    params = SamplingParams(**{**sampling, "stop": tuple(sampling.get("stop", ()))})
    chosen, identity = to_serve(settings.model_copy(update={"kv_disk": 0}), steps)  # one prefix is not worth a look
    with open_store(chosen) as store:
        engine = start_engine(chosen, identity, steps)
        try:
            stitch = find_stitch(store, query, engine, chosen, soft_tokens)
            ids = _encode(engine, text, chat, stitch)
            for event in _events(engine, ids, stitch.prompt if stitch else None, params):
                if isinstance(event, TokenEvent):
                    yield {"text": event.text, "finish_reason": event.finish_reason}
                elif isinstance(event, RequestDone):
                    yield {"text": "", "prompt": stitch and stitch.told(engine.info), "usage": _usage(event)}
        finally:
            engine.close()


def find_stitch(
    store: PromptStore, query: Query | None, engine: Engine, settings: Settings, soft_tokens: int | None
) -> Stitch | None:
    """The prompt, tested as a server tests it. Raises CommandError, StoreError."""
    golden = GoldenTests()
    try:
        seed(store, engine, settings, golden)
        resolved = None if query is None else store.resolve(query, served(engine.info))
        if resolved is None or resolved.version is None:
            if soft_tokens is not None:
                raise CommandError("--soft-tokens: no prompt stands in front of this text", usage=True)
            return None
        prompt = store.load(resolved.version.digest)
        golden.check(engine, prompt, resolved.version)
    except (EngineError, ScoringFailed) as error:
        raise CommandError(f"the self-test of a prompt could not be run: {error}") from error
    try:
        prompt = prompt if soft_tokens is None else prompt.first(soft_tokens)
    except ValueError as error:
        raise CommandError(f"--soft-tokens: {error}", usage=True) from error
    return Stitch(prompt, resolved.version, resolved.resolution)


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
