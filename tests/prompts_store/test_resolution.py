"""The table of what answers what. One task, small candidates; the pure function alone."""

from dataclasses import dataclass, field

import pytest

from prompts_store.errors import Gone, NotFound, StoreError, Unresolved, WrongBase
from prompts_store.reference import parse_reference
from prompts_store.resolution import AliasTarget, Candidate, Query, Resolution, Score, Served, resolve

BASE, OTHER = "base", "other base"
DIGESTS = {n: "sha256:" + f"{n:x}" * 64 for n in range(1, 10)}


def v(version, level="w4g128", *, weights=None, base=BASE, kind="rows", live=True, digest=None) -> Candidate:
    return Candidate(version, DIGESTS[digest or version], base, level, weights, kind, live)


def alias(version, level="w4g128", name="default", base=BASE) -> AliasTarget:
    return AliasTarget(name, base, level, version)


def score(version, value, dataset="c4", weights=None, order=0) -> Score:
    return Score(version, value, dataset, weights, order)


@dataclass
class Case:
    have: list[Candidate]
    answer: Resolution | type[StoreError]
    ask: str = "task"
    policy: str = "transfer"
    served: Served = field(default_factory=lambda: Served(BASE, "w4g128", "W"))
    aliases: list[AliasTarget] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


def exact(version, same=None) -> Resolution:
    return Resolution(version, "exact", same)


def transferred(version, measured, same=None) -> Resolution:
    return Resolution(version, "transferred", same, measured)


NONE = Resolution(None, "none")
W3, W2, S50, S25, INT8 = "w3g64", "w2g64", "s50", "s25", "int8"

