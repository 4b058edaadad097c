"""The limits of production: whatever PostgreSQL does, Stripe has its answer within ten seconds."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI

from tallystick import db
from tallystick.resources import Resources
from tallystick.webhooks import inbox
from tests.conftest import Servers
from tests.webhooks.own_postgres import connect_all, freeze, own_postgres, thaw
from tests.webhooks.stripe_events import customer, event, post, read

STRIPE_WAITS_SECONDS = 10


@pytest.fixture(scope="module")
def servers(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with own_postgres(tmp_path_factory.mktemp("own")) as postgres:
        yield Servers(postgres, servers.valkey)


def test_the_limits_add_up() -> None:
    """The answer is due by its own clock, which runs from the moment when the event is verified, queue included."""
    assert inbox.COMMIT_WITHIN_SECONDS < inbox.ANSWER_WITHIN_SECONDS < STRIPE_WAITS_SECONDS
    # What usually ends a hanging transaction is PostgreSQL itself, which leaves the connection whole.
    to_connect = db.POOL_TIMEOUT_SECONDS + db.CONNECT_TIMEOUT_SECONDS
    assert to_connect + db.LOCK_TIMEOUT_MS / 1000 < inbox.COMMIT_WITHIN_SECONDS
    assert db.STATEMENT_TIMEOUT_MS / 1000 < db.COMMAND_TIMEOUT_SECONDS < inbox.COMMIT_WITHIN_SECONDS


async def test_the_answer_comes_within_ten_seconds(
    app: FastAPI,
    client: httpx.AsyncClient,
    resources: Resources,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worst case: a frozen server, and more events than are committed at once, so that some wait for the others."""
    monkeypatch.setattr(inbox, "BATCH_SIZE", 1)
    sent = [event("customer.created", customer(f"cus_{n}")) for n in range(3 * inbox.BATCHES_AT_ONCE)]
    await connect_all(app)
    frozen = freeze(servers.postgres)
    try:
        async with asyncio.timeout(STRIPE_WAITS_SECONDS):
            answers = await asyncio.gather(*(post(client, one) for one in sent))
    finally:
        thaw(frozen)

    assert {answer.status_code for answer in answers} == {500}
    for one in sent:
        assert (await post(client, one)).status_code == 200
    assert len(await read(resources, "SELECT id FROM customers")) == len(sent)
