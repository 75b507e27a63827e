"""Who holds which page of the KV cache.

Plain integers and dictionaries: knows no tensors and no requests. A page is blank, private to one sequence, or part of
a block: pages with a key, read-only, shared by reference count. A block that nobody holds stays findable until its
pages are needed, least recently used first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Key = bytes
BLANK_PAGE = 0  # always zero, never handed out: what block tables are padded with


class OutOfPages(Exception):
    """Every page is held by a sequence."""


def root_key(*parts: str) -> Key:
    """Where a chain of keys starts: everything that the KV of a text depends on besides its tokens."""
    digest = hashlib.blake2b(b"promptstitch.kv.v1", digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part.encode())
    return digest.digest()


def next_key(parent: Key, tokens: Iterable[int]) -> Key:
    """The key of the page that holds `tokens`, behind the page of `parent`."""
    digest = hashlib.blake2b(parent, digest_size=32)
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))
    return digest.digest()


@dataclass(eq=False, slots=True)
class Block:
    """Shared pages: one page of text, or all pages of a soft prompt."""

    key: Key
    pages: tuple[int, ...]
    label: str = ""  # the digest of a soft prompt; for people
    holders: int = field(default=0, init=False)  # kept by PagePool


class PagePool:
    """Hands out pages 1..num_pages-1 and remembers blocks by key."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self._blank = list(range(num_pages - 1, BLANK_PAGE, -1))
        self._blocks: dict[Key, Block] = {}
        self._idle: OrderedDict[Key, Block] = OrderedDict()  # held by nobody, oldest first
        self._idle_pages = 0

    @property
    def capacity(self) -> int:
        return self.num_pages - 1

    @property
    def available(self) -> int:
        """Pages that `take` can hand out, evicting if it must."""
        return len(self._blank) + self._idle_pages

    @property
    def cached(self) -> int:
        """Pages of blocks that nobody holds."""
        return self._idle_pages

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` private pages. Raises OutOfPages and takes none if there are too few."""
        if count > self.available:
            raise OutOfPages
        while len(self._blank) < count:
            _, oldest = self._idle.popitem(last=False)
            self._idle_pages -= len(oldest.pages)
            del self._blocks[oldest.key]
            self._blank.extend(oldest.pages)
        return [self._blank.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Return private pages."""
        self._blank.extend(pages)

    def find(self, key: Key) -> Block | None:
        return self._blocks.get(key)

    def cost(self, block: Block) -> int:
        """Pages that holding it takes from `available`."""
        return 0 if block.holders else len(block.pages)

    def hold(self, block: Block) -> Block:
        if block.holders == 0:
            del self._idle[block.key]
            self._idle_pages -= len(block.pages)
        block.holders += 1
        return block

    def release(self, block: Block) -> None:
        block.holders -= 1
        if block.holders:
            return
        if self._blocks.get(block.key) is block:
            self._idle[block.key] = block
            self._idle_pages += len(block.pages)
        else:
            self._blank.extend(block.pages)  # forgotten while it was held

    def publish(self, key: Key, pages: Sequence[int], label: str = "") -> Block | None:
        """Turn private pages into a block held once; None, and they stay private, if the key is taken."""
        if key in self._blocks:
            return None
        block = self._blocks[key] = Block(key, tuple(pages), label)
        block.holders = 1
        return block

    def labels(self) -> tuple[str, ...]:
        """Of the blocks that have one; may be asked from another thread."""
        return tuple(sorted({block.label for block in list(self._blocks.values()) if block.label}))

    def forget(self, block: Block) -> None:
        """Let nobody find a held block any more: its content is not what its key says."""
        if self._blocks.get(block.key) is block:
            del self._blocks[block.key]
