"""Which version answers a request: a pure function of what the registry holds, what is served and what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prompts_store.prompt import Kind
from prompts_store.reference import Reference

Policy = Literal["exact", "transfer", "optional", "none"]
How = Literal["exact", "transferred", "none"]
DEFAULT_ALIAS = "default"


@dataclass(frozen=True, slots=True)
class Served:
    """What runs: `base` and `weights` are digests, `level` is canonical."""

    base: str
    level: str
    weights: str | None


@dataclass(frozen=True, slots=True)
class Query:
    """What was asked for."""

    reference: Reference
    policy: Policy = "transfer"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version as far as resolution cares. Not `live`: a tombstone."""

    version: int
    digest: str
    base: str
    level: str
    weights: str | None
    kind: Kind
    live: bool


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """An alias of the task: `name` at (base, level) points to `version`."""

    name: str
    base: str
    level: str
    version: int


@dataclass(frozen=True, slots=True)
class Score:
    """A perplexity that was measured on the served base and level."""

    version: int
    value: float
    dataset: str
    split: str
    served_weights: str | None
    order: int  # later ones replace earlier ones of the same (version, dataset, split, served_weights)


@dataclass(frozen=True, slots=True)
class Resolution:
    """The answer. `version` is None only for how "none".

    same_weights: whether it was learned through the served weights; None where one of them is unknown or nothing was found.
    measured: for "transferred", whether a measurement on the served level chose it; None otherwise.
    """

    version: int | None
    how: How
    same_weights: bool | None = None
    measured: bool | None = None


NOTHING = Resolution(None, "none")


def resolve(
    query: Query,
    served: Served,
    candidates: Sequence[Candidate],
    aliases: Sequence[AliasTarget],
    scores: Sequence[Score],
) -> Resolution:
    """`candidates`: every version that the task ever had. Raises NotFound, Unresolved, Gone, WrongBase."""
    raise NotImplementedError
