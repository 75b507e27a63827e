"""Jobs are the same for the same seed, of the asked lengths, and every text is sent once."""

from collections import Counter

import pytest

from bench.workload import Workload, load_tokenizer


def test_lengths_are_in_tokens_and_prompts_take_turns(checkpoint):
    workload = Workload(requests=10, shortest=3, longest=9, prompts=("a", "b", None))
    jobs = workload.jobs(load_tokenizer(checkpoint))
    assert [job.prompt for job in jobs] == ["a", "b", None] * 3 + ["a"]
    assert all(3 <= job.text_tokens <= 9 for job in jobs)
    assert all(len(job.text.split()) == job.text_tokens for job in jobs)
    assert len({job.text_tokens for job in jobs}) > 1


def test_loads_of_one_round_are_of_other_words_and_the_same_lengths(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    one, other = (Workload(requests=8, seed=seed, sizes=0).jobs(tokenizer) for seed in (1, 2))
    assert [job.text_tokens for job in one] == [job.text_tokens for job in other]
    assert not {job.text for job in one} & {job.text for job in other}


def test_a_seed_is_a_workload(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    first, again, other = (Workload(requests=8, seed=seed).jobs(tokenizer) for seed in (1, 1, 2))
    assert first == again
    assert not {job.text for job in first} & {job.text for job in other}


def test_texts_are_cut_one_behind_the_other(checkpoint, tmp_path):
    words = ["water", "house", "road"] * 40
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(" ".join(words))
    jobs = Workload(requests=5, shortest=2, longest=4).jobs(load_tokenizer(checkpoint), corpus)
    assert " ".join(job.text for job in jobs).split() == words[: sum(job.text_tokens for job in jobs)]


def test_too_little_text_is_refused(checkpoint, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("water " * 100)
    with pytest.raises(ValueError, match="100 tokens"):
        Workload(requests=10, longest=10).jobs(load_tokenizer(checkpoint), corpus)


def test_prompts_by_rank_fall_off_as_zipf_says(checkpoint):
    names = tuple(f"p{i}" for i in range(20))
    jobs = Workload(requests=3000, shortest=1, longest=2, prompts=names, zipf=1.0).jobs(load_tokenizer(checkpoint))
    counts = Counter(job.prompt for job in jobs)
    assert counts["p0"] / counts["p1"] == pytest.approx(2.0, rel=0.2)
    assert counts["p0"] / counts["p9"] == pytest.approx(10.0, rel=0.4)
