"""Logprobs in the two shapes that OpenAI gives them. Knows token ids and their bytes; no probabilities of its own."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from engine.api import Tokenizer
from engine.request import TokenLogprob

LEAST = -9999.0  # JSON has no minus infinity; OpenAI writes this


class Offsets:
    """Where the tokens of a text begin, in characters. A character that is spread over tokens comes with the last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def next(self, token_id: int) -> int:
        """Of the token that follows those before."""
        at = self._at
        if token_id not in self._tokenizer.special_token_ids:  # these are no text
            self._at += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return at


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], offsets: Offsets) -> dict[str, Any]:
    """For completions. `offsets` stand behind the tokens of the choice that were told before these."""
    return {
        "tokens": [token_name(tokenizer, token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else _number(token.logprob) for token in tokens],
        "top_logprobs": [_alternatives(tokenizer, token) for token in tokens],
        "text_offset": [offsets.next(token.token_id) for token in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """For chat."""
    content = [
        {
            **_chat_token(tokenizer, token.token_id, token.logprob or 0.0),
            "top_logprobs": [_chat_token(tokenizer, other, logprob) for other, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; bytes that are no text of their own are spelt out, so that no two tokens share a name."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _alternatives(tokenizer: Tokenizer, token: TokenLogprob) -> dict[str, float] | None:
    """The best ones and the token itself, by name; None where nothing stands before it."""
    if token.logprob is None:
        return None
    named = {token_name(tokenizer, other): _number(logprob) for other, logprob in token.top}
    named.setdefault(token_name(tokenizer, token.token_id), _number(token.logprob))
    return named


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": _number(logprob), "bytes": list(raw)}


def _number(logprob: float) -> float:
    return max(logprob, LEAST)
