"""One step on the device: a batch of chunks in, logits out.

Owns the model and its KV pages. Knows no queues, no text and no sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import stitch
from engine.attention import KVPages, NativeAttention, Span, attend
from engine.graphs import DecodeGraphs
from engine.kept import KeptPrefixes
from engine.pages import Block
from engine.scheduler import Batch, Chunk
from llama.model import Attend, Llama
from llama.step import Step
from prompts_store.prompt import SoftPrompt


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Logits in fp32: `next` (R, V), a row for each chunk that samples; `scored`, for each chunk whose text is scored,
    the rows (T, V) of its tokens."""

    next: Tensor
    scored: list[tuple[Chunk, Tensor]]


class Runner:
    """Carries out batches. With `kept`, prefixes are looked for on disk before they are computed; with `graphs`, steps
    that do nothing but decode are replayed."""

    def __init__(
        self, model: Llama, kv: KVPages, kept: KeptPrefixes | None = None, graphs: DecodeGraphs | None = None
    ) -> None:
        self.model = model
        self.kv = kv
        self.restored = 0  # prefixes that were not computed
        self.replays = graphs is not None  # `follow` can launch a step
        self._kept = kept
        self._graphs = graphs
        self._step = Step.of(model)

    def run(self, batch: Batch) -> StepOutput:
        """Compute `batch.chunks`, which must stand with their single tokens first."""
        if batch.fresh:
            self.kv.blank(batch.fresh)
        for block, prompt in batch.fills:
            self._fill(block, prompt)
        if batch.copies:
            self.kv.copy(batch.copies)
        chunks = batch.chunks
        spans = _spans(chunks)
        tokens = [token for c in chunks for token in c.sequence.tokens[c.start : c.end]]
        if self._graphs is not None and _only_decodes(chunks, len(tokens)):
            return StepOutput(self._graphs.logits(tokens, spans), [])
        ids = self._tensor(tokens)
        positions = self._tensor([at for span in spans for at in range(span.start, span.end)])
        return self._logits(self.hidden(ids, positions, attend(self.kv, spans)), chunks, spans)

    def follow(self, batch: Batch, tokens: Tensor, rows: list[int]) -> Tensor:
        """Logits (R, V) in fp32 of a batch of single tokens which the step before is still choosing: that of chunk i is
        `tokens[rows[i]]`. Nothing is waited for."""
        assert self._graphs is not None
        if batch.fresh:
            self.kv.blank(batch.fresh)
        return self._graphs.logits(rows, _spans(batch.chunks), tokens)

    def _fill(self, block: Block, prompt: SoftPrompt) -> None:
        kept, pages = self._kept, block.pages
        found = kept.find(block.key, len(pages) * self.kv.page_bytes) if kept else None
        if found is not None:
            self.kv.load(pages, found)
            self.restored += 1
            return
        stitch.fill(self.model, self.kv, prompt, pages)
        if kept is not None:
            kept.keep(block.key, self.kv.dump(pages))

    def hidden(self, ids: Tensor, positions: Tensor, attention: Attend) -> Tensor:
        """ids, positions (T,) → (T, H) after the last norm."""
        model, x = self.model, self.model.embed(ids)
        hidden: Tensor
        if self._step is not None and isinstance(attention, NativeAttention):
            hidden = model.norm(self._step(x, model.rope.tables(positions), attention.pages))
        else:
            hidden = model(x, positions, attention)
        return hidden

    def _logits(self, hidden: Tensor, chunks: list[Chunk], spans: list[Span]) -> StepOutput:
        """Only for the rows that are looked at."""
        last, scored, at = [], [], 0
        for chunk, span in zip(chunks, spans, strict=True):
            if chunk.sequence.scores_text and chunk.start < chunk.sequence.num_text:
                scored.append((chunk, self.model.logits(hidden[at : at + span.length]).float()))
            at += span.length
            if chunk.samples:
                last.append(at - 1)
        return StepOutput(self.model.logits(hidden[self._tensor(last)]).float(), scored)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.model.device)


def _only_decodes(chunks: list[Chunk], tokens: int) -> bool:
    """Whether every chunk is one token from which another follows, and whose score nobody asks for."""
    return tokens == len(chunks) and all(c.samples and c.start >= c.sequence.num_text for c in chunks)


def _spans(chunks: list[Chunk]) -> list[Span]:
    return [Span(c.sequence.table, c.sequence.ticket.soft_tokens + c.start, c.end - c.start) for c in chunks]
