"""uvicorn's HTTP/1.1 with bounds for the head of a request: uvicorn itself waits for ever, and for any length.

Knows no bodies.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 32 * 1024


class BoundedProtocol(HttpToolsProtocol):
    """A client that has sent no whole head `header_seconds` after it connected, or was free to begin, is cut off."""

    header_seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None
    _behind_head = False  # between a whole head and the end of its body
    _waited_for = 0  # bytes of a head that is not whole yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if not self._behind_head:
            self._waited_for += len(data)
            if self._deadline is None and not self._answering():
                self._await_head()
        super().data_received(data)
        if self._waited_for > MAX_HEADER_BYTES and not self.transport.is_closing():
            if self._answering():
                self._cut_off()  # another answer would stand in the midst of that one
            else:
                self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        self._cancel()
        self._behind_head, self._waited_for = True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._behind_head = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(self.header_seconds, self._cut_off)

    def _cut_off(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
