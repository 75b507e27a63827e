"""`POST /v1/chat/completions` as OpenAI has it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from server.schemas.common import (
    Answer,
    Messages,
    ModelName,
    Policy,
    SoftTokens,
    StitchedPrompt,
    Usage,
    example,
    refuse,
)
from server.schemas.sampling import ChatNeutralFields, OpenAIFields, SamplingFields, VllmNeutralFields


class ChatBody(SamplingFields, OpenAIFields, ChatNeutralFields, VllmNeutralFields):
    """`model` is the base's name, a task, `task@3`, `task:alias` or `task@sha256:…`."""

    model_config = example(model="general", messages=[{"role": "user", "content": "Good morning"}], stream=True)

    model: ModelName
    messages: Messages
    resolution: Policy | None = None
    soft_tokens: SoftTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def alternatives(self) -> int | None:
        """Alternatives told beside each token; None without logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise refuse("/top_logprobs", "top_logprobs goes with logprobs: true")
        return self


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobAnswer(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprobAnswer]
    refusal: None


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt: StitchedPrompt | None
