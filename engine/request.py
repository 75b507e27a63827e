"""What crosses the engine's border: requests in, events out.

Small frozen values of plain Python (and one SoftPrompt), so that a request can be sent to another process. Knows no
names of prompts, no HTTP, no tokenizer: text comes as token ids and leaves as text and token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prompts_store.prompt import SoftPrompt

FinishReason = Literal["stop", "length"]
FailureCode = Literal["deadline", "shutdown", "engine_error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Neutral values switch a rule off.

    Order: penalties and bias on the raw logits, then temperature, then top_k, top_p, min_p. Penalties count text and
    generated tokens only; soft positions have no ids.
    """

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # None = a fresh one for each request
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None  # None = to the end of the context; 0 = score the text only
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives told beside each generated token; None = no logprobs at all
    prompt_logprobs: int | None = None  # the same for the text tokens (echo)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One text, `n` continuations. `timeout` counts in seconds from submission."""

    request_id: str
    token_ids: tuple[int, ...]  # T text tokens, BOS included where the layout has one
    prompt: SoftPrompt | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    timeout: float | None = None
    namespace: str = "default"  # part of every cache key: tenants never share pages


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with the logarithm of its raw probability; None where nothing stands before it."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Progress of choice `index`. `text` may lag behind `token_ids` while a character or a stop string is incomplete.

    A stop string, an EOS or stop token never appears in `text`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it; None for EOS and length


@dataclass(frozen=True, slots=True)
class TextScored:
    """Logprobs of the text tokens, sent once before any TokenEvent if `prompt_logprobs` was asked for."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the engine's monotonic clock."""

    queued: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class RequestDone:
    """The last event of a request that went well: every choice has its finish_reason."""

    text_tokens: int
    soft_tokens: int
    completion_tokens: int
    cached_tokens: int  # text tokens whose KV came from the prefix cache
    timings: Timings


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The last event of a request that did not. A cancelled request gets no further event."""

    code: FailureCode
    message: str


Event = TokenEvent | TextScored | RequestDone | RequestFailed
