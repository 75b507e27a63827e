"""What is asked: a deterministic list of jobs, each a text of so many tokens and the prompt to stitch in front of it.

Knows the tokenizer, so that lengths count in the served model's tokens; knows no server and no wire format.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

# For runs without a text file: common words, one token each in most vocabularies.
WORDS = (
    "the a this that one two some many old new long small water house road city school river paper morning people "
    "letter market music summer garden window story question answer number person hand light night year day word "
    "write read open close turn bring carry follow remember find give keep leave call ask tell try often never "
    "always under over between near after before without because while until and or but so then there here"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One request, answered with exactly `max_tokens` tokens. `prompt` names a soft prompt; None is the bare model."""

    text: str
    text_tokens: int
    prompt: str | None = None
    max_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """`requests` jobs, `concurrency` at a time, answered with `least_tokens` (None: as many) to `max_tokens` tokens.

    Texts have `shortest` to `longest` tokens, uniformly. Job i takes prompt i modulo their number or, with `zipf` s,
    the prompt of rank r with probability in proportion to 1 / r^s. Another `seed` gives other texts of other lengths,
    so that a second run finds none of its texts in a server's cache; with `sizes`, of the same lengths for the same
    `sizes`.
    """

    requests: int = 96
    concurrency: int = 32
    max_tokens: int = 64
    least_tokens: int | None = None
    shortest: int = 32
    longest: int = 128
    prompts: tuple[str | None, ...] = (None,)
    zipf: float = 0.0
    seed: int = 0
    sizes: int | None = None

    def jobs(self, tokenizer: Tokenizer, corpus: Path | None = None) -> list[Job]:
        """The jobs, cut one behind the other from the text file `corpus` or, without one, from random words.

        Raises ValueError if the file is too short to give every job a text of its own.
        """
        needed = self.requests * self.longest
        text = corpus.read_text(encoding="utf-8") if corpus else sampled_text(2 * needed, self.seed)
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= needed:
            raise ValueError(f"{corpus} has {len(offsets)} tokens, the workload takes up to {needed}: give more text")
        at = self.seed * needed % (len(offsets) - needed)
        draw = random.Random(self.seed if self.sizes is None else self.sizes)
        fewest = self.max_tokens if self.least_tokens is None else self.least_tokens
        jobs = []
        for prompt in self._turns():
            length = draw.randint(self.shortest, self.longest)
            piece = text[offsets[at][0] : offsets[at + length - 1][1]].strip()
            tokens = len(tokenizer.encode(piece, add_special_tokens=False).ids)
            jobs.append(Job(piece, tokens, prompt, draw.randint(fewest, self.max_tokens)))
            at += length
        return jobs

    def _turns(self) -> list[str | None]:
        """The prompt of each job."""
        if self.zipf:
            weights = [(rank + 1) ** -self.zipf for rank in range(len(self.prompts))]
            return random.Random(self.seed).choices(self.prompts, weights, k=self.requests)
        return [self.prompts[i % len(self.prompts)] for i in range(self.requests)]


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder in the Hub's layout."""
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def sampled_text(words: int, seed: int | str) -> str:
    """So many random words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS.split(), k=words))
