"""`POST /v1/completions`: texts in, continuations out, in OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from engine.api import Tokenizer
from engine.request import RequestDone, TextScored, TokenEvent, TokenLogprob
from prompts_store.prompt import Bos
from server.answers import Counts, gather
from server.bodies import JsonBody
from server.generation import Tagged
from server.inference import Asked, Begun, Ids, Inputs, begin_openai
from server.logprobs import Offsets, completion_logprobs
from server.openapi import INFERENCE_ERRORS, Success, operation
from server.render import Json
from server.schemas.completions import CompletionAnswer, CompletionBody
from server.sse import Encoder, EventStream

router = APIRouter(tags=["inference"])
DEFAULT_MAX_TOKENS = 16  # OpenAI's

ANSWER = Success(
    "the continuations, or a stream of them",
    CompletionAnswer,
    headers={"X-Prompt-Digest": "of the prompt that was stitched, if one was"},
    media="text/event-stream",
)


@router.post("/v1/completions", **operation("infer", {200: ANSWER}, *INFERENCE_ERRORS))
async def completions(request: Request, body: Annotated[CompletionBody, Depends(JsonBody(CompletionBody))]) -> Response:
    """Continue each text. Choice k of text i has the index i * n + k."""
    begun = await begin_openai(request, body.model, body.resolution, _inputs(body), _asked(body))
    shape = Shape(body, begun)
    if body.stream:
        return EventStream(begun.generation, Chunks(shape), begun.headers)
    try:
        events = await begun.generation.whole(request.receive)
    finally:
        begun.generation.close()
    return Json(shape.answer(events), headers=begun.headers)


def _inputs(body: CompletionBody) -> Inputs:
    inputs = body.inputs

    def encode(tokenizer: Tokenizer, bos: Bos) -> list[Ids]:
        return [tokenizer.encode(item, bos) if isinstance(item, str) else item for item in inputs]

    characters = sum(len(item) for item in inputs if isinstance(item, str))
    return Inputs(encode, characters, "/prompt")


def _asked(body: CompletionBody) -> Asked:
    prompt_logprobs = body.logprobs if body.echo else None
    sampling = body.params(DEFAULT_MAX_TOKENS, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
    return Asked(sampling, body.choices, body.timeout, bool(body.stream), body.soft_tokens)


class Shape:
    """What is the same for an answer and for every chunk of a stream."""

    def __init__(self, body: CompletionBody, begun: Begun) -> None:
        self.body = body
        self.begun = begun
        self.tokenizer = begun.engine.tokenizer
        self._head = {
            "id": f"cmpl-{begun.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": begun.fingerprint,
        }

    def answer(self, events: Sequence[Tagged]) -> dict[str, Any]:
        """The whole answer."""
        n = self.body.choices
        gathered = gather(events, len(self.begun.texts), n)
        choices = []
        for index, choice in enumerate(gathered.choices):
            echo = self.echo(index // n)
            tokens = [*gathered.scores.get(index // n, ()), *choice.logprobs]
            finish = choice.finish_reason or "length"
            offsets = Offsets(self.tokenizer)
            choices.append(self.choice(index, echo + choice.text, tokens, offsets, finish, choice.stop_reason))
        return {**self.object(choices), "usage": gathered.counts.openai(), "prompt": self.begun.prompt}

    def object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An answer or a chunk with these choices."""
        return {**self._head, "choices": choices}

    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenLogprob],
        offsets: Offsets,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        """One choice, whole or a piece."""
        told = self.body.logprobs is not None
        return {
            "index": index,
            "text": text,
            "logprobs": completion_logprobs(self.tokenizer, tokens, offsets) if told else None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }

    def echo(self, text: int) -> str:
        """What stands before the continuation of a text."""
        if not self.body.echo:
            return ""
        given = self.body.inputs[text]
        return given if isinstance(given, str) else self.tokenizer.decode(self.begun.texts[text])


class Chunks(Encoder):
    """The stream. The prompt comes with the first chunk, an echo with the first of its choice."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._n = shape.body.choices
        self._counts = Counts()
        self._scores: dict[int, tuple[TokenLogprob, ...]] = {}
        self._begun: dict[int, Offsets] = {}  # choices of which something was sent
        self._open = len(shape.begun.texts)
        self._first = True

    def encode(self, events: Sequence[Tagged]) -> list[dict[str, Any]]:
        chunks: list[dict[str, Any]] = []
        for text, event in events:
            if isinstance(event, TokenEvent):
                chunks += self._piece(text, event)
            elif isinstance(event, TextScored):
                self._scores[text] = event.logprobs
            elif isinstance(event, RequestDone):
                chunks += self._done(text, event)
        return chunks

    def _piece(self, text: int, event: TokenEvent) -> list[dict[str, Any]]:
        index, tokens, piece = text * self._n + event.index, event.logprobs, event.text
        if index not in self._begun:
            self._begun[index] = Offsets(self._shape.tokenizer)
            piece = self._shape.echo(text) + piece
            tokens = (*self._scores.get(text, ()), *tokens)
        if not (piece or tokens or event.finish_reason):
            return []
        ended = event.finish_reason, event.stop_reason
        return [self._chunk(self._shape.choice(index, piece, tokens, self._begun[index], *ended))]

    def _done(self, text: int, event: RequestDone) -> list[dict[str, Any]]:
        self._counts.add(event)
        self._open -= 1
        silent = TokenEvent(0, "", (), finish_reason="length")  # max_tokens 0: the echo is all there is
        chunks: list[dict[str, Any]] = []
        for index in range(self._n):
            if text * self._n + index not in self._begun:
                chunks += self._piece(text, replace(silent, index=index))
        if self._shape.body.include_usage and not self._open:
            chunks.append({**self._shape.object([]), "usage": self._counts.openai()})
        return chunks

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._shape.object([choice])
        if self._shape.body.include_usage:
            chunk["usage"] = None
        if self._first:
            self._first = False
            chunk["prompt"] = self._shape.begun.prompt
        return chunk
