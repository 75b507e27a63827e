"""A model's answers to questions, kept as chats that a prompt can be learned from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.api import InvalidRequest
from engine.request import RequestDone, RequestFailed, SamplingParams, Timings, TokenEvent
from lab.answers import answer, questions
from lab.data.documents import DataError, Document, Turn, read
from lab.errors import RunError
from lab.progress import silent
from lab.run import open_run

LOCAL = ("--dtype", "float32", "--device", "cpu", "--kv-memory", "16MiB")
ASKED = [f"Question {number}?" for number in range(40)]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{at}", "text": text}) + "\n" for at, text in enumerate(ASKED)))
    return path


def test_answers_that_ended_become_chats(cli, model, file, tmp_path):
    out = tmp_path / "chats.jsonl"
    command = ("answers", model, "--data", file, "--out", out, "--max-tokens", 80, "--temperature", 1, *LOCAL)
    told = json.loads(cli(*command, "--json").stdout)
    chats = [json.loads(line) for line in out.read_text().splitlines()]
    assert told["asked"] == 40
    assert 0 < told["answered"] == len(chats) < 40
    assert all([turn["role"] for turn in chat["messages"]] == ["user", "assistant"] for chat in chats)
    assert {chat["messages"][0]["content"] for chat in chats} < set(ASKED)
    assert len(read(out)) == len(chats)  # what `learn` takes

    first = out.read_bytes()
    out.unlink()
    assert cli(*command).exit_code == 0
    assert out.read_bytes() == first
    other = cli(*command, "--seed", 1)
    assert other.exit_code == 1
    assert "another config" in other.stderr


def test_a_chat_is_asked_up_to_its_users_last_message():
    """The last question of a chat that ends with one was dropped, and the one before answered again."""
    turns = [Turn("user", "A?"), Turn("assistant", "a"), Turn("user", "B?"), Turn("assistant", "b")]
    for length, asked in ((1, ["A?"]), (2, ["A?"]), (3, ["A?", "a", "B?"]), (4, ["A?", "a", "B?"])):
        (found,) = questions([Document("1", turns=tuple(turns[:length]))], None, 0)
        assert [message["content"] for message in found.messages] == asked
    with pytest.raises(DataError, match="asks nothing"):
        questions([Document("1", turns=(Turn("assistant", "a"),))], None, 0)


def test_a_seed_says_which_questions_are_taken(file):
    documents = read(file)
    taken = [[each.id for each in questions(documents, 5, seed)] for seed in (0, 0, 1)]
    assert taken[0] == taken[1] != taken[2]
    assert len(set(taken[0])) == 5


def test_a_chat_is_asked_up_to_its_last_answer_and_a_system_speaks_first(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who are you?"), ("assistant", "Nobody.")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (asked,) = questions(read(path), None, 0, system="Be brief.")
    assert [message["content"] for message in asked.messages] == ["Be brief.", "Hi", "Hello.", "Who are you?"]


def test_nothing_that_ended_is_an_error_that_names_the_option(cli, model, file, tmp_path):
    out = tmp_path / "chats.jsonl"
    told = cli("answers", model, "--data", file, "--take", 2, "--out", out, "--max-tokens", 1, *LOCAL)
    assert told.exit_code == 1
    assert "--max-tokens" in told.stderr
    assert not out.exists()


def test_what_asks_nothing_is_an_error_that_names_the_place(cli, model, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"text": "Who?"}\n{"text": "  "}\n')
    told = cli("answers", model, "--data", path, "--out", tmp_path / "chats.jsonl", *LOCAL)
    assert told.exit_code == 1
    assert "--data: questions.jsonl:2 asks nothing" in told.stderr


@dataclass
class Engine:
    """Answers at once; breaks at the question of this number, and finds one too long."""

    breaks: int = -1
    long: Collection[int] = ()
    asked: list[int] = field(default_factory=list)
    tokenizer = SimpleNamespace(encode_chat=lambda messages: [1])

    def submit(self, request, sink) -> None:
        at = int(request.request_id.split()[1])
        if at in self.long:
            raise InvalidRequest("prompt", "too long")
        if at == self.breaks:
            return sink([RequestFailed("engine_error", "out of order")])
        self.asked.append(at)
        sink([TokenEvent(0, f"answer {at}", (1,)), TokenEvent(0, "", (2,), finish_reason="stop")])
        return sink([RequestDone(1, 0, 2, 0, Timings(0.0, 0.0, 0.0))])


def test_a_run_that_broke_off_asks_only_what_is_left(tmp_path):
    asked = questions([Document(f"q{at}", text=f"{at}?") for at in range(200)], None, 0)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    first, second = Engine(breaks=150), Engine(long={180})
    with open_run(tmp_path / "run", {"a": 1}) as run, pytest.raises(RunError, match="out of order"):
        answer(asked, cast(Any, first), params, run, silent)
    with open_run(tmp_path / "run", {"a": 1}) as run:
        answers = answer(asked, cast(Any, second), params, run, silent)
        assert run.figures == {"asked": 200, "answered": 199, "left_out": 1}
    assert answers == {str(at): f"answer {at}" for at in range(200) if at != 180}
    assert len(first.asked) + len(second.asked) <= 199 + 32 + 64
    assert min(second.asked) > 100


def test_many_that_are_too_long_do_not_end_the_asking(tmp_path):
    asked = questions([Document(f"q{at}", text=f"{at}?") for at in range(100)], None, 0)
    with open_run(tmp_path / "run", {"a": 1}) as run:
        answers = answer(asked, cast(Any, Engine(long=range(90))), SamplingParams(), run, silent)
    assert answers == {str(at): f"answer {at}" for at in range(90, 100)}


def test_a_model_without_a_template_cannot_be_asked(cli, model, file, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (plain / name).unlink(missing_ok=True)
    told = cli("answers", plain, "--data", file, "--out", tmp_path / "chats.jsonl", *LOCAL)
    assert (told.exit_code, "cannot be asked" in told.stderr) == (1, True), told.stderr