CASES = {
    # the served level
    "the one version": Case([v(1)], exact(1)),
    "the newest": Case([v(1), v(2)], exact(2)),
    "not a deleted one": Case([v(1), v(2, live=False)], exact(1)),
    "the served weights before the newest": Case([v(1, weights="W"), v(2, weights="X"), v(3)], exact(1, True)),
    "the newest of those with the served weights": Case([v(1, weights="W"), v(2, weights="W"), v(3)], exact(2, True)),
    "other weights are told": Case([v(1, weights="X")], exact(1, False)),
    "served weights that nobody knows": Case([v(1, weights="X"), v(2)], exact(2), served=Served(BASE, "w4g128", None)),
    "the default alias before the served weights": Case([v(1), v(2, weights="W")], exact(1), aliases=[alias(1)]),
    "an alias of another name is nothing to a bare task": Case([v(1), v(2)], exact(2), aliases=[alias(1, name="old")]),
    "the default of another level is nothing here": Case([v(1, W3), v(2), v(3)], exact(3), aliases=[alias(1, W3)]),
    "the default of another base is nothing here": Case(
        [v(1, base=OTHER), v(2), v(3)], exact(3), aliases=[alias(1, base=OTHER)]
    ),
    "exact before better measured": Case([v(1), v(2, W3)], exact(1), scores=[score(1, 9.0), score(2, 1.0)]),
    "a kv prompt at its own level needs no measurement": Case([v(1, kind="kv")], exact(1)),
    "the same at policy exact": Case([v(1), v(2, W3)], exact(1), policy="exact"),
    # transferred, unmeasured
    "the nearest more compressed": Case([v(1, W2), v(2, W3), v(3, INT8)], transferred(2, False)),
    "more compressed before less, however far": Case([v(1, "w2g64-s50"), v(2, "nf4")], transferred(1, False)),
    "else the nearest less compressed": Case([v(1, "dense"), v(2, INT8), v(3, S25)], transferred(2, False)),
    "equal bits count as near": Case([v(1, S50), v(2, W3)], transferred(1, False), served=Served(BASE, INT8, "W")),
    "the newest at one distance": Case([v(1, W3), v(2, W3)], transferred(2, False)),
    "the default alias of the nearest level": Case([v(1, W3), v(2, W3)], transferred(1, False), aliases=[alias(1, W3)]),
    "other weights are told when transferred": Case([v(1, W3, weights="X")], transferred(1, False, False)),
    "a kv prompt does not transfer unmeasured": Case([v(1, W3, kind="kv"), v(2, W2)], transferred(2, False)),
    "kv alone, unmeasured": Case([v(1, W3, kind="kv")], Unresolved),
    "to a dense model": Case([v(1, W3), v(2, S50)], transferred(2, False), served=Served(BASE, "dense", "W")),
    # transferred, measured
    "the best measured before the nearest": Case(
        [v(1, W2), v(2, W3)], transferred(1, True), scores=[score(1, 8.0), score(2, 9.0)]
    ),
    "one measured before all unmeasured": Case([v(1, W2), v(2, W3)], transferred(1, True), scores=[score(1, 99.0)]),
    "measured, less compressed": Case([v(1, "dense"), v(2, W3)], transferred(1, True), scores=[score(1, 8.0)]),
    "the data set that most share": Case(
        [v(1, W2), v(2, W3), v(3, S50)],
        transferred(2, True),
        scores=[score(1, 9.0), score(2, 8.0), score(3, 1.0, "wiki")],
    ),
    "of two equal data sets, the one measured last": Case(
        [v(1, W2), v(2, W3)],
        transferred(2, True),
        scores=[score(1, 1.0, "a", order=1), score(2, 2.0, "a", order=2),
                score(1, 4.0, "b", order=3), score(2, 3.0, "b", order=4)],
    ),
    "scores through the served weights before the level's": Case(
        [v(1, W2), v(2, W3)],
        transferred(2, True),
        scores=[score(1, 1.0, weights="X"), score(2, 5.0, weights="W")],
    ),
    "the level's scores where the weights have none": Case(
        [v(1, W2), v(2, W3)],
        transferred(1, True),
        scores=[score(1, 1.0, weights="X"), score(2, 5.0, weights="Y")],
    ),
    "a later score replaces an earlier one": Case(
        [v(1, W2), v(2, W3)],
        transferred(2, True),
        scores=[score(1, 9.0, order=3), score(1, 1.0, order=1), score(2, 5.0, order=2)],
    ),
    "the newest of two that measure the same": Case(
        [v(1, W2), v(2, W3)], transferred(2, True), scores=[score(1, 5.0), score(2, 5.0)]
    ),
    "a deleted version's score is nothing": Case(
        [v(1, W2, live=False), v(2, W3)], transferred(2, False), scores=[score(1, 1.0)]
    ),
    "another base's score is nothing": Case(
        [v(1, W2, base=OTHER), v(2, W3)], transferred(2, False), scores=[score(1, 1.0)]
    ),
    "a measured kv prompt transfers": Case([v(1, W3, kind="kv")], transferred(1, True), scores=[score(1, 8.0)]),
    # nothing
    "exact refuses what would be transferred": Case([v(1, W3)], Unresolved, policy="exact"),
    "optional transfers too": Case([v(1, W3)], transferred(1, False), policy="optional"),
    "optional goes on without": Case([v(1, W3, kind="kv")], NONE, policy="optional"),
    "optional, all deleted": Case([v(1, live=False)], NONE, policy="optional"),
    "all deleted": Case([v(1, live=False)], Unresolved),
    "only another base": Case([v(1, base=OTHER)], Unresolved),
    "only another base, optional": Case([v(1, base=OTHER)], NONE, policy="optional"),
    "none asks for none": Case([v(1)], NONE, policy="none"),
    "none, even of a task never seen": Case([], NONE, policy="none"),
    "a task never seen": Case([], NotFound),
    "a task never seen, exact": Case([], NotFound, policy="exact"),
    "a task never seen, optional: a typo is no wish": Case([], NotFound, policy="optional"),
    "a version of a task never seen, optional": Case([], NotFound, ask="task@1", policy="optional"),
    # explicit versions and digests
    "a version": Case([v(1), v(2)], exact(1), ask="task@1"),
    "a version before any alias": Case([v(1), v(2)], exact(1), ask="task@1", aliases=[alias(2)]),
    "a version of another level": Case([v(1, W3), v(2)], transferred(1, False), ask="task@1"),
    "a version measured here": Case([v(1, W3), v(2)], transferred(1, True), ask="task@1", scores=[score(1, 5.0)]),
    "a version of another level, exact": Case([v(1, W3), v(2)], Unresolved, ask="task@1", policy="exact"),
    "a version of another level, optional": Case([v(1, W3)], transferred(1, False), ask="task@1", policy="optional"),
    "a version of another base": Case([v(1, base=OTHER), v(2)], WrongBase, ask="task@1"),
    "a version of another base, optional": Case([v(1, base=OTHER), v(2)], WrongBase, ask="task@1", policy="optional"),
    "a version of another base, none": Case([v(1, base=OTHER)], NONE, ask="task@1", policy="none"),
    "a version that is not": Case([v(1)], NotFound, ask="task@2"),
    "a version that is not, optional": Case([v(1)], NONE, ask="task@2", policy="optional"),
    "a deleted version": Case([v(1, live=False), v(2)], Gone, ask="task@1"),
    "a deleted version, optional": Case([v(1, live=False), v(2)], NONE, ask="task@1", policy="optional"),
    "a kv version unmeasured elsewhere": Case([v(1, W3, kind="kv")], Unresolved, ask="task@1"),
    "a kv version measured here": Case(
        [v(1, W3, kind="kv")], transferred(1, True), ask="task@1", scores=[score(1, 2.0)]
    ),
    "a digest": Case([v(1), v(2)], exact(1), ask=f"task@{DIGESTS[1]}"),
    "a digest at two levels: the served one": Case(
        [v(1), v(2, W3, digest=1)], exact(1), ask=f"task@{DIGESTS[1]}"
    ),
    "a digest uploaded again": Case([v(1, live=False), v(2, digest=1)], exact(2), ask=f"task@{DIGESTS[1]}"),
    "a digest whose versions are deleted": Case([v(1, live=False)], Gone, ask=f"task@{DIGESTS[1]}"),
    "a digest that is not": Case([v(1)], NotFound, ask=f"task@{DIGESTS[9]}"),
    # named aliases
    "an alias": Case([v(1), v(2)], exact(1), ask="task:old", aliases=[alias(1, name="old"), alias(2)]),
    "an alias of another level only": Case(
        [v(1, W3), v(2, W3), v(3, W2)], transferred(1, False), ask="task:old", aliases=[alias(1, W3, "old")]
    ),
    "an alias of two other levels": Case(
        [v(1, W3), v(2, W2), v(3, W3)],
        transferred(1, False),
        ask="task:old",
        aliases=[alias(2, W2, "old"), alias(1, W3, "old")],
    ),
    "an alias of two other levels, measured": Case(
        [v(1, W3), v(2, W2), v(3, W3)],
        transferred(2, True),
        ask="task:old",
        aliases=[alias(2, W2, "old"), alias(1, W3, "old")],
        scores=[score(3, 1.0), score(2, 2.0), score(1, 3.0)],
    ),
    "an alias of another level, exact": Case(
        [v(1, W3), v(2)], Unresolved, ask="task:old", policy="exact", aliases=[alias(1, W3, "old")]
    ),
    "an alias that is not never means the default": Case([v(1)], Unresolved, ask="task:old", aliases=[alias(1)]),
    "an alias that is not, optional": Case([v(1)], NONE, ask="task:old", policy="optional"),
    "an alias of another base": Case(
        [v(1, base=OTHER)], WrongBase, ask="task:old", aliases=[alias(1, name="old", base=OTHER)]
    ),
    "the default by name": Case([v(1), v(2)], exact(1), ask="task:default", aliases=[alias(1)]),
    "the default by name, where there is none": Case([v(1)], Unresolved, ask="task:default"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_resolution(name):
    case = CASES[name]
    query = Query(parse_reference(case.ask), case.policy)
    arguments = query, case.served, case.have, case.aliases, case.scores
    if isinstance(case.answer, Resolution):
        assert resolve(*arguments) == case.answer
    else:
        with pytest.raises(StoreError) as refused:
            resolve(*arguments)
        assert type(refused.value) is case.answer


def test_the_order_of_what_is_given_is_nothing():
    for case in CASES.values():
        if isinstance(case.answer, Resolution):
            query = Query(parse_reference(case.ask), case.policy)
            answer = resolve(query, case.served, case.have[::-1], case.aliases[::-1], case.scores[::-1])
            assert answer == case.answer


def test_the_refusal_names_both_levels():
    with pytest.raises(Unresolved) as refused:
        resolve(Query(parse_reference("task@1"), "exact"), Served(BASE, "w4g128", None), [v(1, W3)], [], [])
    assert "w3g64" in refused.value.message
    assert "w4g128" in refused.value.message
    with pytest.raises(Unresolved) as refused:
        resolve(Query(parse_reference("task"), "exact"), Served(BASE, "w4g128", None), [v(1, W3), v(2, S50)], [], [])
    assert (refused.value.served_level, refused.value.levels) == ("w4g128", ("s50", "w3g64"))
