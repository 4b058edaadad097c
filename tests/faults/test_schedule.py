"""Faults meet what they are meant for: one process and not the others, and something rather than nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from tallystick.dev.embedded import POSTGRES_DATABASE, POSTGRES_USER, EmbeddedPostgres
from tests.conftest import Servers
from tests.faults.clients import Book
from tests.faults.machine import Machine
from tests.faults.proxy import HOST, Proxy, open_proxy
from tests.faults.schedule import Fault, Injector
from tests.waiting import wait_until

CLIENTS = ("worker-1", "worker-2")


@pytest.fixture
async def machine(servers: Servers, tmp_path: Path) -> AsyncIterator[Machine]:
    """Proxies with two clients in front of PostgreSQL, Valkey, and a Stripe that repeats what it is told."""

    async def repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async with AsyncExitStack() as parts:
        stripe = await parts.enter_async_context(await asyncio.start_server(repeat, HOST, 0))
        ports = {
            "postgres": servers.postgres.port,
            "valkey": servers.valkey.port,
            "stripe": stripe.sockets[0].getsockname()[1],
        }
        proxies = {
            name: await parts.enter_async_context(open_proxy(port, clients=CLIENTS)) for name, port in ports.items()
        }
        yield Machine(tmp_path, servers.postgres, servers.valkey, {}, proxies)


async def strike(machine: Machine, kind: str) -> None:
    injector = Injector(machine, Book())
    await injector.strike(Fault(kind, "worker-1", 0, 0))
    assert (injector.injected, injector.errors) == ({kind: 1}, [])


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        # Cut in the middle of nothing, a client is told nothing; PostgreSQL itself gives its reason.
        ("cut-postgres", (asyncpg.ConnectionDoesNotExistError, OSError, asyncpg.InterfaceError)),
        ("end-postgres", (asyncpg.AdminShutdownError, asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError)),
    ],
)
async def test_sessions_at_postgres(machine: Machine, kind: str, error: tuple[type[Exception], ...]) -> None:
    struck, other = [
        await asyncpg.connect(
            host=HOST, port=machine.proxies["postgres"].ports[client], user=POSTGRES_USER, database=POSTGRES_DATABASE
        )
        for client in CLIENTS
    ]
    await strike(machine, kind)

    with pytest.raises(error):
        await struck.fetchval("SELECT 1")
    assert await other.fetchval("SELECT 1") == 1
    await other.close()


@pytest.mark.parametrize("kind", ["cut-valkey", "end-valkey"])
async def test_connections_to_valkey(machine: Machine, kind: str) -> None:
    struck, other = [
        Redis(
            host=HOST,
            port=machine.proxies["valkey"].ports[client],
            single_connection_client=True,
            retry=Retry(NoBackoff(), 0),
        )
        for client in CLIENTS
    ]
    ids = [await client.client_id() for client in (struck, other)]
    await strike(machine, kind)

    with pytest.raises((RedisConnectionError, OSError)):
        await struck.ping()
    assert await other.client_id() == ids[1]
    for client in (struck, other):
        await client.aclose()


async def test_connections_to_stripe(machine: Machine) -> None:
    struck, other = [await open_connection(machine.proxies["stripe"], client) for client in CLIENTS]
    await strike(machine, "cut-stripe")

    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await struck[0].readexactly(1)
    other[1].write(b"x")
    assert await other[0].readexactly(1) == b"x"
    for _, writer in (struck, other):
        writer.close()


async def test_what_a_proxy_holds_and_loses_is_counted(machine: Machine) -> None:
    proxy = machine.proxies["stripe"]
    reader, writer = await open_connection(proxy, "worker-1")
    assert (proxy.held, proxy.lost) == (0, 0)
    proxy.stall()
    writer.write(b"x")

    async def is_held() -> bool:
        return proxy.held > 0

    await wait_until(is_held)
    proxy.flow()
    assert await reader.readexactly(1) == b"x"
    proxy.loses_answers = True
    writer.write(b"x")
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(1)
    writer.close()

    assert proxy.lost == 1


async def open_connection(proxy: Proxy, client: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open one, and hear from the other end, so that it is known to be through."""
    reader, writer = await asyncio.open_connection(HOST, proxy.ports[client])
    writer.write(b"?")
    assert await reader.readexactly(1) == b"?"
    return reader, writer


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("kill", "worker-1"),
        ("restart", "worker-1"),
        ("pause", "postgres"),
        ("crash-backend", "postgres"),
        ("cut", "valkey"),
        ("stall", "valkey"),
        ("refuse", "valkey"),
        ("lose-answers", "valkey"),
        ("full", "valkey"),
        ("cut-stripe", "worker-1"),
        ("end-postgres", "worker-1"),
        ("end-valkey", "worker-1"),
    ],
)
async def test_a_fault_that_nobody_is_there_to_notice_is_not_counted(
    machine: Machine, kind: str, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def start(part: str) -> None:
        """It stays ended."""

    monkeypatch.setattr("tests.faults.schedule.MEET_SECONDS", 0)
    machine.processes["worker-1"] = await asyncio.create_subprocess_exec("true")
    await machine.processes["worker-1"].wait()
    if target == "postgres":
        machine.postgres = EmbeddedPostgres(tmp_path / "never started")
    machine.start = start  # type: ignore[method-assign]
    (tmp_path / "worker-1.log").touch()
    injector = Injector(machine, Book())
    await injector.strike(Fault(kind, target, 0, 0))

    assert (injector.injected, injector.met_nothing, injector.errors) == ({}, {kind: 1}, [])
