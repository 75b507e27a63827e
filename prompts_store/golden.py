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
# The larger counts. Seen with 24 texts of 64 tokens behind the shipped prompt, at w3g64, w4g64 and dense: bf16 in place
# of fp32 moves a loss by 0.15 % on average and by 0.4 % at most, a BOS too many by 2 to 4 %, a template by 4 to 7 %.
TOLERANCE_NATS, TOLERANCE_SHARE = 0.02, 0.01


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

    @property
    def tolerance(self) -> float:
        """How far off a found loss may be, in nats per token."""
        return max(TOLERANCE_NATS, TOLERANCE_SHARE * self.loss)

    def agrees(self, found: float) -> bool:
        """Whether a loss is the expected one. Never for one that is not finite."""
        return abs(found - self.loss) <= self.tolerance

    def text(self) -> str:
        """For the metadata of a file: canonical JSON."""
        return dump({"ids": list(self.ids), "loss": self.loss})


def _bad(what: str) -> InvalidArtifact:
    return InvalidArtifact("invalid_metadata", f"metadata 'golden' {what}", "golden")
