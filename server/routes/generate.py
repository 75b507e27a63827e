"""`POST /v1/generate`: a text and the task it belongs to; the answer says which prompt was stitched and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from engine.api import Engine, Tokenizer
from engine.request import RequestDone, TokenEvent, TokenLogprob
from prompts_store.errors import BadReference
from prompts_store.prompt import Bos
from prompts_store.reference import Reference, check_task, parse_reference
from prompts_store.resolution import Query
from server.answers import Choice, Counts, gather
from server.bodies import JsonBody
from server.errors import ApiError
from server.finder import Stitch
from server.generation import Tagged
from server.inference import Asked, Begun, Ids, Inputs, begin
from server.logprobs import Offsets, completion_logprobs
from server.openapi import INFERENCE_ERRORS, Success, operation
from server.render import Json
from server.routes.chat import chat_inputs, default_max_tokens
from server.schemas.generate import GenerateAnswer, GenerateBody
from server.sse import Encoder, EventStream
from server.state import Services

router = APIRouter(tags=["inference"])

ANSWER = Success(
    "the continuation, or a stream of it",
    GenerateAnswer,
    headers={"X-Prompt-Digest": "of the prompt that was stitched, if one was"},
    media="text/event-stream",
)


@router.post("/v1/generate", **operation("infer", {200: ANSWER}, *INFERENCE_ERRORS))
async def generate(request: Request, body: Annotated[GenerateBody, Depends(JsonBody(GenerateBody))]) -> Response:
    """Continue the text behind the task's prompt."""
    reference = _reference(body)

    async def find(services: Services, engine: Engine) -> Stitch | None:
        if reference is None:
            return None
        policy = body.resolution or services.settings.resolution
        return await services.finder.find(Query(reference, policy), engine)

    sampling = body.params(default_max_tokens(request), logprobs=body.logprobs)
    asked = Asked(sampling, body.choices, body.timeout, bool(body.stream), body.soft_tokens)
    begun = await begin(request, find, _inputs(body), asked)
    shape = Shape(body, begun)
    if body.stream:
        return EventStream(begun.generation, Lines(shape), begun.headers)
    try:
        events = await begun.generation.whole(request.receive)
    finally:
        begun.generation.close()
    return Json(shape.answer(events), headers=begun.headers)


def _inputs(body: GenerateBody) -> Inputs:
    if body.messages is not None:
        return chat_inputs(body.messages)
    text = body.text or ""

    def encode(tokenizer: Tokenizer, bos: Bos) -> list[Ids]:
        return [tokenizer.encode(text, bos)]

    return Inputs(encode, len(text), "/text")


def _reference(body: GenerateBody) -> Reference | None:
    """What `task` and `prompt` name together. Raises ApiError."""
    try:
        task = None if body.task is None else check_task(body.task)
    except BadReference as error:
        raise ApiError(400, error.code, error.message, param="/task") from error
    if body.prompt is None:
        return None if task is None else Reference(task)
    reference = parse_reference(body.prompt)
    if task is not None and task != reference.task:
        message = f"prompt is one of task {reference.task}, but task says {task}: give one of them, or let them agree"
        raise ApiError(400, "invalid_value", message, param="/prompt")
    return reference


class Shape:
    """What is the same for an answer and for every line of a stream."""

    def __init__(self, body: GenerateBody, begun: Begun) -> None:
        self.body = body
        self.begun = begun
        self.id = f"gen-{begun.id}"

    def answer(self, events: Sequence[Tagged]) -> dict[str, Any]:
        """The whole answer: one choice stands at the top, several in a list."""
        gathered = gather(events, 1, self.body.choices)
        told = [self._choice(choice) for choice in gathered.choices]
        choices = told[0] if len(told) == 1 else {"choices": [{"index": k, **one} for k, one in enumerate(told)]}
        return {"id": self.id, **choices, **self.closing(gathered.counts)}

    def closing(self, counts: Counts) -> dict[str, Any]:
        """What the end of an answer tells."""
        return {"prompt": self.begun.prompt, "usage": counts.own()}

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Offsets) -> dict[str, Any]:
        """`{"logprobs": …}` if asked for, else nothing."""
        if self.body.logprobs is None:
            return {}
        return {"logprobs": completion_logprobs(self.begun.engine.tokenizer, tokens, offsets)}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        told = {"text": choice.text, "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        return {**told, **self.logprobs(choice.logprobs, self.offsets())}

    def offsets(self) -> Offsets:
        """Of a choice that begins."""
        return Offsets(self.begun.engine.tokenizer)


class Lines(Encoder):
    """The stream. The line that ends a choice waits for what follows: the last one tells prompt and usage, too."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._offsets = [shape.offsets() for _ in range(shape.body.choices)]
        self._waiting: dict[str, Any] | None = None

    def encode(self, events: Sequence[Tagged]) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        for _, event in events:
            if isinstance(event, TokenEvent) and (event.text or event.logprobs or event.finish_reason):
                if self._waiting is not None:
                    lines.append(self._waiting)
                line = self._line(event)
                self._waiting = line if event.finish_reason else None
                if not event.finish_reason:
                    lines.append(line)
            elif isinstance(event, RequestDone):
                counts = Counts()
                counts.add(event)
                lines.append({**(self._waiting or {}), **self._shape.closing(counts)})
        return lines

    def _line(self, event: TokenEvent) -> dict[str, Any]:
        line = {
            "id": self._shape.id,
            "index": event.index,
            "text": event.text,
            "finish_reason": event.finish_reason,
            **self._shape.logprobs(event.logprobs, self._offsets[event.index]),
        }
        if event.finish_reason is not None:
            line["stop_reason"] = event.stop_reason
        return line
