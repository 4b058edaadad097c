"""The connections under Stripe's SDK: what breaks is Stripe's error, and says whether Stripe can have heard of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import stripe

from tallystick.stripe_gateway import Connections, never_reached
from tallystick.usage.senders.meter_events import send_meter_events
from tallystick.usage.senders.outcomes import Message, read_outcome

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]

CUSTOMER = b'{"object": "customer", "id": "cus_1"}'


@asynccontextmanager
async def answering(answer: Answer, heard: list[bytes] | None = None) -> AsyncIterator[str]:
    """A server that reads a request's head, answers in this way and closes; its address without the scheme."""

    taken: set[asyncio.Task[None] | None] = set()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.add(asyncio.current_task())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if heard is not None:
                heard.append(head)
            await answer(writer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for task in filter(None, taken):
        task.cancel()


async def call(base: str, *, seconds: float = 5) -> stripe.Customer:
    connections = Connections(seconds)
    try:
        client = stripe.StripeClient("sk_test_1", base_addresses={"api": base}, http_client=connections)
        return await client.v1.customers.retrieve_async("cus_1")
    finally:
        await connections.close_async()


async def say_customer(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(CUSTOMER), CUSTOMER))


async def break_off(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + CUSTOMER)


async def fall_silent(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + CUSTOMER)
    await asyncio.Event().wait()


async def hang_up(writer: asyncio.StreamWriter) -> None:
    pass


async def stay_silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def talk_nonsense(writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.example ESMTP\r\n")


async def send_elsewhere(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize(
    "answer", [break_off, fall_silent, hang_up, stay_silent, talk_nonsense], ids=lambda answer: answer.__name__
)
async def test_what_breaks_after_the_call_was_made_leaves_open_whether_stripe_heard_it(answer: Answer) -> None:
    async with answering(answer) as address:
        with pytest.raises(stripe.APIConnectionError) as failed:
            await asyncio.wait_for(call(f"http://{address}", seconds=0.5), 10)
    outcome = read_outcome(failed.value)
    assert (outcome.state, outcome.unknown) == ("retry", True)
    assert outcome.reason == type(failed.value.__cause__).__name__


async def test_a_kept_connection_that_is_reset_leaves_open_whether_the_call_was_heard() -> None:
    """Stripe, or what is in between, may close an idle connection in the moment in which a call is made on it."""
    heard: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            heard.append(await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0])))
            if len(heard) > 1:
                writer.transport.abort()
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    connections = Connections(5)
    try:
        async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
            base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            client = stripe.StripeClient("sk_test_1", base_addresses={"api": base}, http_client=connections)
            message = Message("calls", "tally-1", {"value": "1"}, 0, 1)
            outcomes = await send_meter_events(client, [message, message], lanes=1, seconds=5)
    finally:
        await connections.close_async()
    assert [(outcome.state, outcome.unknown) for outcome in outcomes] == [("sent", False), ("retry", True)]
    assert len(heard) == 2, "whether it is said again is for the delivery to decide"


async def test_a_call_without_a_connection_was_not_heard() -> None:
    with pytest.raises(stripe.APIConnectionError) as refused:
        await call("http://127.0.0.1:1")
    assert never_reached(refused.value)
    with pytest.raises(stripe.APIConnectionError) as unnamed:
        await call("http://nowhere.invalid")
    assert never_reached(unnamed.value)
    async with answering(talk_nonsense) as address:
        with pytest.raises(stripe.APIConnectionError) as without_tls:
            await call(f"https://{address}")
    assert not read_outcome(without_tls.value).unknown


async def test_a_connection_that_does_not_come_about_is_given_up_before_the_call_is() -> None:
    async with answering(stay_silent) as address:
        # The TLS handshake never ends.
        with pytest.raises(stripe.APIConnectionError) as failed:
            await asyncio.wait_for(call(f"https://{address}", seconds=1), 0.9)
    assert never_reached(failed.value)


async def test_a_redirection_is_not_followed() -> None:
    async with answering(send_elsewhere) as address:
        with pytest.raises(stripe.APIError) as failed:
            await call(f"http://{address}")
    assert failed.value.http_status == 302


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>Sign in</html>"),
        (302, b""),
        (400, b"<html>Bad Request</html>"),
        (403, b'{"message": "Forbidden"}'),
        (429, b"slow down"),
    ],
)
async def test_an_answer_that_is_not_stripes_leaves_open_whether_stripe_heard_the_call(
    status: int, body: bytes
) -> None:
    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %d Some\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))

    async with answering(say) as address:
        with pytest.raises(stripe.StripeError) as failed:
            await call(f"http://{address}")
    outcome = read_outcome(failed.value)
    assert (outcome.state, outcome.unknown, outcome.http_status) == ("retry", True, status)


async def test_the_proxy_of_the_environment_is_used_but_for_the_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    heard: list[bytes] = []
    async with answering(say_customer, heard) as address:
        monkeypatch.setenv("http_proxy", f"http://{address}")
        assert (await call("http://stripe.invalid")).id == "cus_1"
        assert heard[0].startswith(b"GET http://stripe.invalid/v1/customers/cus_1 ")
        monkeypatch.setenv("no_proxy", "stripe.invalid")
        with pytest.raises(stripe.APIConnectionError) as failed:
            await call("http://stripe.invalid")
        assert never_reached(failed.value)
    assert len(heard) == 1
