"""A load generator: prebuilt requests over kept connections, the next when the answer is here, every answer checked.

It writes and reads HTTP/1.1 by hand: on a machine that also runs the server, a full client would be most of what
is measured.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from time import perf_counter_ns

# Raises when the answer to the request of this index is not right: check(index, status, body).
Check = Callable[[int, int, bytes], None]

HEAD_END = b"\r\n\r\n"
LENGTH = b"content-length: "


class WrongAnswer(Exception):
    """The service answered something else than a benchmark expects."""


@dataclass
class Result:
    """What some load came to; times in nanoseconds."""

    requests: int = 0
    took: int = 0
    latencies: list[int] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return self.requests * 1e9 / max(1, self.took)


def make_request(method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """One request, ready to be written."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + HEAD_END + body


async def put_load(ports: Sequence[int], requests: Sequence[bytes], *, connections: int, check: Check) -> Result:
    """Send all requests to 127.0.0.1 over `connections` connections, shared out among the ports, one at a time on each.

    Raises what `check` raises, and `WrongAnswer` when a connection is closed before its answer is here.
    """
    loop = asyncio.get_running_loop()
    work = _Work(requests, check, loop.create_future())
    opened = [
        await loop.create_connection(lambda: _Connection(work), "127.0.0.1", port)
        for port in islice(cycle(ports), min(connections, len(requests)))
    ]
    started = perf_counter_ns()
    try:
        for transport, connection in opened:
            connection.begin(transport)
        await work.done
    finally:
        took = perf_counter_ns() - started
        for transport, _ in opened:
            transport.close()
    return Result(len(work.latencies), took, work.latencies)


class _Work:
    """The requests that are still to be sent, and the latencies of those that were answered."""

    def __init__(self, requests: Sequence[bytes], check: Check, done: asyncio.Future[None]) -> None:
        self.waiting = iter(enumerate(requests))
        self.expected = len(requests)
        self.latencies: list[int] = []
        self.check = check
        self.done = done

    def finish(self, error: Exception | None = None) -> None:
        if self.done.done():
            return
        if error is not None:
            self.done.set_exception(error)
        elif len(self.latencies) == self.expected:
            self.done.set_result(None)


class _Connection(asyncio.Protocol):
    def __init__(self, work: _Work) -> None:
        self._work = work
        self._received = b""
        self._index = -1
        self._sent_at = 0

    def begin(self, transport: asyncio.Transport) -> None:
        """Send the first request. uvloop may return a connection before it calls `connection_made`."""
        self._transport = transport
        self.send_next()

    def send_next(self) -> None:
        self._index, request = next(self._work.waiting, (-1, b""))
        if self._index >= 0:
            self._sent_at = perf_counter_ns()
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(HEAD_END)
        if not found:
            return
        _, _, length = head.lower().partition(LENGTH)
        if len(rest) < int(length.partition(b"\r\n")[0] or 0):
            return
        self._work.latencies.append(perf_counter_ns() - self._sent_at)
        self._received = b""
        try:
            self._work.check(self._index, int(head[9:12]), rest)
        except Exception as error:  # noqa: BLE001  the check's verdict belongs to whoever put the load
            self._work.finish(error)
            return
        self.send_next()
        self._work.finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._index >= 0:
            self._work.finish(WrongAnswer(f"the connection was closed before its answer: {exc}"))
