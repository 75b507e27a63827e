"""Driving an engine from a test: submit, wait, and what came back in one value."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.api import Engine
from engine.request import (
    Event,
    GenerationRequest,
    RequestDone,
    RequestFailed,
    SamplingParams,
    TextScored,
    TokenEvent,
    TokenLogprob,
)
from prompts_store.prompt import SoftPrompt

_ids = itertools.count()


@dataclass
class Answer:
    """Everything that one request was told."""

    request: GenerationRequest
    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    stop_reason: dict[int, Any] = field(default_factory=dict)
    scored: tuple[TokenLogprob, ...] | None = None
    last: RequestDone | RequestFailed | None = None

    def sink(self, events: Iterable[Event]) -> None:
        for event in events:
            self.events.put(event)

    def wait(self, timeout: float = 120.0) -> Answer:
        while self.last is None:
            self.take(self.events.get(timeout=timeout))
        return self

    def take(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.tokens.setdefault(event.index, []).extend(event.token_ids)
            self.text[event.index] = self.text.get(event.index, "") + event.text
            self.logprobs.setdefault(event.index, []).extend(event.logprobs)
            if event.finish_reason:
                self.finish[event.index] = event.finish_reason
                self.stop_reason[event.index] = event.stop_reason
        elif isinstance(event, TextScored):
            self.scored = event.logprobs
        else:
            self.last = event


def ask(
    engine: Engine,
    token_ids: Iterable[int],
    prompt: SoftPrompt | None = None,
    *,
    n: int = 1,
    timeout: float | None = None,
    namespace: str = "default",
    **sampling: Any,
) -> Answer:
    """Submit one request; greedy, and not ended by EOS, unless told otherwise."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **sampling})
    request = GenerationRequest(f"t{next(_ids)}", tuple(token_ids), prompt, params, n, timeout, namespace)
    answer = Answer(request)
    engine.submit(request, answer.sink)
    return answer


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for what happens in another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
