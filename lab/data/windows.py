"""Windows: rows of token ids that lie inside one document, with the tokens whose loss counts marked.

The layout is the one that serving has: what stands in front of a text is decided by the prompt's `bos`, a prompt and
its completion are tokenised apart, as they are when the completion is generated, and a chat goes through the model's
own template. Knows documents and a tokenizer; knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lab.data.documents import DataError, Document
from prompts_store.prompt import Bos


class Tokenizer(Protocol):
    """What cutting needs of `llama.tokenizer.HubTokenizer`."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, bos: Bos = "tokenizer") -> list[int]: ...
    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, asking: bool = True) -> str: ...


@dataclass(frozen=True)
class Windows:
    """W windows of at most T tokens.

    `ids` (W, T) int64, padded on the right with 0; `scored` (W, T) bool: this token is a target whose loss counts,
    never the first of a window, whether a prompt stands in front or not; `document` (W,) int64: which of the documents
    it was cut from; `left_out`: documents that gave no window. Nobody writes to the tensors. `digest` names the first
    three.
    """

    ids: Tensor
    scored: Tensor
    document: Tensor
    digest: str
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """(W,) int64: tokens up to the last scored one. What comes after it nobody needs to compute."""
        places = torch.arange(1, self.scored.shape[1] + 1)
        return (self.scored * places).amax(1)

    @property
    def scored_tokens(self) -> int:
        return int(self.scored.sum())

    def select(self, rows: Tensor) -> Windows:
        """Those of the given numbers (or mask), in that order."""
        return windows(self.ids[rows], self.scored[rows], self.document[rows])

    def drawn(self, tokens: int, seed: int) -> Windows:
        """As many as hold so many tokens, drawn by the seed; all if there are fewer."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[: int((self.lengths[order].cumsum(0) < tokens).sum()) + 1])


def windows(ids: Tensor, scored: Tensor, document: Tensor, left_out: int = 0) -> Windows:
    """Windows of just these tensors."""
    hashed = hashlib.sha256(f"promptstitch.windows.v1 {tuple(ids.shape)}".encode())
    for tensor in (ids, scored, document):
        hashed.update(tensor.contiguous().numpy().tobytes())
    return Windows(ids, scored, document, f"sha256:{hashed.hexdigest()}", left_out)


def cut(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    length: int,
    *,
    bos: Bos | None = None,
    most: int | None = None,
) -> Windows:
    """Windows of the documents, in order; `most` is the largest number of windows taken from one of them.

    `bos` is the layout of the prompt that they go behind; without one, a text has no BOS, and what is asked is encoded
    as the tokenizer does by itself, as serving does.
    Of a text, every `length` tokens are a window, without overlap, and what is left over at the end is dropped; a BOS
    that the layout asks for stands before each, as an extra token. Of a completion or a chat, the whole is one window
    of at most `length` tokens, a BOS not counted, and a longer one is left out; it ends with the token that ends an
    answer. Raises DataError where nothing is left, and where a layout cannot be had.
    """
    if length < 2:
        raise DataError(f"windows of {length} tokens have nothing to score; take at least 2")
    rows: list[_Row] = []
    at: list[int] = []
    for number, document in enumerate(documents):
        found = [row for row in _rows(document, tokenizer, length, bos) if any(row.scored)][:most]
        rows += found
        at += [number] * len(found)
    if not rows:
        raise DataError(_nothing(documents, tokenizer, length))
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for target, mask, row in zip(ids, scored, rows, strict=True):
        target[: len(row.ids)] = torch.tensor(row.ids)
        mask[: len(row.ids)] = torch.tensor(row.scored)
    return windows(ids, scored, torch.tensor(at), len(documents) - len(set(at)))


@dataclass(frozen=True, slots=True)
class _Row:
    ids: list[int]
    scored: list[bool]


def _rows(document: Document, tokenizer: Tokenizer, length: int, bos: Bos | None) -> Iterator[_Row]:
    try:
        if not document.turns and document.completion is None:
            yield from _text(document.text or "", tokenizer, length, bos or "none")
            return
        for row in (
            _chat(document, tokenizer) if document.turns else _completion(document, tokenizer, bos or "tokenizer")
        ):
            extra = bool(row.ids) and row.ids[0] == tokenizer.bos_token_id
            if len(row.ids) - extra <= length:
                yield replace(row, scored=[False, *row.scored[1:]])
    except ValueError as error:
        raise DataError(f"{document.id}: {error}") from error


def _text(text: str, tokenizer: Tokenizer, length: int, bos: Bos) -> Iterator[_Row]:
    ids, head = tokenizer.encode(text, "none"), front(tokenizer, bos)
    for start in range(0, len(ids) - length + 1, length):
        mask = [False] * (len(head) + 1) + [True] * (length - 1)
        yield _Row([*head, *ids[start : start + length]], mask)


def front(tokenizer: Tokenizer, bos: Bos) -> list[int]:
    """The ids that a layout puts before a text: none, or one BOS. Raises ValueError where the tokenizer has none."""
    return [] if bos == "none" else [token for token in tokenizer.encode("", bos) if token == tokenizer.bos_token_id]


def _completion(document: Document, tokenizer: Tokenizer, bos: Bos) -> Iterator[_Row]:
    asked = tokenizer.encode(document.text or "", bos)
    answer = tokenizer.encode(document.completion or "", "none")
    if tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    yield _Row([*asked, *answer], [False] * len(asked) + [True] * len(answer))


def _chat(document: Document, tokenizer: Tokenizer) -> Iterator[_Row]:
    """A row for as many turns as continue each other token by token, as serving would see them: mostly one in all."""
    messages = [{"role": turn.role, "content": turn.content} for turn in document.turns]
    row = _Row([], [])
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = tokenizer.chat_text(messages[:at]), tokenizer.chat_text(messages[: at + 1], asking=False)
        if not after.startswith(before):
            raise ValueError(
                f"the chat template writes turn {at} otherwise than it asks for it; leave such chats out, "
                "or write them as prompt and completion"
            )
        asked, answer = tokenizer.encode(before, "none"), tokenizer.encode(after[len(before) :], "none")
        if asked[: len(row.ids)] == row.ids:
            row = _Row(asked, row.scored + [False] * (len(asked) - len(row.ids)))
        else:
            yield row
            row = _Row(asked, [False] * len(asked))
        ends = next((i for i, token in enumerate(answer) if token in tokenizer.eos_token_ids), len(answer) - 1)
        scored = [i <= ends for i in range(len(answer))]
        row = _Row(row.ids + answer, row.scored + scored)
    yield row


def _nothing(documents: Sequence[Document], tokenizer: Tokenizer, length: int) -> str:
    texts = [document for document in documents if document.completion is None and not document.turns]
    if not texts:
        return (
            f"every one of {len(documents)} documents is longer than {length} tokens; take longer windows "
            "(--window, or --set window=N)"
        )
    longest = max(len(tokenizer.encode(document.text or "", "none")) for document in texts)
    return (
        f"the data is too short for one window of {length} tokens: the longest of {len(documents)} documents has "
        f"{longest}; take shorter windows (--window, or --set window=N) or more text"
    )
