"""Connections of the HTTP server: how long each may take, and how they end when the process is to stop."""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# From its first byte to its last, and from a new connection to the first byte of a request.
REQUEST_SECONDS = 30
# On a connection that is at rest when the process is to stop, a request may be on its way already.
LAST_REQUEST_SECONDS = 1


class GatheredWrites:
    """A transport that sends in one piece what is written in one turn of the event loop.

    uvicorn writes the head of an answer and its body one after the other, and each write is a call of the system, which
    costs as much as a tenth of a short request.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._pieces:
            self._loop.call_soon(self._send)
        self._pieces.append(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._pieces:
            self._transport.write(b"".join(self._pieces))
            self._pieces.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """A connection that does not wait for a request for ever, and is not cut while one may be on its way."""

    _request_due: asyncio.TimerHandle | None = None
    _request_has_begun = False
    _last_request = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gathered = GatheredWrites(cast("asyncio.Transport", transport), self.loop)
        super().connection_made(cast("asyncio.Transport", gathered))
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Most requests are complete with their first bytes, and need no timer.
        if self._request_has_begun and self._request_due is None:
            self._expect_request()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._request_is_here()
        self._request_has_begun = True

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self._last_request:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._request_is_here()
        self._request_has_begun = False
        super().on_message_complete()

    def shutdown(self) -> None:
        """Answer what is being worked on, and a request that comes at once; the answer says that it was the last."""
        self._last_request = True
        if self._is_at_rest():
            self.loop.call_later(LAST_REQUEST_SECONDS, self._close_at_rest)
        else:
            super().shutdown()

    def _is_at_rest(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first request
        return cycle is None or cycle.response_complete

    def _close_at_rest(self) -> None:
        if self._is_at_rest():
            self.transport.close()

    def _expect_request(self) -> None:
        self._request_due = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _request_is_here(self) -> None:
        if self._request_due is not None:
            self._request_due.cancel()
            self._request_due = None
