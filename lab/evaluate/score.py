"""Losses of exactly the scored tokens of windows, the same ones with and without a prompt, in nats.

Memory stays small whatever the vocabulary: logits exist for a few hundred tokens at a time, and only for those that are
scored. Knows windows, a model and a teacher; knows no files and no statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.data.windows import Windows
from lab.evaluate.forward import Prefix, hidden_states, prefix
from llama.model import Llama
from prompts_store.prompt import SoftPrompt

BATCH_TOKENS = 2048  # tokens that go through the model at once
LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}  # elements of a chunk of logits: what a cache holds; what fills a GPU
TEACHER_ROWS = 256  # the same for a teacher

Progress = Callable[[str, int, int], None]  # step, windows done, in all


@dataclass(frozen=True)
class Scores:
    """What each scored token of W windows cost, on the CPU in fp32: (W, T), 0 where nothing is scored.

    `nll` is the negative log-likelihood, `hits` whether it was the most likely token; `kl` the divergence
    KL(dense ‖ model) of the distributions that it was drawn from, and `agrees` whether both have the same most likely
    token: None without a teacher.
    """

    windows: Windows
    nll: Tensor
    hits: Tensor
    kl: Tensor | None = None
    agrees: Tensor | None = None

    @property
    def nll_sum(self) -> float:
        return float(self.nll.double().sum())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll_sum / self.windows.scored_tokens, 709.0))  # beyond, a float ends


class NotFiniteLoss(ValueError):
    """A loss is NaN or infinite: the checkpoint or the prompt does not compute in this dtype."""


class Teacher:
    """The dense model's distributions for the scored tokens of these windows, rebuilt from its last hidden states.

    `hidden` (S, H): one row for each scored token, windows in order, in the dtype it was computed in; `head` makes
    logits (n, V) of rows (n, H). `weights` is the dense model's digest, by which scores against it are kept.
    """

    def __init__(self, windows: Windows, hidden: Tensor, head: Callable[[Tensor], Tensor], weights: str = "") -> None:
        if len(hidden) != windows.scored_tokens:
            raise ValueError(f"{len(hidden)} hidden states cannot belong to {windows.scored_tokens} scored tokens")
        self.windows, self._hidden, self.head, self.weights = windows, hidden, head, weights
        counts = windows.scored.sum(1)
        self._starts = (counts.cumsum(0) - counts).tolist()
        self._counts = counts.tolist()

    @torch.inference_mode()
    def scores(self) -> Scores:
        """What the dense model itself pays for the tokens, from its states alone; its divergence from itself is 0."""
        scored, targets = self.windows.scored, self.windows.ids[self.windows.scored]
        nll, hits = torch.zeros(scored.shape), torch.zeros(scored.shape, dtype=torch.bool)
        losses, tops, start = [], [], 0
        for states in torch.split(self._hidden, TEACHER_ROWS):
            logits = self.head(states).float().cpu()
            wanted = targets[start : start + len(states)]
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            tops.append(logits.argmax(-1) == wanted)
            start += len(states)
        nll[scored], hits[scored] = torch.cat(losses), torch.cat(tops)
        return Scores(self.windows, nll, hits, torch.zeros(scored.shape), scored)

    def hidden(self, rows: Tensor) -> Tensor:
        """(n, H) of the scored tokens of these windows (their numbers), in that order."""
        parts = [self._hidden[self._starts[w] : self._starts[w] + self._counts[w]] for w in rows.tolist()]
        return torch.cat(parts) if parts else self._hidden[:0]


@torch.inference_mode()
def score(
    model: Llama,
    windows: Windows,
    prompt: SoftPrompt | None = None,
    *,
    teacher: Teacher | None = None,
    progress: Progress | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Scores:
    """Scores of the windows behind a prompt that fits the model (`engine.stitch.mismatch`), or behind none.

    Raises NotFiniteLoss. Peak memory beyond the model: activations of `batch_tokens` tokens and a few chunks of logits.
    """
    before = None if prompt is None else prefix(model, prompt.tensors)
    shape = windows.scored.shape
    nll, hits = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    kl, agrees = (None, None) if teacher is None else (torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
    done = 0
    for rows, hidden in predicting(model, windows, before, batches(windows, batch_tokens)):
        at = _places(windows, rows)
        target = windows.ids[at].to(model.device)
        theirs = None if teacher is None else teacher.hidden(rows)
        start = 0
        for chunk in torch.split(hidden, chunk_rows(model)):
            here = tuple(index[start : start + len(chunk)] for index in at)
            logits = model.logits(chunk).float()
            wanted, top = target[start : start + len(chunk)], logits.argmax(-1)
            nll[here] = F.cross_entropy(logits, wanted, reduction="none").cpu()
            hits[here] = (top == wanted).cpu()
            if teacher is not None and theirs is not None and kl is not None and agrees is not None:
                dense = teacher.head(theirs[start : start + len(chunk)].to(model.device)).float()
                kl[here] = divergence(dense, logits).cpu()
                agrees[here] = (dense.argmax(-1) == top).cpu()
            start += len(chunk)
        done += len(rows)
        if progress:
            progress("score", done, len(windows))
    if not bool(nll.isfinite().all()):
        first = int((~nll.isfinite()).any(1).nonzero()[0, 0])
        raise NotFiniteLoss(
            f"the loss of window {first} is not finite in {model.dtype}: the checkpoint or the prompt is broken, or "
            "too large for this dtype; try --dtype float32"
        )
    return Scores(windows, nll, hits, kl, agrees)


def batches(windows: Windows, batch_tokens: int = BATCH_TOKENS, *, in_order: bool = False) -> tuple[Tensor, ...]:
    """The numbers (B,) of windows that go together: those of like length, or `in_order` as they stand."""
    lengths = windows.lengths
    order = torch.arange(len(windows)) if in_order else lengths.argsort(stable=True)
    return torch.split(order, _sizes(lengths[order].tolist(), batch_tokens))


def predicting(
    model: Llama, windows: Windows, before: Prefix | None, together: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each of the `batches`: (its rows, the hidden states (n, H) that predict the n tokens it scores)."""
    for rows in together:
        width = max(2, int(windows.lengths[rows].max()))
        hidden = hidden_states(model, windows.ids[rows, : width - 1], before)  # the last token predicts nothing
        yield rows, hidden[windows.scored[rows, 1:width].to(hidden.device)]


def divergence(dense: Tensor, model: Tensor) -> Tensor:
    """KL(dense ‖ model) in nats of logits (n, V) each → (n,), not below 0."""
    p, q = dense.log_softmax(-1), model.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def _sizes(lengths: list[int], batch_tokens: int) -> list[int]:
    """How many windows go together, one after another, so that none but a lone one takes more than `batch_tokens`."""
    sizes, count, widest = [], 0, 0
    for length in lengths:
        widest = max(widest, length)
        if count and (count + 1) * widest > batch_tokens:
            sizes.append(count)
            count, widest = 0, length
        count += 1
    return [*sizes, count]


def chunk_rows(model: Llama) -> int:
    """How many tokens' logits are made at once."""
    return max(1, LOGITS[model.device.type] // model.config.vocab_size)


def _places(windows: Windows, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into (W, T) of the scored tokens of these windows, in the order of `rows`."""
    window, position = windows.scored[rows].nonzero(as_tuple=True)
    return rows[window], position
