"""Prefixes on disk: answers with a restored one equal computed ones to the last bit, whatever becomes of the files."""

import logging
import os
import threading

import numpy as np
import pytest
import torch
from support import tiny
from support.checkpoints import model, save
from support.drive import ask

from engine.engine import LocalEngine
from engine.kept import KeptPrefixes
from engine.options import EngineOptions
from engine.served import ServedModel
from llama import native
from llama.config import LlamaConfig
from llama.load import load

TEXT = list(b"The quick brown fox")
KEY = b"k" * 32
WARNINGS = "promptstitch.engine"


@pytest.fixture
def prompts(reference):
    """Of both kinds, some of whole pages (of 4) and some not."""
    config = LlamaConfig.from_hf(reference.config.to_dict())
    return [tiny.rows(9, 64, seed=1), tiny.rows(8, 64, seed=2), tiny.kv(7, config), tiny.kv(4, config, seed=3)]


def told(engine, prompt, **fields):
    """Tokens and every logprob, not rounded."""
    answer = ask(engine, TEXT, prompt, max_tokens=8, logprobs=3, prompt_logprobs=1, **fields).wait()
    return answer.tokens, answer.logprobs, answer.scored


def restored(engine):
    stats = engine.stats()
    return stats.soft_prefix_restored, stats.soft_prefix_misses


def content(seed: int, size: int = 1000):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def kept(folder, budget: int = 1 << 20, *, identity: bytes = b"", **files) -> KeptPrefixes:
    """With these files written: `a=content(1)`."""
    made = KeptPrefixes(folder, budget, identity)
    for name, held in files.items():
        made.keep(name.encode(), held)
    made.close()
    return KeptPrefixes(folder, budget, identity)


# -- what an engine answers ------------------------------------------------------------------------------------------


def test_after_a_restart_restored_prefixes_give_the_same_bits(make_engine, prompts, tmp_path):
    plain = make_engine()
    expected = [told(plain, prompt) for prompt in prompts]
    first = make_engine(kept_folder=tmp_path / "kv")
    assert [told(first, prompt) for prompt in prompts] == expected
    assert restored(first) == (0, 4)
    first.close()
    second = make_engine(kept_folder=tmp_path / "kv")
    assert [told(second, prompt) for prompt in prompts] == expected
    assert restored(second) == (4, 4)
    assert restored(plain) == (0, 4)


def test_evicted_prefixes_come_back(make_engine, tmp_path):
    engine = make_engine(kept_folder=tmp_path, kv_bytes=64 * 2 * 2 * 4 * 2 * 16 * 4)  # 64 pages of 4
    prompts = [tiny.rows(40, 64, seed=i) for i in range(9)]
    expected = [told(engine, prompt) for prompt in prompts]
    engine._kept.close()  # all is written; and nothing more is
    assert [told(engine, prompt) for prompt in prompts] == expected
    assert restored(engine) == (9, 18)


def test_a_namespace_and_other_pages_restore_nothing(make_engine, tmp_path):
    prompt = tiny.rows(9, 64)
    engine = make_engine(kept_folder=tmp_path)
    told(engine, prompt)
    told(engine, prompt, namespace="other")
    engine.close()
    assert restored(engine) == (0, 2)
    wider = make_engine(kept_folder=tmp_path, page_size=8)
    told(wider, prompt)
    assert restored(wider) == (0, 1)


def test_a_damaged_file_is_computed_anew_and_replaced(make_engine, tmp_path, caplog):
    prompt = tiny.rows(9, 64)
    first = make_engine(kept_folder=tmp_path)
    expected = told(first, prompt)
    first.close()
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    path.write_bytes(sound[:100] + bytes([sound[100] ^ 1]) + sound[101:])
    second = make_engine(kept_folder=tmp_path)
    with caplog.at_level(logging.WARNING, WARNINGS):
        assert told(second, prompt) == expected
    second.close()
    assert restored(second) == (0, 1)
    assert [path.name in record.message for record in caplog.records] == [True]
    assert path.read_bytes() == sound


def test_without_a_folder_to_write_to_everything_is_served_and_one_line_says_so(make_engine, tmp_path, caplog):
    (tmp_path / "file").touch()  # root, who may run this, can write to any folder
    engine = make_engine(kept_folder=tmp_path / "file")
    plain = make_engine()
    prompts = [tiny.rows(9, 64, seed=i) for i in range(3)]
    with caplog.at_level(logging.WARNING, WARNINGS):
        assert [told(engine, prompt) for prompt in prompts] == [told(plain, prompt) for prompt in prompts]
        engine.close()
    assert len(caplog.records) == 1
    assert "cannot be kept" in caplog.text


