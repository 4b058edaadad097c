"""What one connection may take and hold: answers that nobody reads, endless heads, requests sent ahead, no HTTP."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from tallystick import connections
from tallystick.connections import MAX_HEAD_BYTES, MAX_PIPELINED, Connection
from tallystick.crowd import MAX_AT_WORK
from tallystick.resources import Resources
from tests.usage.making import METER, make_customer, make_meter
from tests.waiting import wait_until

HOST = "127.0.0.1"
# As little as the system allows, so that who does not read is noticed soon.
SMALL_BUFFER = 4096


class CountingConnection(Connection):
    """A connection that says how much has come."""

    received = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.received += len(data)


class Server:
    """An application behind connections that the test can look at."""

    def __init__(self, port: int, state: ServerState) -> None:
        self.port, self.state = port, state
        self.writers: list[asyncio.StreamWriter] = []

    @property
    def connections(self) -> list[CountingConnection]:
        return [one for one in self.state.connections if isinstance(one, CountingConnection)]

    async def open(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        client.setblocking(False)  # noqa: FBT003
        await asyncio.get_running_loop().sock_connect(client, (HOST, self.port))
        # Reads no more than this ahead of the test.
        reader, writer = await asyncio.open_connection(sock=client, limit=SMALL_BUFFER)
        self.writers.append(writer)
        writer.write(data)
        return reader, writer


@asynccontextmanager
async def serve(app: Any) -> AsyncIterator[Server]:
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=75)
    config.load()
    state = ServerState()
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    listener.bind((HOST, 0))
    server = await asyncio.get_running_loop().create_server(
        lambda: CountingConnection(config, state, {}), sock=listener
    )
    served = Server(listener.getsockname()[1], state)
    async with asyncio.timeout(30):
        try:
            yield served
        finally:
            for writer in served.writers:
                writer.transport.abort()
                with suppress(OSError):
                    await writer.wait_closed()
            for one in list(state.connections):
                one.transport.abort()
            server.close()
            await server.wait_closed()


def answering(body: bytes, *headers: tuple[bytes, bytes]) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given = [(b"content-length", b"%d" % len(body)), *headers]
        await send({"type": "http.response.start", "status": 200, "headers": given})
        await send({"type": "http.response.body", "body": body})

    return app


async def read_all(reader: asyncio.StreamReader) -> bytes:
    return await reader.read(-1)


async def test_those_who_never_read_their_answers_do_not_keep_others_from_usage(
    app: FastAPI, resources: Resources, api_key: str
) -> None:
    await make_customer(resources)
    await make_meter(resources)
    without_key = b"POST /v1/usage HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}" * MAX_PIPELINED
    event = json.dumps({"id": "e1", "customer": "acme", "meter": METER}).encode()
    head = f"POST /v1/usage HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {api_key}\r\nConnection: close\r\n"
    async with serve(app) as server:
        writers = [(await server.open())[1] for _ in range(MAX_AT_WORK)]

        async def all_are_there() -> bool:
            return len(server.connections) == MAX_AT_WORK

        await wait_until(all_are_there)
        unread = server.connections
        for connection, writer in zip(unread, writers, strict=True):
            connection.transport.set_write_buffer_limits(high=0)  # or it would take many more answers
            writer.write(without_key)

        async def all_wait_for_their_readers() -> bool:
            return all(connection.flow.write_paused and connection.pipeline for connection in unread)

        await wait_until(all_wait_for_their_readers)
        reader, _ = await server.open(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(event), event))
        answer = await read_all(reader)
        assert await all_wait_for_their_readers()
    assert answer.startswith(b"HTTP/1.1 202 ")


@pytest.mark.parametrize(
    "app",
    [answering(b"." * 500_000), answering(b"." * 40_000, (b"connection", b"close"))],
    ids=["writing", "closing"],
)
async def test_a_connection_whose_answers_are_not_read_is_closed(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.1)
    async with serve(app) as server:
        await server.open(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")

        async def is_there() -> bool:
            return len(server.connections) == 1

        async def is_gone() -> bool:
            return not server.connections

        await wait_until(is_there)
        await wait_until(is_gone)


async def test_a_reader_who_goes_on_reading_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.5)
    asking, body = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"." * 150_000
    async with serve(answering(body)) as server:
        reader, writer = await server.open(asking)

        async def is_paused() -> bool:
            return any(connection.flow.write_paused for connection in server.connections)

        async def is_alone() -> bool:
            return len(server.connections) == 1

        await wait_until(is_paused)
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(body)) == body
        # One that does not read has its time after this one had it.
        await server.open(asking)
        await wait_until(is_paused)
        await wait_until(is_alone)
        writer.write(asking)
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(body)) == body


ENDLESS = [
    b"GET /",
    b"GET / HTTP/1.1\r\nX-Long: ",
    b"GET / HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 100 + b"X-Long: ",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n0\r\nX-Trailer: ",
]


async def wait_for_the_end(scope: Scope, receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    if message["type"] == "http.request":
        await answering(b"well")(scope, receive, send)


@pytest.mark.parametrize("begun", ENDLESS, ids=["address", "header", "headers", "trailer"])
async def test_a_head_without_end_is_refused(begun: bytes) -> None:
    async with serve(wait_for_the_end) as server:
        reader, writer = await server.open(begun)
        for _ in range(MAX_HEAD_BYTES // 1024 + 300):  # with what may be on its way
            writer.write(b"a" * 1024)
            try:
                await writer.drain()
            except ConnectionError:
                break
        try:
            answer = await read_all(reader)
        except ConnectionResetError:  # it was closed while we were still sending
            answer = b""
    if answer:
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"\r\nx-content-type-options: nosniff\r\n" in answer


async def test_a_large_head_and_a_larger_body_are_taken() -> None:
    head = b"POST / HTTP/1.1\r\nConnection: close\r\nX-Long: " + b"a" * (MAX_HEAD_BYTES - 100)
    body = b"." * 10 * MAX_HEAD_BYTES
    async with serve(wait_for_the_end) as server:
        reader, writer = await server.open()
        for piece in (head[:100], head[100:], b"\r\nContent-Length: %d\r\n\r\n" % len(body), body):
            writer.write(piece)
            await writer.drain()
        answer = await read_all(reader)
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_each_request_of_a_connection_may_have_a_large_head() -> None:
    sent = 0
    async with serve(wait_for_the_end) as server:
        reader, writer = await server.open()

        async def is_received() -> bool:
            return [connection.received for connection in server.connections] == [sent]

        for _ in range(3):
            for piece in (b"GET / HTTP/1.1\r\nX-Long: ", b"a" * (MAX_HEAD_BYTES // 2), b"\r\n\r\n"):
                writer.write(piece)
                sent += len(piece)
                await wait_until(is_received)
            assert (await reader.readuntil(b"well")).startswith(b"HTTP/1.1 200 ")


def hold_requests() -> tuple[asyncio.Event, asyncio.Event, Any]:
    """An application that has begun with a request, and goes on when the test says so."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        begun.set()
        await go_on.wait()
        await answering(b"well")(scope, receive, send)

    return begun, go_on, app


