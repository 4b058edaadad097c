"""Connections of the HTTP server: how long each may take, what it may hold, and how they end with the process."""

import asyncio
from collections.abc import Sized
from secrets import token_hex
from typing import Any, cast

import msgspec
import structlog
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tallystick.browsers import ALWAYS, UNLESS_GIVEN
from tallystick.errors import PROBLEM_MEDIA_TYPE, HeadTooLarge, InvalidRequest, Problem
from tallystick.observer import REQUEST_ID

log = structlog.get_logger()

# From its first byte to its last, and from a new connection to the first byte of a request.
REQUEST_SECONDS = 30
# On a connection that is at rest when the process is to stop, a request may be on its way already.
LAST_REQUEST_SECONDS = 1
# Answers that are not read for so long are dropped, and their connection with them.
UNREAD_SECONDS = 30

# What a request may have besides its body, its first piece not counted: proxies take a fraction of it.
MAX_HEAD_BYTES = 64 * 1024
# Requests that are sent before the one in front is answered. Hardly any client does that.
MAX_PIPELINED = 100


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
        if self._transport.get_write_buffer_size():  # it would wait for ever for one who does not read
            self._loop.call_later(UNREAD_SECONDS, self._transport.abort)

    def _send(self) -> None:
        if self._pieces:
            self._transport.write(b"".join(self._pieces))
            self._pieces.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """A connection that does not wait for a request, or for a reader, for ever, nor hold all that is sent meanwhile.

    It is not cut while a request may be on its way.
    """

    _request_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None
    _request_has_begun = False
    _request_gets_on = False
    _head_bytes = 0
    _last_request = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gathered = cast("asyncio.Transport", GatheredWrites(cast("asyncio.Transport", transport), self.loop))
        super().connection_made(gathered)
        self.flow = _OneByOne(gathered, self.pipeline)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_is_here()
        self._answers_are_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Most requests are complete with their first bytes, and need neither a timer nor a limit.
        if self._request_has_begun:
            if self._request_due is None:
                self._expect_request()
            self._limit_head(len(data))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._request_is_here()
        self._request_has_begun = self._request_gets_on = True

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests wait for the one before them")  # ends the parser, as bad syntax does
        super().on_headers_complete()
        if self._last_request:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._request_gets_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._request_is_here()
        self._request_has_begun = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._answers_are_read()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; uvicorn calls this."""
        self._refuse(InvalidRequest(msg, status=400, type="http-error"))

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

    def _limit_head(self, received: int) -> None:
        """End a head, or a trailer, that goes on and on: all of it is kept until it is complete."""
        if self._request_gets_on:  # it has begun with these bytes, or they brought some of its body
            self._request_gets_on = False
            self._head_bytes = 0
            return
        self._head_bytes += received
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge())

    def _refuse(self, problem: Problem) -> None:
        """Answer what never became a request, and close. Where another answer is due first, only close."""
        if not self.pipeline and (self._is_at_rest() or (self.cycle.more_body and not self.cycle.response_started)):
            self._answer(problem)
        self.transport.close()

    def _answer(self, problem: Problem) -> None:
        request_id = token_hex(6)
        log.warning("request_unreadable", request_id=request_id, reason=problem.type)
        body = msgspec.json.encode(problem.body())
        headers = [
            *self.server_state.default_headers,
            (b"content-type", PROBLEM_MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            *ALWAYS,
            *UNLESS_GIVEN,
            (REQUEST_ID, request_id.encode()),
        ]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[problem.status], lines, body))

    def _expect_request(self) -> None:
        self._request_due = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _request_is_here(self) -> None:
        if self._request_due is not None:
            self._request_due.cancel()
            self._request_due = None

    def _answers_are_read(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None


class _OneByOne(FlowControl):
    """Reads on only when no request waits for the one in front of it; else there would be no end to what waits."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()
