"""`POST /v1/generate`: this server's own way to ask."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from prompts_store.errors import BadReference
from prompts_store.reference import parse_reference
from server.schemas.common import (
    MAX_REFERENCE,
    Answer,
    Messages,
    Policy,
    SoftTokens,
    StitchedPrompt,
    Text,
    example,
    refuse,
)
from server.schemas.sampling import SamplingFields

Named = Annotated[str, Field(min_length=1, max_length=MAX_REFERENCE)]


def _is_reference(value: object) -> object:
    """Told before all else that may be wrong with the body: most who get this wrong put their text here."""
    try:
        parse_reference(str(value))
    except BadReference as error:
        message = f"{error.message}. `prompt` names the soft prompt; the text to continue goes in `text`"
        raise refuse("/prompt", message, error.code) from error
    return value


class GenerateBody(SamplingFields):
    """`text` or `messages`; `task` or `prompt` names what to stitch in front."""

    model_config = example(text="Translate to French: good morning", task="general", max_tokens=32)

    text: Text | None = None
    messages: Messages | None = None
    task: Named | None = None
    prompt: (
        Annotated[Named, BeforeValidator(_is_reference), Field(description="task, task@3, task:alias, task@sha256:…")]
        | None
    ) = None
    resolution: Policy | None = None
    soft_tokens: SoftTokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise refuse("/text", "give the input as text or as messages, one of them")
        if self.resolution is not None and self.task is None and self.prompt is None:
            raise refuse("/resolution", "resolution says how to find a task's prompt: name the task, too")
        if self.soft_tokens is not None and self.task is None and self.prompt is None:
            raise refuse("/soft_tokens", "soft_tokens says how much of a task's prompt to use: name the task, too")
        return self


class GenerateUsage(Answer):
    text_tokens: int
    soft_tokens: int
    completion_tokens: int


class GenerateChoice(Answer):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    logprobs: dict[str, Any] | None = None


class GenerateAnswer(Answer):
    """`text` and `finish_reason` for one choice, `choices` for several."""

    id: str
    text: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None
    choices: list[GenerateChoice] | None = None
    prompt: StitchedPrompt | None
    usage: GenerateUsage
