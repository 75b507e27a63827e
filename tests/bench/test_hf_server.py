"""The server around transformers and PEFT answers what they answer, in batches."""

import asyncio
import json

import httpx
import pytest
import torch
import typer
from safetensors.torch import save_file
from support.tiny import reference
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from typer.testing import CliRunner

from bench import lineup
from bench.hf_engines import continuous, generating, peft
from bench.hf_server import create_app, main

TEXTS = {"one": "t1 t2 t3 t4 t5", "two": "t7 t8 t9", "base": "t7 t8 t9"}
COUNTS = {"one": 6, "two": 4, "base": 5}
FOREVER = 60.0  # so that a batch starts when it is full, not before


@pytest.fixture
def model():
    return reference()


@pytest.fixture
def rows():
    noise = torch.Generator().manual_seed(1)
    return {name: torch.randn(n, 64, generator=noise) * 0.2 for name, n in (("one", 4), ("two", 7))}


@pytest.fixture
def tokenizer():
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(260)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    return words


@pytest.fixture
def expected(model, rows):
    """Alone, by `generate(inputs_embeds=…)`; and made so that each answer goes on past an end of text."""
    answers = {}
    for name, text in TEXTS.items():
        ids = torch.tensor([int(word[1:]) for word in text.split()])
        vectors = torch.cat([*([rows[name]] if name in rows else []), model.get_input_embeddings()(ids)])[None]
        mask = torch.ones(vectors.shape[:2], dtype=torch.long)
        count = {"max_new_tokens": COUNTS[name], "eos_token_id": -1, "do_sample": False}
        answers[name] = model.generate(inputs_embeds=vectors, attention_mask=mask, **count)[0].tolist()
    model.generation_config.eos_token_id = [tokens[1] for tokens in answers.values()]
    return {name: " ".join(f"t{token}" for token in tokens) for name, tokens in answers.items()}


@pytest.fixture
def batches(model, monkeypatch):
    """Sizes of the batches that `generate` is given."""
    sizes = []
    plain = model.generate

    def generate(**kwargs):
        sizes.append(len(kwargs["attention_mask"]))
        return plain(**kwargs)

    monkeypatch.setattr(model, "generate", generate)
    return sizes


async def ask(app, names, **changes):
    """The responses to requests that are there at the same time."""
    greedy = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    bodies = [
        {"model": n, "prompt": TEXTS.get(n, ""), "max_tokens": COUNTS.get(n, 1)} | greedy | changes for n in names
    ]
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))


def read(response):
    """(text of each event, usage, whether it ends as it must)."""
    *events, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    *pieces, final = map(json.loads, events)
    return [piece["choices"][0]["text"] for piece in pieces], final["usage"], last == "[DONE]"


def is_right(responses, names, expected):
    for name, response in zip(names, responses, strict=True):
        pieces, usage, done = read(response)
        assert "".join(pieces) == expected[name]
        assert len(pieces) == COUNTS[name]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(TEXTS[name].split()), COUNTS[name])
        assert done


async def test_two_prompts_and_none_in_one_batch(model, rows, tokenizer, expected, batches):
    app = create_app(tokenizer, "base", rows, generating(model, rows, 3, FOREVER))
    is_right(await ask(app, TEXTS), TEXTS, expected)
    assert batches == [3]


@pytest.mark.filterwarnings("ignore:Position ids are not supported", "ignore:.*is_gradient_checkpointing")
async def test_peft_batches_the_requests_of_one_adapter(model, rows, tokenizer, expected, batches):
    app = create_app(tokenizer, "base", rows, peft(model, rows, 4, FOREVER))
    names = ["one", "two", "base", "one"]
    is_right(await ask(app, names), names, expected)
    assert batches == [2, 1, 1]


async def test_continuous_batching_takes_soft_rows_as_ids(model, rows, tokenizer, expected):
    app = create_app(tokenizer, "base", rows, continuous(model, rows, 4))
    is_right(await ask(app, TEXTS), TEXTS, expected)


async def test_without_a_stream_the_answer_is_one_object(model, rows, tokenizer, expected):
    app = create_app(tokenizer, "base", rows, generating(model, rows, 1))
    (response,) = await ask(app, ["two"], stream=False)
    answer = response.json()
    assert answer["choices"][0]["text"] == expected["two"]
    assert answer["usage"]["completion_tokens"] == COUNTS["two"]


async def test_what_it_cannot_do_is_refused(model, rows, tokenizer):
    def app():
        return create_app(tokenizer, "base", rows, generating(model, rows, 1))

    assert [r.status_code for r in await ask(app(), ["three"])] == [404]
    assert [r.status_code for r in await ask(app(), ["one"], temperature=1)] == [400]
    assert [r.status_code for r in await ask(app(), ["one"], ignore_eos=False)] == [400]


@pytest.mark.parametrize("mode", ["generate", "continuous", "peft"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported", "ignore:.*is_gradient_checkpointing")
def test_the_command_of_the_lineup_serves_a_checkpoint(mode, model, rows, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    for name, soft in rows.items():
        save_file({"prompt_embeddings": soft}, tmp_path / f"{name}.safetensors")
    served = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: served.append((app, options)))
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    contestant = lineup.hugging_face(tmp_path / "model", tmp_path, 2, mode)
    command = [part.replace("{port}", "8123") for part in contestant.command[3:]]
    cli = typer.Typer()
    cli.command()(main)
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    ((app, options),) = served
    assert options["port"] == 8123
    for name, response in zip(("one", "base"), asyncio.run(ask(app, ["one", "base"])), strict=True):
        pieces, _, done = read(response)
        assert (len(pieces), done) == (COUNTS[name], True)
