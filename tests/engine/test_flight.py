"""Steps that begin before the tokens of the one before are read: what they say, and what they leave behind."""

from __future__ import annotations

import pytest
from support import tiny
from support.drive import ask, until

from engine import engine as module
from engine.engine import LocalEngine
from engine.request import RequestFailed
from engine.runner import Runner

pytestmark = pytest.mark.parametrize("make_engine", ["replayed"], indirect=True)

TEXT = list(b"The quick brown fox jumps over the lazy dog.")


@pytest.fixture
def followed(monkeypatch) -> list[int]:
    """How many rows each step had that was launched so."""
    calls: list[int] = []
    follow = Runner.follow

    def counted(self, batch, tokens, rows):
        calls.append(len(rows))
        return follow(self, batch, tokens, rows)

    monkeypatch.setattr(Runner, "follow", counted)
    return calls


def asked(engine, hidden: int):
    """Requests of all sorts that end at different times, together: their answers."""
    prompts = [None, tiny.rows(5, hidden), None, tiny.rows(9, hidden)]
    free = ask(engine, TEXT, max_tokens=9).wait().tokens[0]
    answers = [
        ask(
            engine,
            TEXT[: 3 + 4 * i],
            prompts[i % 4],
            max_tokens=5 + 3 * i,
            temperature=(0.0, 1.0)[i % 2],
            seed=i,
            n=1 + i % 2,
        )
        for i in range(8)
    ]
    answers.append(ask(engine, TEXT, max_tokens=40, stop_token_ids=(free[6],)))
    answers.append(ask(engine, TEXT, max_tokens=4, temperature=1.0, seed=3, top_p=0.8))  # needs the host: all wait
    return [(each.wait().tokens, each.text, each.finish, each.stop_reason) for each in answers]


def test_an_engine_that_runs_ahead_says_what_one_says_that_does_not(reference, make_engine, monkeypatch, followed):
    hidden = reference.config.hidden_size
    ahead = asked(make_engine(max_batch_tokens=512), hidden)
    assert max(followed) > 1
    steps = len(followed)
    monkeypatch.setattr(module, "decode_graphs", lambda *_: None)
    assert asked(make_engine(max_batch_tokens=512), hidden) == ahead
    assert len(followed) == steps


def test_the_next_step_is_launched_before_a_token_is_told(make_engine, monkeypatch):
    order: list[str] = []
    follow, tell = Runner.follow, LocalEngine._tell
    monkeypatch.setattr(Runner, "follow", lambda *a: order.append("launch") or follow(*a))
    monkeypatch.setattr(LocalEngine, "_tell", lambda *a: order.append("tell") or tell(*a))
    ask(make_engine(), TEXT, max_tokens=4).wait()
    assert order == ["launch", "tell"] * 3 + ["tell"]  # no step for a fifth token


def test_pages_of_a_choice_that_ended_meanwhile_are_free(make_engine, followed):
    """It ends where a step for its next token is under way, which needs a page of its own."""
    engine = make_engine(page_size=4)
    free = ask(engine, TEXT[:5], max_tokens=12).wait().tokens[0]
    stopped = ask(engine, TEXT[:5], max_tokens=40, stop_token_ids=(free[2],))  # the 8th position ends a page
    beside = ask(engine, TEXT[5:], max_tokens=30)
    assert stopped.wait().tokens[0] == free[: free.index(free[2]) + 1]
    assert len(beside.wait().tokens[0]) == 30
    assert followed
    until(lambda: engine.stats().pages_used == 0)


def test_ahead_only_while_pages_last(make_engine, followed):
    """Three that do not fit together: the newest gives its pages back, as without."""
    engine = make_engine(page_size=4, kv_bytes=40 * 1024)
    alone = [ask(engine, TEXT[i : i + 9], max_tokens=30).wait().tokens for i in range(3)]
    together = [ask(engine, TEXT[i : i + 9], max_tokens=30) for i in range(3)]
    assert [each.wait().tokens for each in together] == alone
    assert engine.stats().preemptions > 0


def test_a_step_under_way_that_fails_fails_its_own_and_nothing_else(make_engine, monkeypatch):
    engine = make_engine()
    follow = Runner.follow

    def broken(self, *given):
        monkeypatch.setattr(Runner, "follow", follow)
        raise RuntimeError("a kernel")

    monkeypatch.setattr(Runner, "follow", broken)
    failed = ask(engine, TEXT, max_tokens=8).wait().last
    assert isinstance(failed, RequestFailed)
    assert failed.code == "engine_error"
    assert len(ask(engine, TEXT, max_tokens=8).wait().tokens[0]) == 8
