"""`POST /v1/completions` as OpenAI has it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from server.schemas.common import (
    MAX_SEQUENCES,
    MAX_TEXTS,
    Answer,
    ModelName,
    Policy,
    SoftTokens,
    StitchedPrompt,
    Text,
    TokenIds,
    Usage,
    example,
    is_text,
    list_of,
    one_of,
    refuse,
)
from server.schemas.sampling import CompletionNeutralFields, OpenAIFields, SamplingFields, VllmNeutralFields

Several = Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)
Input = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Several, Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Several, Tag("<id lists>")],
    one_of(
        "a string, a list of strings, a list of token ids or a list of such lists, and not empty",
        ("<text>", is_text),
        ("<texts>", list_of(str)),
        ("<ids>", list_of((int, float))),
        ("<id lists>", list_of(list)),
    ),
]


class CompletionBody(SamplingFields, OpenAIFields, CompletionNeutralFields, VllmNeutralFields):
    """`model` is the base's name, a task, `task@3`, `task:alias` or `task@sha256:…`."""

    model_config = example(model="general", prompt=["Good morning", "Good night"], max_tokens=16, temperature=0)

    model: ModelName
    prompt: Input
    resolution: Policy | None = None
    soft_tokens: SoftTokens | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The texts, one or many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices:
            raise refuse("/best_of", "best_of is supported only equal to n", "unsupported_parameter")
        if len(self.inputs) * self.choices > MAX_SEQUENCES:
            raise refuse("/n", f"texts times n may be {MAX_SEQUENCES} at most")
        return self


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    prompt: StitchedPrompt | None
