"""Steps under way: launched, and read when their tokens are wanted.

Where decoding steps are replayed, on CUDA, the next one is launched before the tokens of the one before have come back:
the device finds them where it left them. So stopping, telling and scheduling go on beside the device's work, not
between its steps. What a choice computes that turns out to have ended is looked at by nobody, and its pages are
written anew only by later steps. Knows sequences and tensors; knows nobody who waits for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.choice import row_of
from engine.runner import Runner
from engine.sampling import Row, Sampled, choose, sample
from engine.scheduler import Batch, Chunk, Scheduler
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched. `read` waits for the tokens of its `sequences`: None where one's logits are not finite.
    `tokens` (R,) are the same on the device, if another step may follow before they are read."""

    batch: Batch
    sequences: list[Sequence]
    scored: list[tuple[Chunk, Tensor]]
    read: Callable[[], list[Sampled | None]]
    tokens: Tensor | None = None


class Flights:
    """Launches steps, in inference mode."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner, self._scheduler = runner, scheduler

    def launch(self, batch: Batch) -> Flight:
        output = self._runner.run(batch)
        sequences = [chunk.sequence for chunk in batch.chunks if chunk.samples]
        rows = [row_of(sequence) for sequence in sequences]
        if self._runner.replays and rows and not output.scored and all(row.plain for row in rows):
            return _flying(batch, sequences, output.next, rows)
        finite = output.next.sum(-1).isfinite().tolist()
        sampled = sample(output.next, rows)
        found = [token if ok else None for token, ok in zip(sampled, finite, strict=True)]
        return Flight(batch, sequences, output.scored, lambda: found)

    def follow(self, flight: Flight) -> Flight | None:
        """The step behind one that has not been read, if it can be launched now."""
        batch = None if flight.tokens is None else self._scheduler.follow(flight.sequences)
        if batch is None or flight.tokens is None:
            return None
        sequences = [chunk.sequence for chunk in batch.chunks]
        at = {id(sequence): row for row, sequence in enumerate(flight.sequences)}
        logits = self._runner.follow(batch, flight.tokens, [at[id(sequence)] for sequence in sequences])
        return _flying(batch, sequences, logits, [replace(row_of(sequence), ahead=1) for sequence in sequences])


def _flying(batch: Batch, sequences: list[Sequence], logits: Tensor, rows: list[Row]) -> Flight:
    tokens = choose(logits, rows)
    told = tokens.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event() if tokens.is_cuda else None  # type: ignore[no-untyped-call]
    if arrived is not None:
        arrived.record()

    def read() -> list[Sampled | None]:
        if arrived is not None:
            arrived.synchronize()
        return [None if token < 0 else Sampled(token, None) for token in told.tolist()]

    return Flight(batch, sequences, [], read, tokens)
