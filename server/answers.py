"""Events of a generation gathered into choices and counts: what every answer is made of. Knows no API's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.request import RequestDone, TextScored, TokenEvent, TokenLogprob
from server.generation import Tagged


@dataclass(slots=True)
class Choice:
    """One continuation, as far as it has come."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Counts:
    """Tokens of all texts of a request."""

    text: int = 0
    soft: int = 0
    completion: int = 0
    cached: int = 0

    def add(self, done: RequestDone) -> None:
        self.text += done.text_tokens
        self.soft += done.soft_tokens
        self.completion += done.completion_tokens
        self.cached += done.cached_tokens

    def openai(self) -> dict[str, Any]:
        """OpenAI's `usage`; the soft tokens stand apart and are in no sum."""
        return {
            "prompt_tokens": self.text,
            "completion_tokens": self.completion,
            "total_tokens": self.text + self.completion,
            "soft_tokens": self.soft,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def own(self) -> dict[str, int]:
        """`usage` of /v1/generate."""
        return {"text_tokens": self.text, "soft_tokens": self.soft, "completion_tokens": self.completion}


@dataclass(slots=True)
class Gathered:
    """All events of a generation. Choice k of text i has the index i * n + k."""

    choices: list[Choice]
    scores: dict[int, tuple[TokenLogprob, ...]]  # text index -> logprobs of its tokens
    counts: Counts


def gather(events: Sequence[Tagged], texts: int, n: int) -> Gathered:
    """Events of a generation that has ended well."""
    pieces: list[list[str]] = [[] for _ in range(texts * n)]
    gathered = Gathered([Choice() for _ in pieces], {}, Counts())
    for text, event in events:
        if isinstance(event, TokenEvent):
            index = text * n + event.index
            choice = gathered.choices[index]
            pieces[index].append(event.text)
            choice.logprobs.extend(event.logprobs)
            if event.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = event.finish_reason, event.stop_reason
        elif isinstance(event, TextScored):
            gathered.scores[text] = gathered.scores.get(text, ()) + event.logprobs
        elif isinstance(event, RequestDone):
            gathered.counts.add(event)
    for choice, parts in zip(gathered.choices, pieces, strict=True):
        choice.text = "".join(parts)
    return gathered
