"""Which sequences run in the next step, and on which pages.

First come, first served: running sequences decode, texts are computed in chunks beside them, waiting ones are admitted
while pages last. When pages run out the newest gives its pages back and is computed again later. Knows no tensors and
no clock but the one it is given; the engine carries out what a Batch says and then calls `commit`.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.pages import Block, Key, PagePool, next_key, root_key
from engine.sequence import Sequence, Status, Ticket
from prompts_store.prompt import SoftPrompt


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether a token follows from this chunk."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work, in this order: blank the fresh pages, fill prefixes, copy pages, compute the chunks."""

    chunks: list[Chunk] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    fills: list[tuple[Block, SoftPrompt]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to)


class Scheduler:
    """Queues and page tables of every sequence. `max_batch_tokens` bounds a step, `max_running` the batch."""

    def __init__(self, pool: PagePool, max_running: int, max_batch_tokens: int) -> None:
        self.pool = pool
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.soft_hits = 0
        self.soft_misses = 0

    @property
    def preempted(self) -> int:
        """Waiting sequences that ran before; may be asked from another thread."""
        return sum(1 for sequence in list(self.waiting) if sequence.ticket.admitted)

    def add(self, ticket: Ticket) -> None:
        for sequence in ticket.sequences:
            if sequence.status is Status.NEW:  # it may have been given up on its way here
                sequence.status = Status.WAITING
                self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not; its pages are free again."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._vacate(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def schedule(self, now: float) -> Batch:
        batch = Batch()
        budget = self.max_batch_tokens
        for sequence in list(self.running):
            if sequence.status is Status.RUNNING and budget and self._grow(sequence, batch):
                budget -= self._chunk(sequence, budget, batch)
        while budget and len(self.running) < self.max_running:
            candidate = self._next_candidate()
            if candidate is None or not self._admit(candidate, batch):
                break
            candidate.ticket.admitted = candidate.ticket.admitted or now
            budget -= self._chunk(candidate, budget, batch)
        batch.chunks.sort(key=lambda chunk: chunk.end - chunk.start > 1)  # single tokens first, as attention wants them
        return batch

    def follow(self, sequences: list[Sequence]) -> Batch | None:
        """The step after one that is under way and brings each of `sequences` a token which is not known yet, for those
        that go on whatever it is; None where that is not all there is to do, or pages lack."""
        if self.waiting or len(sequences) != len(self.running):
            return None
        going = [s for s in sequences if s.status is Status.RUNNING and s.generated + 1 < s.ticket.max_tokens]
        missing = [self.pool.pages_for(s.positions + 1) - len(s.table) for s in going]
        if not going or sum(missing) > self.pool.available:
            return None
        batch = Batch()
        for sequence, count in zip(going, missing, strict=True):
            if count > 0:
                self._extend(sequence, count, batch)
            batch.chunks.append(Chunk(sequence, len(sequence.tokens), len(sequence.tokens) + 1))
        return batch

    def commit(self, batch: Batch) -> None:
        """The batch has been computed: what it filled may be shared."""
        for chunk in batch.chunks:
            if chunk.sequence.status is Status.RUNNING:
                chunk.sequence.computed = chunk.end
                self._publish(chunk.sequence)

    def abandon(self, batch: Batch) -> None:
        """The batch failed: nobody may find the prefixes that it was to fill."""
        for block, _ in batch.fills:
            self.pool.forget(block)

    def _chunk(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        length = min(sequence.pending, budget)
        batch.chunks.append(Chunk(sequence, sequence.computed, sequence.computed + length))
        return length

    def _next_candidate(self) -> Sequence | None:
        """The oldest waiting one; later choices of a request wait until the first one's text can be shared."""
        for sequence in self.waiting:
            first = sequence.ticket.sequences[0]
            if first is sequence or first.status is Status.FINISHED or first.computed >= first.num_text:
                return sequence
        return None

    def _grow(self, sequence: Sequence, batch: Batch) -> bool:
        """Give a running sequence the pages for its pending tokens, at the cost of the newest if need be."""
        missing = self.pool.pages_for(sequence.positions) - len(sequence.table)
        if missing <= 0:
            return True
        while missing > self.pool.available:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        self._extend(sequence, missing, batch)
        return True

    def _extend(self, sequence: Sequence, count: int, batch: Batch) -> None:
        pages = self.pool.take(count)
        batch.fresh.extend(pages)
        sequence.table.extend(pages)
        sequence.owners.extend([None] * len(pages))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self, sequence: Sequence, batch: Batch) -> bool:
        """Hold what is cached, take the rest; False and nothing changed if the pages do not suffice."""
        pool, prompt = self.pool, sequence.ticket.request.prompt
        soft = sequence.ticket.soft_tokens
        key = prefix_key(sequence.ticket.root)
        prefix = pool.find(key) if prompt else None
        hits = [] if sequence.scores_text else list(self._hits(sequence))
        own = pool.pages_for(sequence.positions) - soft // pool.page_size - len(hits)
        cost = own + sum(pool.cost(block) for block in hits)
        cost += pool.cost(prefix) if prefix else pool.pages_for(soft)
        if cost + len(self.running) > pool.available:  # leave the running ones a page each
            return False

        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        sequence.status = Status.RUNNING
        for block in hits:
            pool.hold(block)
        if prompt:
            sequence.prefix = pool.hold(prefix) if prefix else self._new_prefix(key, prompt, batch)
            self.soft_hits += prefix is not None
            self.soft_misses += prefix is None
        pages = pool.take(own)
        batch.fresh.extend(pages)
        shared = sequence.prefix.pages[: soft // pool.page_size] if sequence.prefix else ()
        sequence.table = [*shared, *(page for block in hits for page in block.pages), *pages]
        sequence.owners = [*hits, *([None] * own)]
        sequence.published = len(hits)
        sequence.computed = max(0, (len(shared) + len(hits)) * pool.page_size - soft)
        if sequence.prefix and not hits and soft % pool.page_size:
            batch.copies.append((sequence.prefix.pages[-1], pages[0]))
        self.prefix_queries += sequence.num_text
        self.prefix_hits += min(sequence.computed, sequence.num_text)
        sequence.ticket.cached_tokens = max(sequence.ticket.cached_tokens, sequence.computed)
        return True

    def _new_prefix(self, key: Key, prompt: SoftPrompt, batch: Batch) -> Block:
        pages = self.pool.take(self.pool.pages_for(prompt.num_virtual_tokens))
        block = self.pool.publish(key, pages, prompt.digest)
        assert block is not None  # it was looked for a moment ago, in the same thread
        batch.fresh.extend(pages)
        batch.fills.append((block, prompt))
        return block

    def _hits(self, sequence: Sequence) -> Iterator[Block]:
        """Cached pages of the text, from its start; at least one token is left to compute."""
        for key in self._keys(sequence, len(sequence.tokens) - 1):
            block = self.pool.find(key)
            if block is None:
                return
            yield block

    def _keys(self, sequence: Sequence, tokens: int) -> list[Key]:
        """Keys of the pages that the first `tokens` tokens fill, computed once."""
        size, soft = self.pool.page_size, sequence.ticket.soft_tokens
        full = (soft + tokens) // size - soft // size
        while len(sequence.keys) < full:
            page = soft // size + len(sequence.keys)
            content = sequence.tokens[max(0, page * size - soft) : (page + 1) * size - soft]
            sequence.keys.append(next_key(sequence.keys[-1] if sequence.keys else sequence.ticket.root, content))
        return sequence.keys[: max(0, full)]

    def _publish(self, sequence: Sequence) -> None:
        keys = self._keys(sequence, sequence.computed)
        offset = sequence.ticket.soft_tokens // self.pool.page_size
        for i in range(sequence.published, len(keys)):
            sequence.owners[i] = self.pool.publish(keys[i], [sequence.table[offset + i]])
        sequence.published = max(sequence.published, len(keys))

    def _vacate(self, sequence: Sequence) -> None:
        """Give all pages back, the last ones first, so that the start of a text outlives its end in the cache."""
        offset = len(sequence.table) - len(sequence.owners)
        for i in reversed(range(len(sequence.owners))):
            owner = sequence.owners[i]
            if owner is None:
                self.pool.give_back([sequence.table[offset + i]])
            else:
                self.pool.release(owner)
        if sequence.prefix is not None:
            self.pool.release(sequence.prefix)
        sequence.prefix, sequence.table, sequence.owners = None, [], []
        sequence.computed = sequence.published = 0


def _arrival(sequence: Sequence) -> tuple[float, int]:
    return sequence.ticket.arrived, sequence.index


def prefix_key(root: Key) -> Key:
    """Where the pages of the prompt itself are found."""
    return next_key(root, ())


def text_root(namespace: str, weights: str, dtype: str, kv_dtype: str, prompt: SoftPrompt | None) -> Key:
    """The chain of a text's pages begins with all that their KV depends on besides the tokens."""
    return root_key(namespace, weights, dtype, kv_dtype, prompt.digest if prompt else "none")
