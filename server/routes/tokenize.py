"""`POST /v1/tokenize` as vLLM has it: the ids that a request would have."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from engine.api import Tokenizer
from prompts_store.errors import NotFound
from prompts_store.prompt import Bos
from server.bodies import JsonBody
from server.inference import Ids, Inputs, query_of_model, tokenise, unknown_model
from server.openapi import Success, operation
from server.render import Json
from server.routes.chat import chat_inputs
from server.schemas.models import TokenizeAnswer, TokenizeBody
from server.state import Services, services_of

router = APIRouter(tags=["inference"])


@router.post(
    "/v1/tokenize",
    **operation("infer", {200: Success("the ids", TokenizeAnswer)}, 404, 408, 409, 410, 413, 415, 503),
)
async def tokenize(request: Request, body: Annotated[TokenizeBody, Depends(JsonBody(TokenizeBody))]) -> Response:
    """Text or messages to token ids, soft ones not counted."""
    services = services_of(request)
    engine = services.host.engine
    bos: Bos = "none" if body.add_special_tokens is False else await _layout(services, body.model)
    [ids] = await tokenise(engine.tokenizer, _inputs(body), bos)
    return Json({"count": len(ids), "max_model_len": engine.info.max_model_len, "tokens": list(ids)})


async def _layout(services: Services, model: str | None) -> Bos:
    """Where the model's prompt wants a BOS. Raises ApiError 404 for a model that is not served."""
    query = None if model is None else query_of_model(services, model, None)
    if query is None:
        return "tokenizer"
    try:
        resolved = await services.finder.resolve(query, services.host.engine.info)
    except NotFound as error:
        raise unknown_model(services, model or "", error) from error
    return resolved.version.bos if resolved.version else "tokenizer"


def _inputs(body: TokenizeBody) -> Inputs:
    if body.messages is not None:
        return chat_inputs(body.messages)
    text = body.prompt or ""

    def encode(tokenizer: Tokenizer, bos: Bos) -> list[Ids]:
        return [tokenizer.encode(text, bos)]

    return Inputs(encode, len(text), "/prompt")
