"""Parts that share no site and no 13 words, whoever deals them and whenever."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest

from lab.data.documents import DataError, Document, Turn
from lab.data.splits import SHARES, apart, grams, part_of, record, split


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


def test_other_data_leave_out_what_was_learned_from_and_not_what_is_written_in_its_form():
    form = " ".join(f"please{i}" for i in range(20))
    learned = [replace(document, text=f"{form} {document.text}") for document in made(40)]
    copied = " ".join(learned[5].words.split()[30:50])
    others = made(10, seed=1, name="other")
    near = [
        replace(others[0], text=f"{others[0].text} {copied}"),
        *(replace(document, text=f"{form} {document.text}") for document in others[1:]),
        learned[7],
    ]
    assert [document.id for document in apart(near, learned)] == [document.id for document in others[1:]]


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
    short = " ".join(one.split()[:12])
    assert len(list(grams(short))) == 1
    assert list(grams(short)) != list(grams(one))
    assert not list(grams(" ?! "))


def test_what_most_documents_begin_with_is_their_form_and_no_overlap():
    form = " ".join(f"please{i}" for i in range(20))
    alike = [replace(document, text=f"{form} {document.text}") for document in made()]
    splits = split(alike)
    assert sum(len(part) for part in splits.parts.values()) == len(alike)
    system = Turn("system", form)
    chats = [Document(str(i), turns=(system, Turn("user", f"a{i}"), Turn("assistant", f"b{i}"))) for i in range(8)]
    assert sum(len(part) for part in split(chats).parts.values()) == 8


def test_a_document_of_no_site_goes_by_its_words_wherever_it_stands():
    first = [Document(f"a.jsonl:{i}", text=f"Word{i}, two three.") for i in range(200)]
    again = [Document(f"b.jsonl:{i}", text=f"word{i} two THREE") for i in range(200)][::-1]
    before = {d.content: part for part, each in split(first).parts.items() for d in each}
    after = {d.content: part for part, each in split(again).parts.items() for d in each}
    assert before == after
    repeated = split(first[:20] + [Document(str(i), text="What is it? This.") for i in range(100)])
    assert sum(any(d.text.startswith("What") for d in part) for part in repeated.parts.values()) == 1


@pytest.mark.parametrize("count", [4, 5, 10, 20])
def test_few_documents_are_enough_for_every_part(count):
    for seed in range(20):
        assert all(split([Document(str(i), text=f"{seed} {i} it is") for i in range(count)]).parts.values())


def test_one_site_and_one_text_are_dealt_out_themselves():
    pages = [Document(str(i), "one.example", f"page {i} of it") for i in range(10)]
    assert all(split(pages).parts.values())
    paragraphs = "\r\n".join(" ".join(f"w{i}x{j}" for j in range(100)) for i in range(100))
    parts = split([Document("book.txt", text=paragraphs)]).parts
    assert all(parts.values())
    assert len("".join(d.text for part in parts.values() for d in part)) == len(paragraphs)
    line = " ".join(f"w{i}" for i in range(20_000))
    pieces = [each.text for part in split([Document("line.txt", text=line)]).parts.values() for each in part]
    assert sum(map(len, pieces)) == len(line)
    assert max(map(len, pieces)) < 2100
    with pytest.raises(DataError, match="leave nothing for the part"):
        split([Document("1", text="so short a text")])


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


def test_the_same_text_on_many_sites_is_in_one_part():
    """Six copies among twenty counted as the form that documents are written in, and were learned and reported."""
    words = " ".join(f"w{i}" for i in range(200))
    others = [Document(str(i), f"other{i}.org", " ".join(f"v{i}x{j}" for j in range(40))) for i in range(14)]
    copies = [Document(f"c{i}", f"copy{i}.org", words) for i in range(6)]
    splits = split([*others, *copies])
    holding = [part for part, found in splits.parts.items() if any(each.text == words for each in found)]
    assert len(holding) == 1
    assert sum(splits.dropped.values()) == sum(part_of(each.domain) not in holding for each in copies)


def test_the_manifest_counts_sites_as_they_are():
    pages = [Document(str(i), "one.example", f"page {i} of it") for i in range(10)]
    assert {told["domains"] for told in split(pages).manifest()["parts"].values()} == {1}
