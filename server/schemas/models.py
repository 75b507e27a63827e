"""`/v1/models`, `/v1/tokenize` and `/version`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from server.schemas.common import Answer, Body, Messages, ModelName, StitchedPrompt, Text, example, refuse
from server.schemas.sampling import On


class ModelAnswer(Answer):
    """The base, a task or an alias. `parent` is what a prompt is stitched to."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    prompt: StitchedPrompt | None = None


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelAnswer]


class TokenizeBody(Body):
    """`prompt` or `messages`, as vLLM has it. `model`: the layout of its prompt decides about a BOS."""

    model_config = example(prompt="Good morning")

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: Annotated[bool | None, Field(description="only with prompt; true if not given")] = None
    add_generation_prompt: On | None = None

    @model_validator(mode="after")
    def _check_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refuse("/prompt", "give the input as prompt or as messages, one of them")
        if self.messages is not None and self.add_special_tokens:
            raise refuse("/add_special_tokens", "messages have the special tokens of their template, and no others")
        return self


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: list[int]


class VersionInfo(Answer):
    """What runs. Digests are `sha256:<hex>`."""

    version: str
    model: str
    base: str
    level: str
    weights: str
    dtype: str


class Health(Answer):
    status: str
    detail: dict[str, Any] | None = None
