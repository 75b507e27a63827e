"""What is noted of one request on its way through, for the log line, the metrics and the error envelope.

Written by middleware and routes, read once at the end. Holds no text of prompts and no key.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from engine.request import Timings

KEY = "exchange"


@dataclass(slots=True)
class Exchange:
    """One request and its answer. Times in seconds, lengths in tokens."""

    request_id: str
    key_id: str | None = None
    status: int = 0
    code: str | None = None  # of the error, if one was answered
    task: str | None = None
    prompt_digest: str | None = None
    text_tokens: int | None = None
    soft_tokens: int | None = None
    completion_tokens: int | None = None
    timings: Timings | None = None
    finish_reason: str | None = None


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that the outermost middleware put into the scope."""
    exchange = scope["state"][KEY]
    assert isinstance(exchange, Exchange)
    return exchange
