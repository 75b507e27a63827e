"""Prompts that nobody learned: what a learned one is held against, so that no gain comes from merely being a prefix.

Knows a model, its embeddings and text; knows no files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from lab.data.documents import Document
from lab.data.windows import Tokenizer, Windows
from lab.evaluate.forward import own_kv
from lab.evaluate.score import Progress
from lab.evaluate.scorer import Scorer
from llama.model import Llama
from prompts_store.prompt import Bos, Kind, SoftPrompt

ENDOFTEXT = "<|endoftext|>"
# What the paper tells a compressed model in words, and the longer form that others who build on it use.
HARD_SENTENCES = (
    "The weight matrix inside the language model contains errors. Make any necessary adjustments to ensure optimal "
    "performance.\n",
    "The weight matrix inside the language model has been quantized. Make any necessary adjustments to ensure optimal "
    "performance.\n",
    "Please carefully examine the weight matrix within the model, as it may contain errors. It is crucial to verify "
    "its accuracy and make any necessary adjustments to ensure optimal performance.\n",
)


@dataclass(frozen=True)
class Choice:
    """K real texts, the starts of windows drawn from `texts`, of which the best in front of `select` is taken.

    Neither may hold documents that are reported on, nor the one those of the other.
    """

    texts: Windows
    select: Windows
    k: int = 16
    seed: int = 0

    def starts(self, n: int) -> Iterator[list[int]]:
        """At most K texts of n tokens; none where no window is so long."""
        long = (self.texts.lengths >= n).nonzero()[:, 0]
        order = torch.randperm(len(long), generator=torch.Generator().manual_seed(self.seed))
        for row in long[order[: self.k]].tolist():
            yield self.texts.ids[row, :n].tolist()


def of_tokens(model: Llama, base: str, ids: Sequence[int], *, kind: Kind = "rows", bos: Bos = "none") -> SoftPrompt:
    """A prompt of N rows of the embedding table, or of the keys and values that they leave: equal to the text itself.

    Raises ValueError for no ids, or ids beyond the vocabulary.
    """
    vocabulary = model.config.vocab_size
    if not ids or not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(f"a prompt needs token ids from 0 to {vocabulary - 1}, at least one; got {ids!r}")
    rows = {"prompt_embeddings": model.embed(torch.tensor(ids, device=model.device)).float().cpu().contiguous()}
    return SoftPrompt(kind, base, rows if kind == "rows" else own_kv(model, rows), bos)


def untrained(model: Llama, base: str, n: int, *, kind: Kind = "rows", bos: Bos = "none", seed: int = 0) -> SoftPrompt:
    """A prompt of random tokens: the length and kind of a learned one, and nothing learned."""
    dice = torch.Generator().manual_seed(seed)
    return of_tokens(
        model, base, torch.randint(model.config.vocab_size, (n,), generator=dice).tolist(), kind=kind, bos=bos
    )


def fixed(model: Llama, tokenizer: Tokenizer, like: SoftPrompt) -> Mapping[str, SoftPrompt]:
    """The controls of a prompt that need no data: an untrained one of its length and kind, one end of text, and the
    hard sentences; each in its layout."""
    end = tokenizer.encode(ENDOFTEXT, "none")
    if len(end) != 1 and tokenizer.eos_token_id is not None:  # this tokenizer calls it otherwise
        end = [tokenizer.eos_token_id]
    texts = {"end_of_text": end}
    texts |= {f"hard_sentence_{i}": tokenizer.encode(text, "none") for i, text in enumerate(HARD_SENTENCES, 1)}
    made = {name: of_tokens(model, like.base, ids, bos=like.bos) for name, ids in texts.items() if ids}
    idle = untrained(model, like.base, like.num_virtual_tokens, kind=like.kind, bos=like.bos)
    return MappingProxyType({"untrained": idle, **made})


def best_prefix(
    scorer: Scorer, like: SoftPrompt, choice: Choice, progress: Progress = lambda step, done, total: None
) -> tuple[SoftPrompt | None, Sequence[float]]:
    """The best of K real texts of the prompt's length: what choosing, without learning, gives.

    Returns it, and the perplexity of each tried: None and nothing where no text is long enough.
    """
    best, tried = None, list[float]()
    for ids in choice.starts(like.num_virtual_tokens):
        prompt = of_tokens(scorer.loaded.model, like.base, ids, bos=like.bos)
        perplexity = scorer(choice.select, prompt, lambda step, done, total: None).perplexity
        if best is None or perplexity < min(tried):
            best = prompt
        tried.append(perplexity)
        progress("text prefixes", len(tried), choice.k)
    return best, tried


def by_frequency(learned: Sequence[Document], asked: Sequence[Document]) -> float | None:
    """Nats that the completions of `asked` cost whoever knows how often each one came in `learned`, and no more; None
    where one never came: such answers are no choice among a few."""
    counts = Counter(document.completion for document in learned)
    if any(document.completion not in counts for document in asked):
        return None
    return -sum(math.log(counts[document.completion] / counts.total()) for document in asked)
