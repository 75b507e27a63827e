"""What the three ways to ask have in common: name to prompt, text to ids, request to engine.

Below this module there are no names; above it there are no tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from engine.api import Engine, InvalidRequest, Overloaded, Tokenizer
from engine.request import GenerationRequest, SamplingParams
from prompts_store.errors import BadReference, NotFound, Unresolved
from prompts_store.prompt import Bos
from prompts_store.reference import parse_reference
from prompts_store.resolution import Policy, Query
from server.auth import caller_of
from server.errors import ApiError
from server.exchange import exchange_of
from server.finder import Stitch
from server.generation import Generation
from server.state import Services, services_of

LONG_TEXT = 4096  # characters from which tokenising goes to a thread
Ids = Sequence[int]
Find = Callable[[Services, Engine], Awaitable[Stitch | None]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The texts of a request. `encode` gives the ids of each; it may raise ValueError. `param` is where they stand."""

    encode: Callable[[Tokenizer, Bos], list[Ids]]
    characters: int
    param: str


@dataclass(frozen=True, slots=True)
class Asked:
    """How to generate, the same for every text. `timeout` in seconds; `soft_tokens`: of the prompt, None for all."""

    sampling: SamplingParams
    n: int
    timeout: float | None
    streaming: bool
    soft_tokens: int | None


@dataclass(frozen=True, slots=True)
class Begun:
    """A generation under way, and what its answer will say beside the text."""

    generation: Generation
    engine: Engine
    stitch: Stitch | None
    texts: list[Ids]
    id: str

    @property
    def prompt(self) -> dict[str, Any] | None:
        """The `prompt` field."""
        return self.stitch.told(self.engine.info) if self.stitch else None

    @property
    def headers(self) -> dict[str, str]:
        """Headers that name the digest used."""
        return {"X-Prompt-Digest": self.stitch.version.digest} if self.stitch else {}

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: changes with the weights."""
        return "fp_" + self.engine.info.weights.rpartition(":")[2][:12]


async def begin(request: Request, find: Find, inputs: Inputs, asked: Asked) -> Begun:
    """Everything up to the engine's queue. The caller reads the generation and closes it.

    Raises ApiError, StoreError, EngineError; then nothing is left behind.
    """
    services, exchange = services_of(request), exchange_of(request.scope)
    caller = caller_of(request)
    with ExitStack() as stack:
        engine = stack.enter_context(services.host.place(caller.key_id))
        stitch = _shortened(services, await find(services, engine), asked.soft_tokens)
        if stitch is not None:
            exchange.task, exchange.prompt_digest = stitch.version.task, stitch.version.digest
        texts = await tokenise(engine.tokenizer, inputs, stitch.prompt.bos if stitch else "tokenizer")
        if len(texts) > (most := services.settings.max_queue):
            message = f"{len(texts)} texts are more than may wait here at once ({most}); send them in several requests"
            raise ApiError(400, "too_many_texts", message, param=inputs.param)
        name = secrets.token_hex(12)
        limit = services.settings.request_timeout
        requests = [
            GenerationRequest(
                request_id=f"{name}-{index}",
                token_ids=tuple(ids),
                prompt=stitch.prompt if stitch else None,
                sampling=asked.sampling,
                n=asked.n,
                timeout=min(asked.timeout or limit, limit),
                namespace=caller.namespace,
            )
            for index, ids in enumerate(texts)
        ]
        generation = Generation(
            engine,
            requests,
            place=stack.pop_all(),
            bridge=services.bridge,
            metrics=services.metrics,
            model_name=services.host.model_name,
            exchange=exchange,
        )
    _start(generation, services, inputs.param, asked.streaming)
    return Begun(generation, engine, stitch, texts, name)


def _shortened(services: Services, stitch: Stitch | None, soft_tokens: int | None) -> Stitch | None:
    """As much of the prompt as was asked for. Raises ApiError 400."""
    if soft_tokens is None:
        return stitch
    try:
        if stitch is None:
            raise ValueError("no prompt stands in front of this text, so there is none to use a part of")
        return services.finder.shorten(stitch, soft_tokens)
    except ValueError as error:
        raise ApiError(400, "invalid_value", f"soft_tokens: {error}", param="/soft_tokens") from error


def _start(generation: Generation, services: Services, param: str, streaming: bool) -> None:
    """Into the queue, or out of the door with nothing left in it."""
    try:
        generation.start(streaming=streaming)
    except Exception as error:
        generation.close()
        if isinstance(error, Overloaded):
            services.metrics.rejected.labels(error.reason).inc()
        if isinstance(error, InvalidRequest):
            services.metrics.rejected.labels("invalid").inc()
            pointer = param if error.field == "prompt" else f"/{error.field}"
            raise ApiError(400, error.code, str(error), param=pointer) from error
        raise


async def tokenise(tokenizer: Tokenizer, inputs: Inputs, bos: Bos) -> list[Ids]:
    """The ids of each text. Raises ApiError 400."""
    try:
        if inputs.characters > LONG_TEXT:
            return await run_in_threadpool(inputs.encode, tokenizer, bos)
        return inputs.encode(tokenizer, bos)
    except ValueError as error:
        raise ApiError(400, "invalid_value", str(error), param=inputs.param) from error


async def begin_openai(request: Request, model: str, policy: Policy | None, inputs: Inputs, asked: Asked) -> Begun:
    """`begin`, where `model` names the base or the prompt to stitch."""

    async def find(services: Services, engine: Engine) -> Stitch | None:
        query = query_of_model(services, model, policy)
        try:
            return None if query is None else await services.finder.find(query, engine)
        except NotFound as error:
            raise unknown_model(services, model, error) from error

    return await begin(request, find, inputs, asked)


def query_of_model(services: Services, model: str, policy: Policy | None) -> Query | None:
    """What `model` asks for; None for the base alone. Raises ApiError."""
    if model == services.host.model_name:
        if policy is not None:
            message = f"{model} is the base model, there is nothing to resolve: name a task in model"
            raise ApiError(400, "invalid_value", message, param="/resolution")
        return None
    try:
        return Query(parse_reference(model), policy or services.settings.resolution)
    except BadReference as error:
        raise unknown_model(services, model, error) from error


def unknown_model(services: Services, model: str, error: BadReference | NotFound) -> ApiError:
    """The 404 that OpenAI's clients know; a known task that does not fit says so with its own code."""
    code = error.code if isinstance(error, Unresolved) else "model_not_found"
    message = f"{model[:128]!a} is not served: {error.message}; the base is {services.host.model_name}"
    return ApiError(404, code, message, param="/model")
