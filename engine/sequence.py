"""One choice of one request on its way: its tokens, its pages, its state.

Facts that follow from others are properties. Knows no tensors; moves nothing by itself.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.api import Sink
from engine.pages import Block, Key
from engine.request import GenerationRequest, TokenLogprob
from engine.text import TextStream


class Status(enum.Enum):
    NEW = "new"  # not in a queue yet
    WAITING = "waiting"  # holds no pages
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Ticket:
    """A request and what its choices share."""

    request: GenerationRequest
    sink: Sink
    root: Key  # of the text's page keys
    seed: int
    max_tokens: int
    arrived: float  # seconds, monotonic
    deadline: float  # the same clock
    stop_ids: frozenset[int]  # end a choice: EOS and the request's own
    sequences: list[Sequence] = field(default_factory=list)
    admitted: float = field(default=0.0, init=False)  # first admission, set by the scheduler
    prefilled: float = field(default=0.0, init=False)  # first token, set by the engine
    cached_tokens: int = field(default=0, init=False)  # set by the scheduler
    scores: list[TokenLogprob] = field(default_factory=list, init=False)  # of the text so far, its first token left out
    scored: bool = field(default=False, init=False)  # the scores have been told

    @property
    def soft_tokens(self) -> int:
        prompt = self.request.prompt
        return prompt.num_virtual_tokens if prompt else 0

    @property
    def done(self) -> bool:
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """Choice `index` of a ticket. Token i stands at position N + i."""

    ticket: Ticket
    index: int
    text: TextStream
    tokens: list[int]  # text, then generated
    status: Status = field(default=Status.NEW, init=False)
    computed: int = field(default=0, init=False)  # tokens whose KV is in the pages
    prefix: Block | None = field(default=None, init=False)  # of the soft prompt
    table: list[int] = field(default_factory=list, init=False)  # pages by position
    owners: list[Block | None] = field(default_factory=list, init=False)  # for the pages behind the shared prefix ones
    keys: list[Key] = field(default_factory=list, init=False)  # of the text pages that are full, in order
    published: int = field(default=0, init=False)  # text pages that the pool knows, or was offered

    @property
    def num_text(self) -> int:
        return len(self.ticket.request.token_ids)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.num_text

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def positions(self) -> int:
        """Soft and text positions up to and including the last token."""
        return self.ticket.soft_tokens + len(self.tokens)

    @property
    def scores_text(self) -> bool:
        ticket = self.ticket
        return self.index == 0 and not ticket.scored and ticket.request.sampling.prompt_logprobs is not None
