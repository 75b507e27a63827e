"""How one choice goes on by one token: what the sampler is told, and what a sampled token means for it.

Knows sequences, tokens and text; knows no pages and no batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from engine.request import FinishReason, TextScored, TokenEvent, TokenLogprob
from engine.sampling import Row, Sampled, told
from engine.scheduler import Chunk
from engine.sequence import Sequence


def row_of(sequence: Sequence) -> Row:
    """The sampler's view of a sequence."""
    ticket, params = sequence.ticket, sequence.ticket.request.sampling
    banned = ticket.stop_ids if sequence.generated < params.min_tokens else frozenset()
    return Row(params, ticket.seed, sequence.index, sequence.tokens, sequence.num_text, banned)


def advance(sequence: Sequence, sampled: Sampled) -> TokenEvent:
    """Append a token and say what it brought. A finished choice's event carries its reason."""
    ticket, params = sequence.ticket, sequence.ticket.request.sampling
    if ticket.max_tokens == 0:
        return TokenEvent(sequence.index, "", (), finish_reason="length")
    token = sampled.token_id
    sequence.tokens.append(token)
    text, reason, stop = "", None, None
    if token in ticket.stop_ids:
        reason, stop = _stop(token if token in params.stop_token_ids else None)
    else:
        text = sequence.text.push(token, match=sequence.generated >= params.min_tokens)
        if sequence.text.stopped is not None:
            reason, stop = _stop(sequence.text.stopped)
        elif sequence.generated >= ticket.max_tokens:
            reason = "length"
    if reason is not None:
        text += sequence.text.finish()
    logprobs = () if sampled.logprob is None else (sampled.logprob,)
    return TokenEvent(sequence.index, text, (token,), logprobs, reason, stop)


def _stop(why: str | int | None) -> tuple[FinishReason, str | int | None]:
    return "stop", why


def score_text(chunk: Chunk, logits: Tensor) -> Iterable[TextScored]:
    """logits (T, V) of the chunk's tokens → their successors' scores; the event once the text is complete."""
    sequence, ticket = chunk.sequence, chunk.sequence.ticket
    top = ticket.request.sampling.prompt_logprobs or 0
    del ticket.scores[chunk.start :]  # computed again after a preemption
    logprobs = logits.log_softmax(-1)
    following = sequence.tokens[chunk.start + 1 : min(chunk.end + 1, sequence.num_text)]
    ticket.scores.extend(told(logprobs[row], token, top) for row, token in enumerate(following))
    if chunk.end >= sequence.num_text:
        ticket.scored = True
        yield TextScored((TokenLogprob(sequence.tokens[0], None), *ticket.scores))
