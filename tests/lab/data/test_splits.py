"""Parts that share no site and no 13 words, whoever deals them and whenever."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from lab.data.documents import DataError, Document
from lab.data.splits import SHARES, grams, part_of, record, split


def made(count=400, sites=250, words=40, seed=0, name=""):
    """Documents of random words, several to a site."""
    dice = random.Random(seed)
    return [
        Document(
            f"{name}{i}",
            f"site{dice.randrange(sites)}.example",
            " ".join(f"w{dice.randrange(10**6)}" for _ in range(words)),
        )
        for i in range(count)
    ]


def test_parts_share_no_site_and_no_run_of_13_words():
    documents = made()
    copied = documents[5].words.split()[3:30]
    documents += [Document(f"copy{i}", f"copy{i}.example", f"a b c {' '.join(copied)} d") for i in range(40)]
    splits = split(documents)
    for one, other in itertools.combinations(splits.parts.values(), 2):
        assert {d.domain for d in one}.isdisjoint(d.domain for d in other)
        seen = {gram for document in one for gram in grams(document.words)}
        assert seen.isdisjoint(gram for document in other for gram in grams(document.words))
    kept = [document for part in splits.parts.values() for document in part]
    assert len(kept) + sum(splits.dropped.values()) == len(documents)
    assert sum(splits.dropped.values()) > 20
    assert splits.dropped["report"] == 0  # what is reported on loses nothing


def test_shares_are_about_those_asked_for():
    splits = split(made(4000, 3000))
    for part, share in SHARES.items():
        assert len(splits.parts[part]) / 4000 == pytest.approx(share, abs=0.02)


def test_a_site_stays_where_it_is_when_others_come():
    documents = made()
    before = {d.id: part for part, each in split(documents).parts.items() for d in each}
    after = {d.id: part for part, each in split(documents[::-1] + made(seed=1, name="new")).parts.items() for d in each}
    assert all(after[document.id] == part for document, part in ((d, before[d.id]) for d in documents))
    assert part_of("example.com") == "report"  # written down: the rule never changes under stored manifests


def test_words_are_compared_whatever_their_case_and_signs():
    one = " ".join(f"w{i}" for i in range(13))
    assert list(grams(one)) == list(grams(one.upper().replace(" ", ",  ")))
    assert not list(grams(" ".join(one.split()[:12])))


def test_prompts_completions_and_chats_count_too():
    words = " ".join(f"w{i}" for i in range(20))
    task = Document("1", "1", " ".join(words.split()[:3]), " ".join(words.split()[3:]))
    assert set(grams(task.words)) & set(grams(words))


def test_a_manifest_is_written_once_and_then_held_against(tmp_path):
    splits, path = split(made()), tmp_path / "run" / "splits.json"
    record(splits, path)
    told = json.loads(path.read_text())
    assert told["parts"]["learn"]["documents"] == len(splits.parts["learn"])
    assert set(told["parts"]) == set(SHARES)
    record(split(made()), path)
    with pytest.raises(DataError, match="holds the splits of other data"):
        record(split(made(seed=1)), path)
    path.write_text("{")
    with pytest.raises(DataError, match="is no manifest of splits"):
        record(splits, path)


def test_too_few_sites():
    with pytest.raises(DataError, match="1 documents of 1 sites leave nothing for the part"):
        split(made(1))
