"""Sampling as OpenAI and vLLM name it, and the fields that real clients send without effect here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from engine.request import SamplingParams
from server.schemas.common import Body, Short, Stop, TokenId, refuse


def _boolean(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("must be a boolean")
    return value


Off = Annotated[Literal[False], BeforeValidator(_boolean)]  # by itself, Literal takes 0 for False
On = Annotated[Literal[True], BeforeValidator(_boolean)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenCount = Annotated[int, Field(ge=0, le=10_000_000)]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class SamplingFields(Body):
    """null always means the default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10_000_000, description="0 or -1: off")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: Annotated[TokenCount, Field(description="wins over max_tokens")] | None = None
    min_tokens: TokenCount | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stream: bool | None = None
    timeout: (
        Annotated[float, Field(gt=0, le=86_400, description="seconds; the server may have a lower limit")] | None
    ) = None

    @property
    def choices(self) -> int:
        """Continuations of each text."""
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        """max_tokens as asked for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def params(
        self, default_max_tokens: int | None, logprobs: int | None = None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The same for the engine. A seed below zero counts from the top, as 64 bits do."""
        limit = self.token_limit
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            seed=None if self.seed is None else self.seed % 2**63,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=default_max_tokens if limit is None else limit,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        limit, least = self.token_limit, self.min_tokens
        if limit is not None and least is not None and least > limit:
            raise refuse("/min_tokens", f"min_tokens ({least}) is more than max_tokens ({limit})")
        if limit == 0 and not getattr(self, "echo", False):
            field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise refuse(f"/{field}", f"{field} 0 has an answer only with echo")
        return self


class OpenAIFields(Body):
    """Fields of OpenAI's API that have no effect here, with the values for which that is no lie."""

    user: Short | None = None
    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None
    prompt_cache_retention: Short | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Short], Field(max_length=16)] | None = None
    store: Off | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not getattr(self, "stream", False):
            raise refuse("/stream_options", "stream_options goes with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a last chunk tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextFormat(Body):
    type: Literal["text"]


class ChatNeutralFields(Body):
    """Fields of features that this server does not have, with the values that ask for nothing."""

    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True, min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    add_generation_prompt: On | None = None
    continue_final_message: Off | None = None
    chat_template: None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class CompletionNeutralFields(Body):
    """The same for completions."""

    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=64, description="equal to n")] | None = None


class VllmNeutralFields(Body):
    """Fields that vLLM's clients send, with vLLM's defaults."""

    use_beam_search: Off | None = None
    skip_special_tokens: On | None = None
    spaces_between_special_tokens: On | None = None
    include_stop_str_in_output: Off | None = None


NEUTRAL = frozenset(
    name
    for fields in (OpenAIFields, ChatNeutralFields, CompletionNeutralFields, VllmNeutralFields)
    for name in fields.model_fields
) - {"user", "metadata", "stream_options", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
NEUTRAL |= {"stream_options.include_obfuscation"}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
