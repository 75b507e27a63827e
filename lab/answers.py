"""A model's own answers to questions, as chats to learn a prompt from: what it says itself is what compression should
not change.

Many at once through an engine, so as fast as they are served. Knows an engine and documents; knows no model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from engine.api import Engine, EngineInfo, InvalidRequest
from engine.request import Event, GenerationRequest, RequestDone, RequestFailed, SamplingParams, TokenEvent
from lab.data.documents import DataError, Document, digest
from lab.disk import write_bytes
from lab.errors import RunError
from lab.progress import Report
from lab.run import Run, State

AT_ONCE = 64
SAVED_EVERY = 32  # answers

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """The messages before the answer; `id` is the document's."""

    id: str
    messages: tuple[Message, ...]


@dataclass(slots=True)
class _Answer:
    asked: str  # the question's id
    text: list[str] = field(default_factory=list)
    ended: bool = False  # by its own end, not by the most tokens it was given


def questions(documents: Sequence[Document], take: int | None, seed: int, system: str | None = None) -> list[Question]:
    """What is asked in them, `take` of them at random: a text, a `prompt`, or a chat up to its user's last message.

    Raises DataError where nothing is asked.
    """
    chosen = list(documents)
    random.Random(seed).shuffle(chosen)
    return [_question(document, system) for document in chosen[:take]]


def settings(asked: Sequence[Question], params: SamplingParams, info: EngineInfo) -> dict[str, Any]:
    """All that the answers depend on, for a run's config."""
    told = {name: getattr(params, name) for name in ("max_tokens", "temperature", "top_p", "repetition_penalty")}
    texts = [Document(each.id, text=json.dumps(each.messages)) for each in asked]
    model = {name: getattr(info, name) for name in ("base", "level", "weights", "dtype", "compute")}
    return {**model, "questions": digest(texts), "sampling": told}


def answer(
    asked: Sequence[Question], engine: Engine, params: SamplingParams, run: Run, report: Report
) -> dict[str, str]:
    """Whole answers by the question's place in `asked`; left out is what did not end, said nothing, or was too long to
    ask. What a run that broke off has answered is not asked again. `params.seed` counts up with the questions.
    Raises RunError.
    """
    state = run.load()
    told: dict[str, str | None] = dict(state.values["answers"]) if state else {}
    left = [(at, each) for at, each in enumerate(asked) if str(at) not in told]
    for done in _answered(left, engine, params):
        told |= done
        report("answer", len(told), len(asked))
        if len(told) % SAVED_EVERY == 0:
            run.save(State({}, {"answers": told}))
    run.save(State({}, {"answers": told}))
    whole = {at: text for at, text in told.items() if text is not None}
    run.tell(asked=len(asked), answered=len(whole), left_out=len(asked) - len(whole))
    return whole


def write(asked: Sequence[Question], answers: Mapping[str, str], out: Path) -> None:
    """Chats as JSON lines, in the order of the questions. Raises RunError."""
    if not answers:
        raise RunError("no answer came to an end; raise --max-tokens, or ask other questions")
    lines = [
        {"id": each.id, "messages": [*each.messages, {"role": "assistant", "content": answers[str(at)]}]}
        for at, each in enumerate(asked)
        if str(at) in answers
    ]
    write_bytes(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def _question(document: Document, system: str | None) -> Question:
    if document.turns:
        last = max((at for at, turn in enumerate(document.turns) if turn.role == "user"), default=-1)
        messages = [{"role": turn.role, "content": turn.content} for turn in document.turns[: last + 1]]
    else:
        messages = [{"role": "user", "content": document.text or ""}]
    if not any(message["content"].strip() for message in messages):
        raise DataError(f"{document.id} asks nothing")
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Question(document.id, tuple(messages))


def _answered(
    left: Sequence[tuple[int, Question]], engine: Engine, params: SamplingParams
) -> Iterator[dict[str, str | None]]:
    """{place: answer or None} of one question after another, as they end."""
    told: SimpleQueue[tuple[int, Sequence[Event]]] = SimpleQueue()
    waiting, running = iter(left), dict[int, _Answer]()
    while True:
        while len(running) < AT_ONCE and (following := next(waiting, None)):
            at, each = following
            try:
                engine.submit(_request(at, each, engine, params), partial(_put, told, at))
                running[at] = _Answer(each.id)
            except InvalidRequest:  # longer than the context
                yield {str(at): None}
        if not running:
            return
        at, events = told.get()
        for event in events:
            if isinstance(event, RequestFailed):
                raise RunError(f"question {running[at].asked} was not answered: {event.message}")
            if isinstance(event, TokenEvent):
                running[at].text.append(event.text)
                running[at].ended |= event.finish_reason == "stop"
            elif isinstance(event, RequestDone):
                said = running.pop(at)
                text = "".join(said.text).strip()
                yield {str(at): text if said.ended and text else None}


def _request(at: int, question: Question, engine: Engine, params: SamplingParams) -> GenerationRequest:
    seeded = replace(params, seed=None if params.seed is None else params.seed + at)
    try:
        ids = engine.tokenizer.encode_chat(question.messages)
    except ValueError as error:  # no template, or one that takes no system's message
        raise RunError(f"question {question.id} cannot be asked: {error}") from error
    return GenerationRequest(f"question {at}", tuple(ids), None, seeded)


def _put(told: SimpleQueue[tuple[int, Sequence[Event]]], at: int, events: Sequence[Event]) -> None:
    told.put((at, events))
