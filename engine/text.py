"""From tokens to text, one token at a time: whole characters only, and never a part of a stop string.

Knows bytes and strings; knows no tokenizer beyond the bytes of a token.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable


class TextStream:
    """Incremental detokeniser and stop-string matcher of one choice.

    `push` and `finish` return the text that may be shown now. What could still become a stop string, or is half a
    character, is held back. A stop string itself is never shown; `stopped` names it.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stops: tuple[str, ...] = ()) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = stops
        self._held = ""
        self.stopped: str | None = None

    def push(self, token: int, match: bool = True) -> str:
        """Take a token; `match=False` lets stop strings pass (before min_tokens)."""
        text = self._decoder.decode(self._token_bytes(token))
        if not self._stops:
            return text
        return self._release(self._held + text, match)

    def finish(self) -> str:
        """The rest, once no token follows: half a character ends as U+FFFD."""
        rest = self._decoder.decode(b"", final=True)
        if self.stopped is not None:
            return ""
        held, self._held = self._held + rest, ""
        return held

    def _release(self, text: str, match: bool) -> str:
        if not match:
            self._held = ""
            return text
        found = min(((text.find(stop), -len(stop), stop) for stop in self._stops if stop in text), default=None)
        if found is not None:
            at, _, self.stopped = found
            self._held = ""
            return text[:at]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
