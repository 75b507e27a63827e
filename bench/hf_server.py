"""transformers and PEFT as servers, which they are not: as much of OpenAI's completions as the load generator speaks.

    python -m bench.hf_server --checkpoint DIR --port 8000 --mode generate|continuous|peft --prompts DIR

bf16 on all cores. Knows HTTP and text; the batches are made in `bench.hf_engines`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractContextManager, asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import uvicorn
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM

from bench import hf_engines
from bench.hf_engines import Ask, Submit
from bench.workload import load_tokenizer


class Mode(StrEnum):
    generate = "generate"
    continuous = "continuous"
    peft = "peft"


ENGINES = {Mode.generate: hf_engines.generating, Mode.continuous: hf_engines.continuous, Mode.peft: hf_engines.peft}


def create_app(
    tokenizer: Tokenizer, base: str, prompts: Collection[str], engine: AbstractContextManager[Submit]
) -> Starlette:
    """The bare model is `base`, each prompt a model of its own name; every answer is greedy and of `max_tokens`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with engine as app.state.submit:
            yield

    async def complete(request: Request) -> Response:
        body = await request.json()
        name = body["model"]
        if name != base and name not in prompts:
            return JSONResponse({"error": {"message": f"no model {name}"}}, 404)
        if body.get("temperature") != 0 or body.get("ignore_eos") is not True:
            return JSONResponse({"error": {"message": "temperature 0 and ignore_eos are all it does"}}, 400)
        ids, count = tokenizer.encode(body["prompt"]).ids, body["max_tokens"]
        loop, made = asyncio.get_running_loop(), asyncio.Queue[int | Exception]()

        def deliver(token: int | Exception) -> None:
            loop.call_soon_threadsafe(made.put_nowait, token)

        request.app.state.submit(Ask(None if name == base else name, ids, count, deliver))
        pieces = _texts(tokenizer, made, count)
        usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
        if body.get("stream"):
            with_usage = (body.get("stream_options") or {}).get("include_usage")
            return StreamingResponse(
                _events(name, pieces, usage if with_usage else None), media_type="text/event-stream"
            )
        return JSONResponse(_completion(name, "".join([piece async for piece in pieces])) | {"usage": usage})

    async def health(request: Request) -> Response:
        return JSONResponse({})

    routes = [Route("/health", health), Route("/v1/completions", complete, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan)


async def _texts(tokenizer: Tokenizer, made: asyncio.Queue[int | Exception], count: int) -> AsyncIterator[str]:
    """The text of every token as it comes, empty where a character is not whole yet. Raises what the engine raised."""
    decoder = DecodeStream(skip_special_tokens=False)
    for _ in range(count):
        token = await made.get()
        if isinstance(token, Exception):
            raise token
        yield decoder.step(tokenizer, token) or ""


async def _events(name: str, pieces: AsyncIterator[str], usage: dict[str, int] | None) -> AsyncIterator[str]:
    async for piece in pieces:
        yield f"data: {json.dumps(_completion(name, piece))}\n\n"
    if usage:
        yield f"data: {json.dumps({'object': 'text_completion', 'model': name, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def _completion(name: str, text: str) -> dict[str, Any]:
    return {"object": "text_completion", "model": name, "choices": [{"index": 0, "text": text}]}


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder in the Hub's layout.")],
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")],
    prompts: Annotated[Path, typer.Option(help="Folder of {name}.safetensors with `prompt_embeddings` (N, H).")],
    mode: Mode = Mode.generate,
    model: Annotated[str, typer.Option(help="Name of the bare model.")] = "base",
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 32,
) -> None:
    """Serve until told to stop."""
    torch.set_num_threads(os.cpu_count() or 1)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    rows = {file.stem: load_file(file)["prompt_embeddings"] for file in sorted(prompts.glob("*.safetensors"))}
    app = create_app(load_tokenizer(checkpoint), model, rows, ENGINES[mode](loaded, rows, batch))
    uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
