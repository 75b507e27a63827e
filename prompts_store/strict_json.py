"""JSON from strangers, read so that no two parsers can disagree about it.

Refused: duplicate keys at any depth, NaN and Infinity (spelt or by overflow), integers of more than 20 digits, lone
surrogates, text before or after the object other than trailing spaces, deep nesting, anything but UTF-8.
Knows nothing of what the object means.
"""

from __future__ import annotations

import json
import math
from typing import Any

from prompts_store.errors import InvalidArtifact

MAX_DIGITS = 20
MAX_DEPTH = 16


def dump(value: object) -> str:
    """The canonical text of a value: keys sorted, no spaces. Raises TypeError, ValueError for what is no JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class _Refused(ValueError):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def load_object(data: bytes, *, field: str, code: str) -> dict[str, Any]:
    """The one JSON object in `data`. Raises InvalidArtifact: `duplicate_key`, `non_finite`, else `code`."""
    try:
        text = data.decode("utf-8").rstrip(" ")
        if not (text.startswith("{") and text.endswith("}")):
            raise _Refused(code, "it must be one JSON object, with nothing before it and only spaces after it")
        value: dict[str, Any] = json.loads(
            text, object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_constant
        )
        _walk(value, MAX_DEPTH)
    except _Refused as refused:
        raise InvalidArtifact(refused.code or code, f"{field}: {refused}", field) from None
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(code, f"{field} is not strict JSON: {error}", field) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused("duplicate_key", f"key {twice[:64]!a} stands twice in one object")
    return result


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Refused("", f"an integer has more than {MAX_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise _Refused("non_finite", f"number {digits[:32]} is not finite")
    return value


def _constant(name: str) -> float:
    raise _Refused("non_finite", f"{name} is no JSON number")


def _walk(value: object, depth: int) -> None:
    """Refuse what parses but cannot be written down again."""
    if depth < 0:
        raise _Refused("", f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            key.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
            _walk(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _walk(item, depth - 1)
    elif isinstance(value, str):
        value.encode()
