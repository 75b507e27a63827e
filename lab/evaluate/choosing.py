"""Which documents real texts are taken from, and which they are chosen on: of two parts, none that is reported on.

Knows documents and a tokenizer; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lab.data.documents import DataError, Document, digest
from lab.data.splits import Splits, grams
from lab.data.windows import Tokenizer, cut
from lab.evaluate.controls import Choice
from prompts_store.prompt import SoftPrompt

TOKENS = 12_288  # that each text is tried on


@dataclass(frozen=True)
class Others:
    """Real texts are starts of windows of `texts`; the best is the best on `select`."""

    texts: Sequence[Document]
    select: Sequence[Document]

    @classmethod
    def of(cls, splits: Splits, reported: Sequence[Document] = ()) -> Others:
        """The parts that teach and select, less what has a run of words in common with documents of another data set
        that are `reported` on. Raises DataError where too little is left."""
        taken = {gram for document in reported for gram in grams(document.words)}
        texts, select = (
            [document for document in splits.parts[part] if taken.isdisjoint(grams(document.words))]
            for part in ("learn", "select")
        )
        if not texts or not select:
            raise DataError("what real texts are to be taken from is itself reported on; name other data")
        return cls(texts, select)

    @property
    def digests(self) -> list[str]:
        return [digest(self.texts), digest(self.select)]

    def choice(self, tokenizer: Tokenizer, window: int, prompt: SoftPrompt, k: int) -> Choice:
        """K texts as long as the prompt, tried in its layout. Raises DataError where no document is long enough."""
        texts = cut(self.texts, tokenizer, max(window, prompt.num_virtual_tokens))
        return Choice(texts, cut(self.select, tokenizer, window, bos=prompt.bos).drawn(TOKENS, 0), k)
