"""PostgreSQL hangs instead of refusing: usage is taken all the same, and hardly anybody waits for it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event

from tallystick import auth, db
from tallystick.auth import revoke_key
from tallystick.resources import Resources
from tallystick.usage.drain import drain
from tallystick.usage.meters import LONG_AGO
from tests.conftest import Servers
from tests.usage.making import METER, conservation, make_meter
from tests.webhooks.own_postgres import connect_all, freeze, own_postgres, thaw


@pytest.fixture(scope="module")
def servers(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with own_postgres(tmp_path_factory.mktemp("own")) as postgres:
        yield Servers(postgres, servers.valkey)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try fails sooner than in production, and no key is fresh; when to ask again is up to the test."""
    for name in ("POOL_TIMEOUT_SECONDS", "CONNECT_TIMEOUT_SECONDS", "COMMAND_TIMEOUT_SECONDS"):
        monkeypatch.setattr(db, name, 0.4)
    monkeypatch.setattr(auth, "FRESH_FOR", timedelta(0))
    monkeypatch.setattr(auth, "ASK_AGAIN_AFTER", timedelta(hours=1))


@contextmanager
def hanging(app: FastAPI, servers: Servers) -> Iterator[list[str]]:
    """PostgreSQL hangs; the tries of the application to use it are listed."""
    tries: list[str] = []
    engine = app.state.resources.engine.sync_engine
    listeners = {"checkout": lambda *_: tries.append("checkout"), "do_connect": lambda *_: tries.append("connect")}
    frozen = freeze(servers.postgres)
    for name, listener in listeners.items():
        event.listen(engine, name, listener)
    try:
        yield tries
    finally:
        thaw(frozen)
        for name, listener in listeners.items():
            event.remove(engine, name, listener)


async def post(client: httpx.AsyncClient, id: str) -> int:
    event = {"id": id, "customer": "acme", "meter": METER, "value": "1"}
    return (await client.post("/v1/usage", json=event)).status_code


async def test_one_request_waits_and_those_after_it_do_not(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, servers: Servers
) -> None:
    await make_meter(resources)
    assert await post(client, "before") == 202
    await connect_all(app)
    with hanging(app, servers) as tries:
        assert [await post(client, f"e{n}") for n in range(5)] == [202] * 5
        assert len(tries) == 1
        app.state.keys.noted.clear()  # a minute later
        assert await post(client, "e5") == 202
        assert len(tries) == 1
    await drain(resources, datetime.now(UTC))
    assert (await conservation(resources)).events == 7


async def test_of_those_that_come_at_once_one_asks_again(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, servers: Servers
) -> None:
    await make_meter(resources)
    assert await post(client, "before") == 202
    await connect_all(app)
    app.state.keys.ask_again_at = datetime.now(UTC) - timedelta(seconds=1)
    app.state.meters.read_at = LONG_AGO
    with hanging(app, servers) as tries:
        assert await asyncio.gather(*(post(client, f"e{n}") for n in range(5))) == [202] * 5
        assert len(tries) == 2, "one for the key, one for the meters"


async def test_a_key_that_was_revoked_meanwhile_is_refused_as_soon_as_postgresql_answers(
    app: FastAPI,
    client: httpx.AsyncClient,
    resources: Resources,
    servers: Servers,
    api_key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth, "ASK_AGAIN_AFTER", timedelta(0))
    await make_meter(resources)
    assert await post(client, "before") == 202
    with hanging(app, servers):
        assert await post(client, "meanwhile") == 202
    async with db.transaction(resources.engine) as connection:
        assert await revoke_key(connection, api_key.split("_")[1])
    assert await post(client, "after") == 401
    assert app.state.keys.ask_again_at is None