PIPELINED = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n."


async def test_requests_that_are_sent_ahead_wait_outside() -> None:
    begun, go_on, app = hold_requests()
    async with serve(app) as server:
        reader, writer = await server.open(PIPELINED * 3)
        await begun.wait()
        (connection,) = server.connections
        assert connection.flow.read_paused
        writer.write(PIPELINED)
        go_on.set()
        for _ in range(4):
            assert (await reader.readuntil(b"well")).startswith(b"HTTP/1.1 200 ")


async def test_more_requests_ahead_than_anybody_sends_end_the_connection() -> None:
    begun, _, app = hold_requests()
    async with serve(app) as server:
        reader, writer = await server.open(PIPELINED)
        await begun.wait()
        writer.write(PIPELINED * (MAX_PIPELINED + 1))
        # Nothing is answered: it would be taken for the answer to the first one.
        assert await read_all(reader) == b""


async def test_what_is_no_http_is_refused_as_everything_is() -> None:
    async with serve(wait_for_the_end) as server:
        for sent in (b"nonsense\r\n\r\n", b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nnonsense"):
            reader, _ = await server.open(sent)
            head, _, body = (await read_all(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
            assert headers["content-type"] == "application/problem+json"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cache-control"] == "no-store"
            assert headers["content-security-policy"].startswith("default-src 'none'")
            assert headers["connection"] == "close"
            assert headers["x-request-id"]
            assert json.loads(body)["status"] == 400


async def test_nonsense_behind_a_request_is_not_its_answer() -> None:
    begun, _, app = hold_requests()
    async with serve(app) as server:
        reader, writer = await server.open(PIPELINED)
        await begun.wait()
        writer.write(b"nonsense\r\n\r\n")
        assert await read_all(reader) == b""
