"""What a request may ask for, and when the queue is full.

Checked in the caller's thread, before anything is kept. Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.api import ContextTooLong, EngineInfo, InvalidRequest
from engine.options import EngineOptions
from engine.request import GenerationRequest
from engine.sequence import Ticket


def check(request: GenerationRequest, info: EngineInfo, options: EngineOptions) -> int:
    """The number of tokens it may generate. Raises InvalidRequest, ContextTooLong."""
    sampling = request.sampling
    if not request.token_ids:
        raise InvalidRequest("prompt", "the text is empty; it needs at least one token")
    for field, ids in (
        ("prompt", request.token_ids),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
    ):
        if min(ids, default=0) < 0 or max(ids, default=0) >= info.vocab_size:
            raise InvalidRequest(field, f"token ids lie between 0 and {info.vocab_size - 1}")
    for field, value, most in (
        ("n", request.n, options.max_choices),
        ("logprobs", sampling.logprobs or 0, options.max_logprobs),
        ("prompt_logprobs", sampling.prompt_logprobs or 0, options.max_logprobs),
    ):
        if value > most:
            raise InvalidRequest(field, f"{field} is {value}; at most {most} are served")
    return _room(request, info)


def _room(request: GenerationRequest, info: EngineInfo) -> int:
    soft = request.prompt.num_virtual_tokens if request.prompt else 0
    room = info.max_model_len - soft - len(request.token_ids)
    asked = request.sampling.max_tokens
    if room < (1 if asked is None else asked):
        raise ContextTooLong(
            f"{soft} soft tokens + {len(request.token_ids)} text tokens + {1 if asked is None else asked} to generate "
            f"exceed the context of {info.max_model_len}; shorten the text or lower max_tokens"
        )
    return room if asked is None else asked


def overload(waiting: Sequence[Ticket], request: GenerationRequest, options: EngineOptions) -> str | None:
    """Why the queue cannot take one more request, or None."""
    if len(waiting) >= options.max_waiting:
        return "queue_full"
    tokens = sum(len(ticket.request.token_ids) for ticket in waiting) + len(request.token_ids)
    if waiting and tokens > options.max_waiting_tokens:
        return "tokens_full"
    return None
