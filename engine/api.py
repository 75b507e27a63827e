"""The seam between a server and an engine: what any engine must offer.

`engine.engine.LocalEngine` is the one in this process; the server's tests use a small fake one; another (many machines)
can stand behind the same routes. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.request import Event, GenerationRequest
from prompts_store.prefix_tuning import Turn
from prompts_store.prompt import Bos, SoftPrompt

Sink = Callable[[Sequence[Event]], None]


class EngineError(Exception):
    """Base of what `submit` raises; nothing of the request is left behind."""


class InvalidRequest(EngineError):
    """The request can never be served as it is. `field` names what is wrong, `code` the machine-readable reason."""

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class ContextTooLong(InvalidRequest):
    """Soft tokens + text tokens + max_tokens exceed the context, or a lone request exceeds the page budget."""

    def __init__(self, message: str) -> None:
        super().__init__("prompt", message, "context_length_exceeded")


class Overloaded(EngineError):
    """The queue is full. `retry_after` in seconds, `reason` is `queue_full` or `tokens_full`."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(f"the server's queue is full ({reason})")
        self.reason = reason
        self.retry_after = retry_after


class EngineClosed(EngineError):
    """The engine takes no more requests."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is being served. Digests are `sha256:<hex>`, sizes in tokens unless said, bytes are real ones."""

    model: str  # the name of the checkpoint, for people
    base: str
    level: str
    weights: str
    dtype: str
    kv_dtype: str
    device: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    max_virtual_tokens: int
    page_size: int
    num_pages: int
    chat_template: str  # digest, or "none"
    weight_bytes: int  # resident
    kv_bytes: int  # of the page budget
    compute: str  # what linears multiply: the dtype, or int8


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Counters only grow."""

    waiting: int
    running: int
    waiting_tokens: int
    pages_used: int  # referenced by a request
    pages_cached: int  # free for the taking, but hold a reusable prefix
    steps: int
    last_step_age: float  # seconds since the loop last turned; small while idle, too
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    prefix_queries: int  # text tokens looked up in the prefix cache
    prefix_hits: int
    soft_prefix_hits: int  # requests whose prompt's pages were there already
    soft_prefix_misses: int  # whose prompt's pages were computed or restored
    soft_prefix_restored: int  # of the misses, those whose pages came from disk
    aborted: Mapping[str, int]  # phase (queued, prefill, decode) -> requests
    failed_steps: int
    loaded_prompts: tuple[str, ...]  # digests whose prefix pages are resident


class Tokenizer(Protocol):
    """Text to ids and back, as the checkpoint says."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""

    @property
    def chat_template_digest(self) -> str: ...

    def encode(self, text: str, bos: Bos = "tokenizer") -> list[int]:
        """Ids of a plain text, the same that transformers' tokenizer gives. `bos` is the prompt's layout."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of the messages through the chat template, generation prompt added. Raises ValueError."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""


class Engine(Protocol):
    """One model behind a queue. Thread-safe."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def tokenizer(self) -> Tokenizer: ...

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        """Queue a request. `sink` is called from the engine's thread with each step's events, in order; the last one
        is RequestDone or RequestFailed. It must not block.

        Raises InvalidRequest, Overloaded, EngineClosed.
        """

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its pages before the next step. Unknown ids are ignored."""

    def check_prompt(self, prompt: SoftPrompt) -> None:
        """Raise InvalidRequest if this model could not serve the prompt: base, shapes, N, finite in its dtype."""

    @property
    def unrotate(self) -> Turn:
        """Takes keys of positions 0 to N-1 as this model's cache holds them to what they were before RoPE."""

    def stats(self) -> EngineStats: ...

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, wait up to `drain` seconds for those under way, fail the rest with `shutdown`."""
