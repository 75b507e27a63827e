"""Which version answers a request: a pure function of what the registry holds, what is served and what was asked.

Knows no database and no clock, so that every rule is a row in a table of tests. The rules, in order:

1. `task@3`, `task@sha256:…` mean just that version. `task:alias` means what the alias points to, level by level.
2. On the served base and level: the alias `default` first, then what was learned through the served weights, then the
   newest. That is "exact".
3. Else "transferred", if the policy allows: the lowest perplexity measured on the served level, on data of the split
   `select`; without measurements the nearest more compressed level, else the nearest less compressed one. A kv prompt
   transfers only if measured.
4. Else nothing: an error, or under "optional" an answer that says "none". A prompt of another base is never used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prompts_store.errors import Gone, NotFound, Unresolved, WrongBase
from prompts_store.level import bits_per_weight
from prompts_store.prompt import Kind
from prompts_store.reference import Reference

Policy = Literal["exact", "transfer", "optional", "none"]
How = Literal["exact", "transferred", "none"]
DEFAULT_ALIAS = "default"
METRIC = "perplexity"  # the one metric that ranks
SPLIT = "select"  # the one split that does: what is reported must not have chosen


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
    """A perplexity of split `select` on the served level; of one version and data set the highest `order` counts."""

    version: int
    value: float
    dataset: str
    served_weights: str | None
    order: int


@dataclass(frozen=True, slots=True)
class Resolution:
    """The answer. `version` is None only for how "none".

    same_weights: whether it was learned through the served weights; None where one of the two is unknown.
    measured: for "transferred", whether it was measured on the served level; None otherwise.
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
    """`candidates` are all versions that the task ever had, tombstones included.

    Raises NotFound for a task never seen (under every policy but "none"), WrongBase for a reference to another base
    (likewise); under "exact" and "transfer" Unresolved, and NotFound or Gone for a version that is not there.
    """
    if query.policy == "none":
        return NOTHING
    if not candidates:
        raise NotFound("task", f"no prompt was ever stored for task {query.reference.task!r}")
    try:
        if query.reference.explicit:
            return _explicit(query, served, candidates, scores)
        return _by_level(query, served, candidates, aliases, scores)
    except (NotFound, Gone):
        if query.policy == "optional":
            return NOTHING
        raise


def _explicit(query: Query, served: Served, candidates: Sequence[Candidate], scores: Sequence[Score]) -> Resolution:
    ref = query.reference
    named = [c for c in candidates if ref.version == c.version or ref.digest == c.digest]
    live = [c for c in named if c.live]
    if not named:
        raise NotFound("version", f"there is no {ref}")
    if not live:
        raise Gone(f"{ref} was deleted")
    chosen = max(live, key=lambda c: (c.level == served.level, _same_weights(c, served) is True, c.version))
    if chosen.base != served.base:
        raise WrongBase(f"{ref} belongs to base {chosen.base}, the served model's is {served.base}")
    if chosen.level == served.level:
        return Resolution(chosen.version, "exact", _same_weights(chosen, served))
    if query.policy == "exact":
        message = f"{ref} was learned at level {chosen.level}, served is {served.level}, and resolution is exact"
        raise Unresolved(message, served.level, [chosen.level])
    measured = any(score.version == chosen.version for score in scores)
    if chosen.kind == "kv" and not measured:
        message = f"{ref} is a kv prompt of level {chosen.level} that was never measured on {served.level}"
        raise Unresolved(message, served.level, [chosen.level])
    return Resolution(chosen.version, "transferred", _same_weights(chosen, served), measured)


def _by_level(
    query: Query,
    served: Served,
    candidates: Sequence[Candidate],
    aliases: Sequence[AliasTarget],
    scores: Sequence[Score],
) -> Resolution:
    ref = query.reference
    name = ref.alias or DEFAULT_ALIAS
    targets = [alias for alias in aliases if alias.name == name]
    pinned = {alias.level: alias.version for alias in targets if alias.base == served.base}
    pool = [c for c in candidates if c.live and c.base == served.base]
    if ref.alias is not None:
        if targets and not pinned:
            raise WrongBase(f"{ref} belongs to base {targets[0].base}, the served model's is {served.base}")
        pool = [c for c in pool if pinned.get(c.level) == c.version]

    def preference(c: Candidate) -> tuple[bool, bool, int]:
        return pinned.get(c.level) == c.version, _same_weights(c, served) is True, c.version

    if at_level := [c for c in pool if c.level == served.level]:
        chosen = max(at_level, key=preference)
        return Resolution(chosen.version, "exact", _same_weights(chosen, served))
    levels = sorted({c.level for c in pool})
    if query.policy == "exact" or not pool:
        known = f"it has {', '.join(levels)}" if levels else f"it has none for base {served.base}"
        raise Unresolved(f"no prompt of {ref} at level {served.level}: {known}", served.level, levels)
    if (best := _best_measured(pool, served, scores)) is not None:
        return Resolution(best.version, "transferred", _same_weights(best, served), measured=True)
    rows = [c for c in pool if c.kind == "rows"]
    if not rows:
        message = f"{ref} has only kv prompts at {', '.join(levels)}, none measured on {served.level}"
        raise Unresolved(message, served.level, levels)
    nearest = min(_distance(c.level, served.level) for c in rows)
    chosen = max((c for c in rows if _distance(c.level, served.level) == nearest), key=preference)
    return Resolution(chosen.version, "transferred", _same_weights(chosen, served), measured=False)


def _best_measured(pool: Sequence[Candidate], served: Served, scores: Sequence[Score]) -> Candidate | None:
    """Lowest perplexity on the data set that most candidates share; the served weights' scores before the level's."""
    by_version = {c.version: c for c in pool}
    usable = [score for score in sorted(scores, key=lambda s: s.order) if score.version in by_version]
    same = [score for score in usable if served.weights is not None and score.served_weights == served.weights]
    sets: dict[str, dict[int, Score]] = defaultdict(dict)
    for score in same or usable:
        sets[score.dataset][score.version] = score
    if not sets:
        return None
    shared = max(sets.values(), key=_trust)
    return by_version[min(shared.values(), key=lambda s: (s.value, -s.version)).version]


def _trust(scores: Mapping[int, Score]) -> tuple[int, int]:
    """Of two data sets with equally many candidates the one that was measured last."""
    return len(scores), max(score.order for score in scores.values())


def _same_weights(candidate: Candidate, served: Served) -> bool | None:
    if candidate.weights is None or served.weights is None:
        return None
    return candidate.weights == served.weights


def _distance(level: str, served: str) -> tuple[bool, float]:
    """Less is nearer; levels with more bits than the served one come behind all others."""
    gap = bits_per_weight(served) - bits_per_weight(level)
    return gap < 0, abs(gap)
