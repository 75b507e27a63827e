"""What a streamed token costs between the engine's thread and the client's socket, in things that can be counted.

Over the parts that carry a stream, in the test's own thread: sink, bridge, generation, encoder, event.
"""

import asyncio
from contextlib import ExitStack, closing
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from sqlalchemy import Engine as Connections
from sqlalchemy import event
from support.counting import count, kept
from support.fake_engine import FakeEngine
from support.in_process import in_process
from support.served import prompt_bytes, stock

from engine.request import GenerationRequest, TokenEvent
from prompts_store.store import PromptStore
from server import keyring
from server.app import create_app
from server.bridge import Bridge
from server.exchange import Exchange
from server.generation import Generation
from server.inference import Begun
from server.metrics import Metrics
from server.routes import chat, completions, generate
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.schemas.generate import GenerateBody
from server.settings import Settings
from server.sse import EventStream

MESSAGES = [{"role": "user", "content": "a"}]
ENCODERS = {
    "generate": lambda begun: generate.Lines(generate.Shape(GenerateBody(text="a"), begun)),
    "completions": lambda begun: completions.Chunks(completions.Shape(CompletionBody(model="m", prompt="a"), begun)),
    "chat": lambda begun: chat.Chunks(chat.Shape(ChatBody(model="m", messages=MESSAGES), begun)),
}
AIR = 1.02
CALLS = {"generate": 21, "completions": 24, "chat": 24}  # of our functions, a client; beside them one wake-up
BUILTINS = {"generate": 12, "completions": 12, "chat": 11}  # called by them
BYTES = {"generate": 71, "completions": 220, "chat": 224}  # of an event, five of them text


class Streams:
    """Clients of one route, on a loop that turns when `token` is called: then each is told one."""

    def __init__(self, route: str, clients: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.sinks, self.sent, self.timers = [], [], 0
        fake = FakeEngine()
        fake.close()
        told = SimpleNamespace(
            submit=lambda request, sink: self.sinks.append(sink),
            cancel=lambda request_id: None,
            info=fake.info,
            tokenizer=fake.tokenizer,
        )
        bridge, metrics = Bridge(self.loop), Metrics()
        self.tasks = []
        for number in range(clients):
            generation = Generation(
                told,
                [GenerationRequest(str(number), (1,))],
                place=ExitStack(),
                bridge=bridge,
                metrics=metrics,
                model_name="m",
                exchange=Exchange("x"),
            )
            generation.start(streaming=True)
            encoder = ENCODERS[route](Begun(generation, told, None, [(1,)], "name"))
            stream = EventStream(generation, encoder, {})
            self.tasks.append(self.loop.create_task(stream({"type": "http"}, self.receive, self.send)))
        self.loop.run_until_complete(asyncio.sleep(0))
        self.token()  # chat says more beside the first

    async def receive(self):
        await asyncio.Event().wait()

    async def send(self, message):
        if message["type"] == "http.response.body":
            self.sent.append(message["body"])

    def token(self) -> None:
        self.sent.clear()
        for sink in self.sinks:
            sink([TokenEvent(0, "token", (97,))])
        self.loop.run_until_complete(self.all_sent())

    async def all_sent(self) -> None:
        while len(self.sent) < len(self.sinks):
            await asyncio.sleep(0)

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*self.tasks, return_exceptions=True))
        self.loop.close()


@pytest.mark.parametrize("clients", [1, 32])
@pytest.mark.parametrize("route", ENCODERS)
def test_a_streamed_token(route, clients):
    with closing(Streams(route, clients)) as streams:
        counts = count(streams.token, 8)
        assert counts.calls <= (1 + clients * CALLS[route]) * AIR
        assert counts.builtins <= clients * BUILTINS[route] * AIR
        assert {len(data) for data in streams.sent} == {BYTES[route]}


def test_a_token_sets_two_timers():
    """One while the next is waited for, one while it is written."""
    with closing(Streams("generate", 4)) as streams, patch.object(streams.loop, "call_at") as set_timer:
        count(streams.token, 8)
        assert set_timer.call_count <= 2 * 4 * 2 * 8


def test_nothing_is_kept_of_a_token_sent():
    with closing(Streams("chat", 4)) as streams:
        kept(streams.token, 50)
        assert kept(streams.token, 100) < 1


async def test_no_token_asks_the_database(tmp_path, monkeypatch):
    """Nor does a request for a prompt that is known."""
    monkeypatch.setattr(keyring, "REMEMBERED_SECONDS", float("inf"))
    statements = []

    def note(connection, cursor, statement, *_):
        statements.append(statement)

    with PromptStore.open(tmp_path) as store:
        stock(store)
        app = create_app(Settings(store=str(tmp_path), port=0), lambda _: FakeEngine(), store)
        async with in_process(app) as client:

            async def ask(tokens: int) -> int:
                statements.clear()
                body = {"text": "a", "task": "haiku", "max_tokens": tokens, "stream": True}
                answer = await client.post("/v1/generate", json=body)
                assert answer.text.count("data: ") > tokens
                return len(statements)

            async def upload(seed: int, task: str) -> int:
                statements.clear()
                headers = {"Content-Type": "application/octet-stream"}
                answer = await client.post(f"/v1/prompts/{task}/versions", content=prompt_bytes(seed), headers=headers)
                assert answer.status_code == 201
                return len(statements)

            event.listen(Connections, "before_cursor_execute", note)
            try:
                assert await ask(1) <= 7
                assert [await ask(1), await ask(100)] == [0, 0]
                assert await upload(11, "other") <= 7
                assert await ask(1) == 0  # the change is another task's
                await upload(12, "haiku")
                assert await ask(1) > 0
            finally:
                event.remove(Connections, "before_cursor_execute", note)
