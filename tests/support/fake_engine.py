"""An engine without a model: a thread that turns, bytes as tokens, text that is a function of what was asked.

Honest where the server can tell: queue, batch, cancel, deadline, stop strings, logprobs, close. Tests hold it with
`held`, slow it with `step_seconds`, and let it fail with `fail_next`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.api import ContextTooLong, EngineClosed, EngineInfo, EngineStats, InvalidRequest, Overloaded, Sink
from engine.request import (
    Event,
    GenerationRequest,
    RequestDone,
    RequestFailed,
    TextScored,
    Timings,
    TokenEvent,
    TokenLogprob,
)
from engine.text import TextStream
from prompts_store.prompt import SoftPrompt

BASE = "sha256:" + "ba" * 32
WEIGHTS = "sha256:" + "1234567890ab" + "00" * 26
TEMPLATE = "sha256:" + "7e" * 32
LEVEL = "w4g128"
HIDDEN = 8
EOS, BOS, ROLE = 256, 257, 258
VOCAB = 260


class ByteTokenizer:
    """Ids 0 to 255 are bytes."""

    bos_token_id: int | None = BOS
    eos_token_ids = frozenset({EOS})
    special_token_ids = frozenset({EOS, BOS, ROLE})
    chat_template_digest = TEMPLATE

    def encode(self, text: str, bos: str = "tokenizer") -> list[int]:
        return [BOS, *text.encode()] if bos == "after_prompt" else list(text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise ValueError("a conversation does not begin with the assistant")
        ids: list[int] = []
        for message in messages:
            ids += [ROLE, *f"{message['role']}: {message['content']}\n".encode()]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@dataclass
class _Choice:
    index: int
    text: TextStream
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass
class _Ticket:
    request: GenerationRequest
    sink: Sink
    arrived: float
    choices: list[_Choice]
    admitted: float = 0.0
    prefilled: float = 0.0


def expected_token(request: GenerationRequest, index: int, position: int) -> int:
    """What the fake model says: letters and spaces, by prompt, text, seed and place."""
    digest = request.prompt.digest if request.prompt else "none"
    seed = request.sampling.seed if request.sampling.temperature else 0
    key = f"{digest}|{request.token_ids}|{seed}|{index}|{position}"
    return b"abcdefghijklmnopqrstuvwxyz     "[hashlib.sha256(key.encode()).digest()[0] % 31]


class FakeEngine:
    """See `engine.api.Engine`. Sizes as in EngineInfo; `max_waiting` requests may queue, `max_running` run."""

    def __init__(
        self, *, max_running: int = 64, max_waiting: int = 512, max_model_len: int = 2048, step_seconds: float = 0.0
    ) -> None:
        self.tokenizer = ByteTokenizer()
        self.info = EngineInfo(
            model="tiny", base=BASE, level=LEVEL, weights=WEIGHTS, dtype="float32", kv_dtype="float32", device="cpu",
            vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=2, num_kv_heads=2, head_dim=4,
            max_model_len=max_model_len, max_virtual_tokens=64, page_size=16, num_pages=1024,
            chat_template=TEMPLATE, weight_bytes=1000, kv_bytes=1000, compute="float32",
        )  # fmt: skip
        self.held = threading.Event()  # set: nothing moves, but commands
        self.wedged = threading.Event()  # set: the loop itself stands still
        self.step_seconds = step_seconds
        self.fail_next = False
        self.submitted: list[GenerationRequest] = []
        self._max_running, self._max_waiting = max_running, max_waiting
        self._waiting: list[_Ticket] = []
        self._running: list[_Ticket] = []
        self._lock = threading.Condition()
        self._closed = False
        self._ended = False
        self._beat = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._aborted: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        sampling = request.sampling
        if not request.token_ids:
            raise InvalidRequest("prompt", "the text is empty; it needs at least one token")
        for name, ids in (
            ("prompt", request.token_ids),
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", [token for token, _ in sampling.logit_bias]),
        ):
            if max(ids, default=0) >= VOCAB:
                raise InvalidRequest(name, f"token ids lie between 0 and {VOCAB - 1}")
        soft = request.prompt.num_virtual_tokens if request.prompt else 0
        if soft + len(request.token_ids) + (sampling.max_tokens or 1) > self.info.max_model_len:
            raise ContextTooLong(f"the context has {self.info.max_model_len} tokens")
        choices = [_Choice(k, TextStream(self.tokenizer.token_bytes, sampling.stop)) for k in range(request.n)]
        with self._lock:
            if self._closed:
                raise EngineClosed("closed")
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded("queue_full", 2.0)
            self.submitted.append(request)
            self._waiting.append(_Ticket(request, sink, time.monotonic(), choices))
            self._lock.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            for phase, tickets in (("queued", self._waiting), ("decode", self._running)):
                for ticket in list(tickets):
                    if ticket.request.request_id == request_id:
                        tickets.remove(ticket)
                        self._aborted[phase] += 1

    def check_prompt(self, prompt: SoftPrompt) -> None:
        if prompt.num_virtual_tokens > self.info.max_virtual_tokens:
            raise InvalidRequest("prompt", "too many soft tokens", "prompt_too_long")

    def unrotate(self, keys: Tensor) -> Tensor:
        return keys

    def stats(self) -> EngineStats:
        counts = self._counts
        return EngineStats(
            waiting=len(self._waiting), running=len(self._running), waiting_tokens=0,
            pages_used=len(self._running), pages_cached=0, steps=counts["steps"],
            last_step_age=time.monotonic() - self._beat, prompt_tokens=counts["prompt_tokens"],
            generation_tokens=counts["generation_tokens"], preemptions=0, prefix_queries=0, prefix_hits=0,
            soft_prefix_hits=0, soft_prefix_misses=0, soft_prefix_restored=0,
            aborted=dict(self._aborted), failed_steps=counts["failed"],
            loaded_prompts=tuple({t.request.prompt.digest for t in self._running if t.request.prompt}),
        )  # fmt: skip

    def close(self, drain: float = 0.0) -> None:
        end = time.monotonic() + drain
        with self._lock:
            self._closed = True
            while (self._waiting or self._running) and time.monotonic() < end:
                self._lock.wait(0.01)
            self._ended = True
            self._lock.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    # In the thread.

    def _loop(self) -> None:
        while not self._ended:
            while self.wedged.is_set() and not self._ended:
                time.sleep(0.005)
            self._beat = time.monotonic()
            with self._lock:
                if not (self._waiting or self._running) or self.held.is_set():
                    self._lock.wait(0.01)
                self._expire()
                if self.held.is_set():
                    continue
                while self._waiting and len(self._running) < self._max_running:
                    ticket = self._waiting.pop(0)
                    ticket.admitted = time.monotonic()
                    self._running.append(ticket)
                batch = list(self._running)
            if batch:
                time.sleep(self.step_seconds)
                self._counts["steps"] += 1
            for ticket in batch:
                self._step(ticket)
        for ticket in [*self._waiting, *self._running]:
            ticket.sink([RequestFailed("shutdown", "the server is shutting down")])

    def _expire(self) -> None:
        for tickets in (self._waiting, self._running):
            for ticket in list(tickets):
                timeout = ticket.request.timeout
                if timeout is not None and time.monotonic() - ticket.arrived > timeout:
                    tickets.remove(ticket)
                    ticket.sink([RequestFailed("deadline", f"not done within {timeout:g} s")])

    def _step(self, ticket: _Ticket) -> None:
        events: list[Event] = []
        request = ticket.request
        if self.fail_next:
            self.fail_next = False
            self._counts["failed"] += 1
            events.append(RequestFailed("engine_error", "the step failed"))
        else:
            if not ticket.prefilled:
                ticket.prefilled = time.monotonic()
                events += self._scores(request)
            events += [
                event for choice in ticket.choices if not choice.ended for event in self._advance(request, choice)
            ]
            if all(choice.ended for choice in ticket.choices):
                events.append(self._done(ticket))
        with self._lock:
            if ticket not in self._running:
                return  # cancelled meanwhile
            if isinstance(events[-1], RequestDone | RequestFailed):
                self._running.remove(ticket)
        ticket.sink(events)

    def _scores(self, request: GenerationRequest) -> list[Event]:
        if request.sampling.prompt_logprobs is None:
            return []
        first, *rest = request.token_ids
        told = [self._logprob(token, request.sampling.prompt_logprobs) for token in rest]
        return [TextScored((TokenLogprob(first, None), *told))]

    def _advance(self, request: GenerationRequest, choice: _Choice) -> list[Event]:
        sampling, place = request.sampling, len(choice.tokens)
        room = self.info.max_model_len - len(request.token_ids)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        limit = min(limit, 256)  # a fake context end, so that open requests do not take for ever
        if limit == 0:
            choice.ended = True
            return []
        token = expected_token(request, choice.index, place)
        choice.tokens.append(token)
        text = choice.text.push(token)
        logprobs = () if sampling.logprobs is None else (self._logprob(token, sampling.logprobs),)
        reason, why = None, None
        if token in sampling.stop_token_ids:
            reason, why, text = "stop", token, ""
        elif choice.text.stopped is not None:
            reason, why = "stop", choice.text.stopped
        elif place + 1 >= limit:
            reason, text = "length", text + choice.text.finish()
        choice.ended = reason is not None
        return [TokenEvent(choice.index, text, (token,), logprobs, reason, why)]

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        best = tuple(((token + k) % 256, -0.5 * (k + 1)) for k in range(top))
        return TokenLogprob(token, -0.5, best)

    def _done(self, ticket: _Ticket) -> RequestDone:
        request, now = ticket.request, time.monotonic()
        completion = sum(len(choice.tokens) for choice in ticket.choices)
        self._counts["prompt_tokens"] += len(request.token_ids)
        self._counts["generation_tokens"] += completion
        soft = request.prompt.num_virtual_tokens if request.prompt else 0
        times = Timings(ticket.admitted - ticket.arrived, ticket.prefilled - ticket.admitted, now - ticket.prefilled)
        return RequestDone(len(request.token_ids), soft, completion, 0, times)