def test_two_servers_share_a_folder(make_engine, prompts, tmp_path):
    expected = [told(make_engine(), prompt) for prompt in prompts]
    engines = [make_engine(kept_folder=tmp_path) for _ in range(2)]
    answers = [ask(engine, TEXT, prompt, max_tokens=8) for engine in engines for prompt in prompts]
    assert [answer.wait().tokens for answer in answers] == [tokens for tokens, _, _ in expected] * 2
    for engine in engines:
        engine.close()
    third = make_engine(kept_folder=tmp_path)
    assert [told(third, prompt) for prompt in prompts] == expected
    assert restored(third) == (4, 4)


@pytest.mark.skipif(
    (ours := native.kernels()) is None or not ours.multiplies_integers,
    reason="this CPU multiplies no integers",
)
def test_products_in_integers_and_in_bf16_share_no_prefix(tmp_path):
    torch.set_num_threads(1)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    folder = save(tmp_path / "model", model(**shape))

    def answer(compute: str, where=None):
        loaded = load(folder, level="w4g64", dtype="bfloat16", device="cpu", compute=compute)
        served = ServedModel("tiny", tiny.BASE, "w4g64", "sha256:" + "c" * 64, 0, loaded.compute)
        options = EngineOptions(kv_bytes=1 << 22, kept_folder=where)
        engine = LocalEngine(loaded.model, tiny.ByteTokenizer(), served, options)
        try:
            return told(engine, tiny.rows(17, loaded.model.config.hidden_size)), restored(engine)
        finally:
            engine.close()

    for compute in ("int8", "bf16"):
        expected, _ = answer(compute)
        assert answer(compute, tmp_path / "kv") == (expected, (0, 1))
        assert answer(compute, tmp_path / "kv") == (expected, (1, 1))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:500], lambda b: b[:-1], lambda b: b + b"x", lambda b: bytes(len(b))],
    ids=["empty", "torn", "short", "long", "zeros"],
)
def test_bytes_that_are_not_the_ones_written_count_as_missing(tmp_path, damage):
    files = kept(tmp_path, a=content(1), b=content(2))
    assert files.find(b"a", 1000).tobytes() == content(1).tobytes()
    assert files.find(b"a", 999) is None
    path = files._path(b"a")
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    assert files.find(b"a", 1000) is None
    path.write_bytes(files._path(b"b").read_bytes())
    assert files.find(b"a", 1000) is None  # another's file
    path.write_bytes(sound)
    assert files.find(b"a", 1000) is not None


def test_another_identity_finds_nothing(tmp_path):
    kept(tmp_path, identity=b"one", a=content(1))
    assert kept(tmp_path, identity=b"two").find(b"a", 1000) is None
    assert kept(tmp_path, identity=b"one").find(b"a", 1000) is not None


def test_the_budget_removes_what_was_used_longest_ago_and_touches_no_other_file(tmp_path):
    (tmp_path / "notes.txt").write_bytes(bytes(10_000))
    files = kept(tmp_path, a=content(1), b=content(2), c=content(3))
    for age, name in enumerate((b"c", b"b", b"a")):
        os.utime(files._path(name), (1000 + age, 1000 + age))
    assert files.find(b"c", 1000) is not None  # used just now
    files = kept(tmp_path, 3100, d=content(4))
    assert [files.find(name, 1000) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert (tmp_path / "notes.txt").exists()


def test_a_full_disk_leaves_no_half_file_and_is_told_once_until_there_is_room(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.WARNING, WARNINGS):
        with monkeypatch.context() as patched:
            patched.setattr("engine.kept.os.replace", full)
            assert kept(tmp_path, a=content(1), b=content(2)).find(b"a", 1000) is None
        assert list(tmp_path.iterdir()) == []
        assert [record.message.count("No space left") for record in caplog.records] == [1]
        assert kept(tmp_path, a=content(1)).find(b"a", 1000) is not None


def test_a_slow_disk_is_not_waited_for(tmp_path, monkeypatch):
    go = threading.Event()
    shrink = KeptPrefixes._shrink
    monkeypatch.setattr(KeptPrefixes, "_shrink", lambda self: go.wait(10) and shrink(self))
    files = KeptPrefixes(tmp_path, 1 << 20, b"")
    for i in range(100):
        files.keep(bytes([i]), content(i))
    go.set()
    files.close()
    assert 16 <= len(list(tmp_path.iterdir())) <= 17


def test_many_writers_and_readers_of_one_file(tmp_path):
    """No reader ever sees anything but nothing or all of it."""
    held, wrong = content(1, 200_000), []

    def server() -> None:
        files = KeptPrefixes(tmp_path, 300_000, b"")
        for _ in range(30):
            files.keep(KEY, held)
            found = files.find(KEY, len(held))
            wrong.extend([found] if found is not None and not np.array_equal(found, held) else [])
        files.close()

    threads = [threading.Thread(target=server) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(list(tmp_path.iterdir())) <= 1  # none, where one writer made room while another put its own in place
