"""The loss of a text through an engine, asked for as any client would ask: no tensors, no second path.

What is measured is therefore what is served. Knows the seam alone, `engine.api`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from statistics import fmean

from engine.api import Engine
from engine.request import Event, GenerationRequest, RequestDone, RequestFailed, SamplingParams, TextScored
from prompts_store.prompt import SoftPrompt

GRACE_SECONDS = 5.0  # the engine keeps the deadline itself; so much later it hangs


class ScoringFailed(RuntimeError):
    """The engine took the request and gave it up. `event` says why."""

    def __init__(self, event: RequestFailed) -> None:
        super().__init__(event.message)
        self.event = event


def mean_loss(engine: Engine, ids: Sequence[int], prompt: SoftPrompt | None = None, timeout: float = 120.0) -> float:
    """Mean of -log p(ids[i] | prompt, ids[:i]) over i = 1..T-1, in nats per token; T >= 2.

    Blocks until the engine has come to it, `timeout` seconds at most. Raises EngineError, ScoringFailed.
    """
    if len(ids) < 2:
        raise ValueError("a loss needs two tokens, one to begin with and one to predict")
    events: list[Event] = []
    ended = threading.Event()

    def sink(told: Sequence[Event]) -> None:
        events.extend(told)
        if isinstance(told[-1], RequestDone | RequestFailed):
            ended.set()

    score = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)
    request = GenerationRequest(f"score-{uuid.uuid4().hex}", tuple(ids), prompt, score, timeout=timeout)
    engine.submit(request, sink)
    if not ended.wait(timeout + GRACE_SECONDS):
        engine.cancel(request.request_id)
        raise ScoringFailed(RequestFailed("deadline", f"the engine did not answer within {timeout:g} s"))
    if isinstance(events[-1], RequestFailed):
        raise ScoringFailed(events[-1])
    scored = next(event for event in events if isinstance(event, TextScored))
    return -fmean(token.logprob for token in scored.logprobs if token.logprob is not None)
