"""`POST /v1/chat/completions`: messages through the model's own chat template, in OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from engine.api import Tokenizer
from engine.request import RequestDone, TokenEvent, TokenLogprob
from prompts_store.prompt import Bos
from server.answers import Counts, gather
from server.bodies import JsonBody
from server.generation import Tagged
from server.inference import Asked, Begun, Ids, Inputs, begin_openai
from server.logprobs import chat_logprobs
from server.openapi import INFERENCE_ERRORS, Success, operation
from server.render import Json
from server.schemas.chat import ChatAnswer, ChatBody
from server.schemas.common import Message
from server.sse import Encoder, EventStream
from server.state import services_of

router = APIRouter(tags=["inference"])

ANSWER = Success(
    "the reply, or a stream of it",
    ChatAnswer,
    headers={"X-Prompt-Digest": "of the prompt that was stitched, if one was"},
    media="text/event-stream",
)


@router.post("/v1/chat/completions", **operation("infer", {200: ANSWER}, *INFERENCE_ERRORS))
async def chat(request: Request, body: Annotated[ChatBody, Depends(JsonBody(ChatBody))]) -> Response:
    """Reply to the messages."""
    begun = await begin_openai(request, body.model, body.resolution, chat_inputs(body.messages), _asked(request, body))
    shape = Shape(body, begun)
    if body.stream:
        return EventStream(begun.generation, Chunks(shape), begun.headers)
    try:
        events = await begun.generation.whole(request.receive)
    finally:
        begun.generation.close()
    return Json(shape.answer(events), headers=begun.headers)


def chat_inputs(messages: Sequence[Message]) -> Inputs:
    """Messages as one text. The template has its own BOS or none: a prompt's layout adds nothing to it."""
    turns = [message.rendered() for message in messages]

    def encode(tokenizer: Tokenizer, bos: Bos) -> list[Ids]:
        return [tokenizer.encode_chat(turns)]

    return Inputs(encode, sum(len(turn["content"]) for turn in turns), "/messages")


def _asked(request: Request, body: ChatBody) -> Asked:
    sampling = body.params(default_max_tokens(request), logprobs=body.alternatives)
    return Asked(sampling, body.choices, body.timeout, bool(body.stream), body.soft_tokens)


def default_max_tokens(request: Request) -> int | None:
    """Where the request names none: the server's setting, else the rest of the context."""
    return services_of(request).settings.max_tokens_default


class Shape:
    """What is the same for an answer and for every chunk of a stream."""

    def __init__(self, body: ChatBody, begun: Begun) -> None:
        self.body = body
        self.begun = begun
        self._head = {
            "id": f"chatcmpl-{begun.id}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": begun.fingerprint,
        }

    def answer(self, events: Sequence[Tagged]) -> dict[str, Any]:
        """The whole answer."""
        gathered = gather(events, 1, self.body.choices)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self.logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(gathered.choices)
        ]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": gathered.counts.openai(),
            "prompt": self.begun.prompt,
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk with these choices."""
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """A choice's logprobs, if asked for."""
        return chat_logprobs(self.begun.engine.tokenizer, tokens) if self.body.logprobs else None


class Chunks(Encoder):
    """The stream. The role and the prompt come first, in a chunk of their own."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._usage = shape.body.include_usage
        self._first = True

    def encode(self, events: Sequence[Tagged]) -> list[dict[str, Any]]:
        chunks = [self._opening()] if self._first else []
        for _, event in events:
            if isinstance(event, TokenEvent):
                if event.text or event.logprobs or event.finish_reason:
                    chunks.append(self._chunk([self._piece(event)]))
            elif isinstance(event, RequestDone) and self._usage:
                counts = Counts()
                counts.add(event)
                chunks.append({**self._shape.chunk([]), "usage": counts.openai()})
        return chunks

    def _opening(self) -> dict[str, Any]:
        self._first = False
        delta = {"role": "assistant", "content": ""}
        choices = [_choice(index, delta) for index in range(self._shape.body.choices)]
        return {**self._chunk(choices), "prompt": self._shape.begun.prompt}

    def _piece(self, event: TokenEvent) -> dict[str, Any]:
        delta = {"content": event.text} if event.text else {}
        choice = _choice(event.index, delta, event.finish_reason)
        choice["logprobs"] = self._shape.logprobs(event.logprobs)
        if event.finish_reason is not None:
            choice["stop_reason"] = event.stop_reason
        return choice

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._shape.chunk(choices)
        if self._usage:
            chunk["usage"] = None
        return chunk


def _choice(index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
