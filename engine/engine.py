"""The engine in this process: one model, one thread, one loop.

`submit` and `cancel` may be called from any thread; everything else happens in the loop: take commands, drop what is
late, schedule, run, sample, tell. Knows no HTTP, no names of prompts, and of disks no more than a folder's name.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable

import torch
from torch import Tensor

from engine import limits, stitch
from engine.api import EngineClosed, EngineInfo, EngineStats, InvalidRequest, Overloaded, Sink, Tokenizer
from engine.attention import KVPages
from engine.choice import advance, score_text
from engine.device import select
from engine.flight import Flight, Flights
from engine.graphs import decode_graphs
from engine.kept import KeptPrefixes
from engine.options import EngineOptions
from engine.pages import PagePool
from engine.request import Event, FailureCode, GenerationRequest, RequestDone, RequestFailed, Timings
from engine.runner import Runner
from engine.scheduler import Batch, Scheduler, prefix_key, text_root
from engine.sequence import Sequence, Status, Ticket
from engine.served import ServedModel, info_of
from engine.text import TextStream
from llama.model import Llama
from llama.rope import Rope, turned, unrotate
from prompts_store.prompt import SoftPrompt

log = logging.getLogger("promptstitch.engine")


class LocalEngine:
    """See `engine.api.Engine`. The thread starts with the object and ends with `close`."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, served: ServedModel, options: EngineOptions) -> None:
        select(model.device)
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
        num_pages = options.num_pages(model)
        self._pool = PagePool(num_pages, options.page_size)
        self._info = info_of(model, tokenizer, served, options, num_pages)
        kv = KVPages(model.config, num_pages, options.page_size, model.dtype, model.device)
        self._kept = None
        if options.kept_folder is not None:
            identity = stitch.fingerprint(model, kv, self._info.max_model_len)
            self._kept = KeptPrefixes(options.kept_folder, options.kept_bytes, identity)
        graphs = decode_graphs(model, kv, options.max_running, self._info.max_model_len)
        self._runner = Runner(model, kv, self._kept, graphs)
        self._scheduler = Scheduler(self._pool, options.max_running, options.max_batch_tokens)
        self._flights = Flights(self._runner, self._scheduler)
        self._flight: Flight | None = None  # launched, and not read yet
        self._max_norm = options.max_row_norm * stitch.largest_norm(model)
        self._special = frozenset(tokenizer.special_token_ids)
        self._tickets: dict[str, Ticket] = {}  # written under the lock, by submit and by the loop
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._stopped = False
        self._beat = time.monotonic()
        self._counts: Counter[str] = Counter()
        self._aborted: Counter[str] = Counter()
        self._num_threads = torch.get_num_threads()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="engine", daemon=True)
        self._thread.start()
        started.wait()

    # In any thread.

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def submit(self, request: GenerationRequest, sink: Sink) -> None:
        ticket = self._ticket(request, sink, limits.check(request, self._info, self._options))
        if request.prompt is not None and self._pool.find(prefix_key(ticket.root)) is None:
            self.check_prompt(request.prompt)  # a prompt whose pages are there has been checked
        with self._wake:
            if self._closing:
                raise EngineClosed("the engine is shutting down")
            if request.request_id in self._tickets:
                raise InvalidRequest("request_id", f"request {request.request_id} is under way already")
            full = limits.overload(self._queued(), request, self._options)
            if full is not None:
                raise Overloaded(full, retry_after=1.0)
            self._tickets[request.request_id] = ticket
            self._inbox.append(lambda: self._scheduler.add(ticket))
            self._wake.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._wake:
            self._inbox.append(lambda: self._abort(request_id))
            self._wake.notify_all()

    def check_prompt(self, prompt: SoftPrompt) -> None:
        info = self._info
        problem = stitch.mismatch(prompt, self._model, info.base, info.max_virtual_tokens, self._max_norm)
        if problem is not None:
            raise InvalidRequest("prompt", problem[1], problem[0])

    def unrotate(self, keys: Tensor) -> Tensor:
        config = self._model.config
        return turned(unrotate, keys, Rope(config.rope, config.head_dim, keys.device, torch.float32))

    def stats(self) -> EngineStats:
        scheduler, pool = self._scheduler, self._pool
        with self._wake:
            queued = self._queued()
        return EngineStats(
            waiting=len(queued) + scheduler.preempted,
            running=len(scheduler.running),
            waiting_tokens=sum(len(ticket.request.token_ids) for ticket in queued),
            pages_used=pool.capacity - pool.available,
            pages_cached=pool.cached,
            steps=self._counts["steps"],
            last_step_age=time.monotonic() - self._beat,
            prompt_tokens=self._counts["prompt_tokens"],
            generation_tokens=self._counts["generation_tokens"],
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            soft_prefix_hits=scheduler.soft_hits,
            soft_prefix_misses=scheduler.soft_misses,
            soft_prefix_restored=self._runner.restored,
            aborted=dict(self._aborted),
            failed_steps=self._counts["failed_steps"],
            loaded_prompts=pool.labels(),
        )

    def close(self, drain: float = 0.0) -> None:
        end = time.monotonic() + drain
        with self._wake:
            self._closing = True
            while self._tickets and (left := end - time.monotonic()) > 0:
                self._wake.wait(left)
            self._stopped = True
            self._wake.notify_all()
        self._thread.join()
        if self._kept is not None:
            self._kept.close()

    def _ticket(self, request: GenerationRequest, sink: Sink, max_tokens: int) -> Ticket:
        params, now, info = request.sampling, time.monotonic(), self._info
        ticket = Ticket(
            request=request,
            sink=sink,
            root=text_root(request.namespace, info.weights, info.dtype, info.kv_dtype, request.prompt),
            seed=secrets.randbits(63) if params.seed is None else params.seed % 2**63,
            max_tokens=max_tokens,
            arrived=now,
            deadline=float("inf") if request.timeout is None else now + request.timeout,
            stop_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self._tokenizer.eos_token_ids),
        )
        for index in range(request.n):
            text = TextStream(self._visible_bytes, params.stop)
            ticket.sequences.append(Sequence(ticket, index, text, list(request.token_ids)))
        return ticket

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special else self._tokenizer.token_bytes(token_id)

    def _queued(self) -> list[Ticket]:
        return [ticket for ticket in self._tickets.values() if not ticket.admitted]

    # In the loop's thread.

    def _run(self, started: threading.Event) -> None:
        """As many cores for this thread as for the one that made the engine, whatever others are told afterwards."""
        torch.get_num_threads()  # sets up what would otherwise be set up, from the global number, by the first product
        torch.set_num_threads(self._num_threads)
        select(self._model.device)
        started.set()
        self._loop()

    def _loop(self) -> None:
        """However it ends, nobody goes on waiting: what is here fails, and what comes is refused."""
        try:
            while not self._stopped:
                self._turn()
        finally:
            with self._wake:
                self._closing = True
            for ticket in list(self._tickets.values()):
                self._fail(ticket, "shutdown", "the server is shutting down")

    def _turn(self) -> None:
        self._beat = time.monotonic()
        for command in self._commands():
            command()
        self._expire(time.monotonic())
        self._step()

    def _commands(self) -> list[Callable[[], None]]:
        """What came in; waits a moment if there is nothing else to do."""
        with self._wake:
            if not self._inbox and not self._tickets and not self._stopped:
                self._wake.wait(0.5)
            commands = list(self._inbox)
            self._inbox.clear()
        return commands

    def _expire(self, now: float) -> None:
        for ticket in list(self._tickets.values()):
            if ticket.deadline < now:
                self._fail(ticket, "deadline", f"the request was not done within {ticket.request.timeout:g} s")

    def _step(self) -> None:
        """The tokens of one step. What fails takes the requests of its own batch with it, and nothing else."""
        flight, self._flight = self._flight, None
        batch = flight.batch if flight else self._scheduler.schedule(time.monotonic())
        if not batch.chunks:
            return
        try:
            events = self._compute(flight or batch)
        except Exception:
            log.exception("a step failed; the requests in it end with an error")
            self._counts["failed_steps"] += 1
            self._flight = None  # whoever is in it is in the batch too
            self._scheduler.abandon(batch)
            for chunk in batch.chunks:
                self._fail(chunk.sequence.ticket, "engine_error", "the step that computed this request failed")
            if not self._device_works():
                self._stopped = True
            return
        self._counts["steps"] += 1
        for ticket, told in events.items():
            self._tell(ticket, told)

    @torch.inference_mode()
    def _compute(self, step: Batch | Flight) -> dict[Ticket, list[Event]]:
        flight = self._flights.launch(step) if isinstance(step, Batch) else step
        self._flight = self._flights.follow(flight)
        sampled = flight.read()
        self._scheduler.commit(flight.batch)
        events: dict[Ticket, list[Event]] = defaultdict(list)
        for chunk, logits in flight.scored:
            events[chunk.sequence.ticket].extend(score_text(chunk, logits))
        now, generated = time.monotonic(), 0
        for sequence, token in zip(flight.sequences, sampled, strict=True):
            ticket = sequence.ticket
            if token is None:
                self._fail(ticket, "engine_error", "the model's output for this input is not finite")
            elif sequence.status is Status.RUNNING:
                if not ticket.prefilled:
                    ticket.prefilled = now
                    self._counts["prompt_tokens"] += len(ticket.request.token_ids)
                event = advance(sequence, token)
                generated += bool(event.token_ids)
                events[ticket].append(event)
                if event.finish_reason is not None:
                    self._scheduler.remove(sequence)
        self._counts["generation_tokens"] += generated
        return events

    def _tell(self, ticket: Ticket, events: list[Event]) -> None:
        if ticket.request.request_id not in self._tickets:
            return  # it failed in this very step
        if ticket.done:
            events.append(self._finish(ticket))
        if not events:
            return  # a piece of a text whose scores are told once it is complete
        try:
            ticket.sink(events)
        except Exception:
            log.exception("request %s cannot be told its events; it is dropped", ticket.request.request_id)
            self._abort(ticket.request.request_id)

    def _finish(self, ticket: Ticket) -> RequestDone:
        text_tokens = len(ticket.request.token_ids)
        completion = sum(sequence.generated for sequence in ticket.sequences)
        self._forget(ticket)
        return RequestDone(
            text_tokens=text_tokens,
            soft_tokens=ticket.soft_tokens,
            completion_tokens=completion,
            cached_tokens=min(ticket.cached_tokens, text_tokens),
            timings=Timings(
                queued=ticket.admitted - ticket.arrived,
                prefill=ticket.prefilled - ticket.admitted,
                decode=time.monotonic() - ticket.prefilled,
            ),
        )

    def _abort(self, request_id: str) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._aborted["decode" if ticket.prefilled else "prefill" if ticket.admitted else "queued"] += 1
            self._forget(ticket)

    def _fail(self, ticket: Ticket, code: FailureCode, message: str) -> None:
        if ticket.request.request_id not in self._tickets:
            return
        self._forget(ticket)
        try:
            ticket.sink([RequestFailed(code, message)])
        except Exception:
            log.exception("request %s cannot be told that it failed", ticket.request.request_id)

    def _forget(self, ticket: Ticket) -> None:
        for sequence in ticket.sequences:
            self._scheduler.remove(sequence)
        with self._wake:
            del self._tickets[ticket.request.request_id]
            self._wake.notify_all()  # `close` may be waiting for the last one

    def _device_works(self) -> bool:
        """A poisoned CUDA context fails everything from now on: then the loop ends, and with it the heartbeat."""
        try:
            return bool(torch.ones(1, device=self._model.device).item())
        except Exception:
            log.exception("the device does not answer any more; the engine stops")
            return False
