"""uvicorn's HTTP/1.1 with bounds for the head of a request and for clients that take nothing of an answer: uvicorn
itself waits for ever, and for any length.

Knows no bodies.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 32 * 1024


class BoundedProtocol(HttpToolsProtocol):
    """A client that has sent no whole head `header_seconds` after it connected, or was free to begin, is cut off; so is
    one that takes nothing of what waits for it for `stall_seconds`."""

    header_seconds = 30.0
    stall_seconds = 60.0
    _stalled: asyncio.TimerHandle | None = None
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

    def pause_writing(self) -> None:
        """More waits to be sent than the transport likes to hold."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for a while: with the end of an answer still waiting to be taken, nothing will."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        self._unwatch()
        super().connection_lost(exc)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(self.header_seconds, self._cut_off)

    def _cut_off(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()

    def _watch(self, left: int) -> None:
        """`left` bytes wait; at least one of them must have gone when we look again."""
        self._stalled = self.loop.call_later(self.stall_seconds, self._look_again, left)

    def _look_again(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._watch(left)

    def _unwatch(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
