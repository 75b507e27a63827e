"""The golden self-test of a prompt: a few token ids, and the loss that they had behind the prompt when it was learned.

One number that a wrong model, dtype, layout or kernel changes. Knows no model: who serves computes what it finds, here
stands what is expected and how far off it may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prompts_store.errors import InvalidArtifact
from prompts_store.strict_json import dump, load_object

MIN_IDS, MAX_IDS = 2, 256
MAX_ID = 2**31 - 1
MAX_LOSS = 1000.0
RECOMMENDED_IDS = 64


@dataclass(frozen=True, slots=True)
class Golden:
    """`ids`: T token ids (2 to 256, 64 by custom), just as they stand behind the prompt: no BOS is added.

    `loss`: the mean of -log p(token | prompt, tokens before) over tokens 1..T-1, in nats, through the weights that the
    prompt was learned through. Raises InvalidArtifact where a value is out of bounds.
    """

    ids: tuple[int, ...]
    loss: float

    def __post_init__(self) -> None:
        if not MIN_IDS <= len(self.ids) <= MAX_IDS:
            raise _bad(f"must have {MIN_IDS} to {MAX_IDS} ids, not {len(self.ids)}")
        if not all(type(item) is int and 0 <= item <= MAX_ID for item in self.ids):
            raise _bad("ids must be integers, none negative")
        if type(self.loss) not in (int, float) or not math.isfinite(self.loss) or not 0 <= self.loss <= MAX_LOSS:
            raise _bad(f"loss must be a number from 0 to {MAX_LOSS:g}, in nats per token")
        object.__setattr__(self, "loss", float(self.loss))

    @classmethod
    def parse(cls, text: str) -> Golden:
        """From the metadata of a file: `{"ids": […], "loss": …}` and nothing else. Raises InvalidArtifact."""
        fields = load_object(text.encode(), field="golden", code="invalid_metadata")
        if fields.keys() != {"ids", "loss"} or not isinstance(fields["ids"], list):
            raise _bad('must be {"ids": […], "loss": …}')
        return cls(tuple(fields["ids"]), fields["loss"])

    def text(self) -> str:
        """For the metadata of a file: canonical JSON."""
        return dump({"ids": list(self.ids), "loss": self.loss})


def _bad(what: str) -> InvalidArtifact:
    return InvalidArtifact("invalid_metadata", f"metadata 'golden' {what}", "golden")
