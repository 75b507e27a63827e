"""A tiny OpenAI-speaking server with known answers and known faults: `python fake_server.py PORT` or `create_app()`.

The model's name picks the fault; uploads are remembered, and a model that was never uploaded is 404 but for `base`.
"""

import asyncio
import json
import os
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FAULTS = frozenset({"busy", "broken", "cut", "short", "garbled"})


def create_app() -> Starlette:
    prompts: dict[str, bytes] = {}
    seen: list[dict] = []
    uploads: list[int] = []

    async def upload(request: Request) -> Response:
        if "level" not in request.query_params:
            return JSONResponse({"error": {"message": "no level"}}, 422)
        prompts[request.path_params["task"]] = await request.body()
        uploads.append(hash(prompts[request.path_params["task"]]))
        return JSONResponse({"version": 1}, 201)

    async def complete(request: Request) -> Response:
        body = await request.json()
        seen.append({**body, "client": request.client.port})
        model = body["model"]
        if model == "busy":
            return JSONResponse({"error": {"message": "queue full"}}, 429)
        if model not in {"base", *FAULTS, *prompts}:
            return JSONResponse({"error": {"message": f"unknown {model}"}}, 404)
        tokens = body["max_tokens"] - (model == "short")
        usage = {"completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 5}}
        if not body.get("stream"):
            return JSONResponse({"choices": [{"text": os.environ.get("SAYS", "x") * tokens}], "usage": usage})
        return StreamingResponse(events(model, tokens, usage), media_type="text/event-stream")

    async def events(model, tokens, usage):
        yield ": a comment that counts for nothing\r\n\r\n"
        await asyncio.sleep(0.2 if model in prompts else 0.02)  # stitched ones answer later
        for i in range(tokens):
            if model == "broken" and i == 1:
                yield 'data: {"error": {"message": "the step failed"}}\r\n\r\n'
                break
            if model == "garbled" and i == 1:
                yield "data: {nonsense\r\n\r\n"
            if model == "cut" and i == 1:
                return
            line = json.dumps({"choices": [{"text": "x"}]})
            yield f"data: {line[:7]}"  # events need not come in one piece
            await asyncio.sleep(0.002)
            yield f"{line[7:]}\r\n\r\n"
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\r\n\r\ndata: [DONE]\r\n\r\n"

    async def healthy(request: Request) -> Response:
        return JSONResponse({})

    async def log_of_uploads(request: Request) -> Response:
        return JSONResponse(uploads)

    async def log(request: Request) -> Response:
        return JSONResponse(seen)

    routes = [
        Route("/health", healthy),
        Route("/seen", log),
        Route("/uploads", log_of_uploads),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/prompts/{task}/versions", upload, methods=["POST"]),
    ]
    return Starlette(routes=routes)


if __name__ == "__main__":
    uvicorn.run(create_app(), port=int(sys.argv[1]), log_level="warning")
