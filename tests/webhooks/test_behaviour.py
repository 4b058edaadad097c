"""Behaviour that receivers of webhooks are known to get wrong: one test each, over HTTP, on a PostgreSQL of its own."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tallystick.webhooks.refresh import refresh_mirror
from tests.conftest import Servers
from tests.serving import serve
from tests.webhooks.held_stripe import Stripe
from tests.webhooks.own_postgres import connect_all, own_postgres
from tests.webhooks.stripe_events import (
    customer,
    deliver,
    event,
    item,
    post,
    price,
    read,
    read_access,
    sign,
    subscription,
)

NOW = datetime.now(UTC)

CUT_ALL = """
    SELECT bool_and(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE application_name = 'tallystick api'
"""


@pytest.fixture(scope="module")
def servers(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with own_postgres(tmp_path_factory.mktemp("own")) as postgres:
        yield Servers(postgres, servers.valkey)


@pytest.fixture
async def client(app: FastAPI, api_key: str) -> AsyncIterator[httpx.AsyncClient]:
    """The application behind a real socket."""
    headers = {"Authorization": f"Bearer {api_key}"}
    async with serve(app) as url, httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as opened:
        yield opened


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_two_events_of_one_object_in_the_same_second(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str], order: tuple[int, int]
) -> None:
    """Whichever comes first, and whichever has the greater id: in the end it is what Stripe has."""
    state, _ = stripe
    state.objects = {
        "subscriptions/sub_1": subscription(status="past_due"),
        "customers/cus_1": customer(),
        "prices/price_1": price(),
    }
    events = [
        event("customer.subscription.updated", subscription(status="past_due"), id_="evt_1"),
        event("customer.subscription.updated", subscription(status="active"), id_="evt_2"),
    ]
    await deliver(client, *(events[index] for index in order))

    await refresh_mirror(mirror, NOW)

    assert (await read_access(client))[0] == "restricted"


async def test_late_older_event_with_another_item_set(client: httpx.AsyncClient, resources: Resources) -> None:
    """The live item stays, and the one that was replaced does not come back."""
    newer = event("customer.subscription.updated", subscription(items=[item("si_new", "price_new")]), at=60)
    older = event("customer.subscription.updated", subscription(items=[item("si_old", "price_old")]), at=59)

    await deliver(client, newer, older)

    assert await read(resources, "SELECT id FROM subscription_items WHERE NOT deleted") == [{"id": "si_new"}]
    assert (await read_access(client))[2] == ["price_new"]


async def test_an_item_that_was_taken_away_comes_back_as_it_was(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    both, one = [item("si_1"), item("si_2", "price_2")], [item("si_1")]
    for at, items in enumerate((both, one, both)):
        await deliver(client, event("customer.subscription.updated", subscription(items=items), at=at))
    assert (await read_access(client))[2] == ["price_1", "price_2"]
    rows = await read(resources, "SELECT id, deleted FROM subscription_items ORDER BY id")
    assert rows == [{"id": "si_1", "deleted": False}, {"id": "si_2", "deleted": False}]


async def test_a_popular_price_that_somebody_has_locked(client: httpx.AsyncClient, resources: Resources) -> None:
    """It is in every subscription: none of them may wait for its row."""
    await deliver(client, event("price.created", price()))
    async with db.transaction(resources.engine) as other:
        await other.execute(text("SELECT FROM prices FOR UPDATE"))
        assert await deliver(client, event("customer.subscription.created", subscription())) == ["applied"]


@pytest.mark.parametrize("seconds_later", [-1, 0, 60])
async def test_update_that_arrives_after_a_deletion(
    client: httpx.AsyncClient, resources: Resources, seconds_later: int
) -> None:
    """No zombies, whatever the update's own time."""
    await deliver(client, event("customer.deleted", customer()))
    await deliver(client, event("customer.updated", customer(), at=seconds_later, id_=f"evt_zzz_{seconds_later}"))

    assert await read(resources, "SELECT deleted, needs_refresh FROM customers") == [
        {"deleted": True, "needs_refresh": False}
    ]


async def test_slow_re_fetch_finishing_after_a_newer_one(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    """What was fetched first and came last is thrown away."""
    state, _ = stripe
    state.objects = {"subscriptions/sub_1": subscription(status="past_due"), "customers/cus_1": customer()}
    state.gates = {"subscriptions/sub_1": asyncio.Event()}
    for id_ in ("evt_1", "evt_2"):
        await deliver(client, event("customer.subscription.updated", subscription(status="past_due"), id_=id_))

    slow = asyncio.create_task(refresh_mirror(mirror, NOW))
    while "subscriptions/sub_1" not in state.asked:
        state.arrived.clear()
        await state.arrived.wait()
    await deliver(client, event("customer.subscription.updated", subscription(status="active"), at=1))
    state.gates["subscriptions/sub_1"].set()
    await slow

    assert (await read_access(client))[0] == "active"


async def test_unknown_event_type(client: httpx.AsyncClient, resources: Resources) -> None:
    assert await deliver(client, event("something.new.in.2031", {"id": "new_1", "object": "new"})) == ["ignored"]
    assert await read(resources, "SELECT verdict FROM stripe_events") == [{"verdict": "ignored"}]


async def test_nul_byte_in_metadata(client: httpx.AsyncClient, resources: Resources) -> None:
    sent = event("customer.created", customer(metadata={"note": "a\x00b", "tallystick_ref": "acme"}))

    assert await deliver(client, sent) == ["applied"]
    assert await read(resources, "SELECT ref FROM customers") == [{"ref": "acme"}]


async def test_signed_null(client: httpx.AsyncClient) -> None:
    answer = await client.post("/webhooks/stripe", content="null", headers=sign("null"))

    assert (answer.status_code, answer.json()["type"]) == (400, "urn:tallystick:problem:webhook-body-invalid")


async def test_timestamp_an_hour_in_the_future(client: httpx.AsyncClient, resources: Resources) -> None:
    body = json.dumps(event("customer.created", customer()))
    signed_at = int(datetime.now(UTC).timestamp()) + 3600

    answer = await client.post("/webhooks/stripe", content=body, headers=sign(body, at=signed_at))

    assert answer.status_code == 400
    assert await read(resources, "SELECT id FROM stripe_events") == []


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_postgres_stopped_in_mid_run(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, servers: Servers, how: str
) -> None:
    """Each event is 200 and whole, or 500 and nothing; what was refused is taken when it comes again."""
    sent = [
        event(
            "customer.subscription.created",
            subscription(f"sub_{n}", customer=f"cus_{n}", items=[item(f"si_{n}", f"price_{n}")]),
        )
        for n in range(120)
    ]
    await connect_all(app)
    answered = asyncio.Event()

    async def send(one: dict[str, object]) -> int:
        status = (await post(client, one)).status_code
        answered.set()
        return status

    sending = [asyncio.create_task(send(one)) for one in sent]
    await answered.wait()
    await asyncio.to_thread(servers.postgres.stop if how == "stop" else servers.postgres.kill)
    statuses = await asyncio.gather(*sending)
    await asyncio.to_thread(servers.postgres.start)

    assert set(statuses) == {200, 500}
    recorded = {row["object_id"] for row in await read(resources, "SELECT object_id FROM stripe_events")}
    assert recorded >= {f"sub_{n}" for n, status in enumerate(statuses) if status == 200}
    whole = await read(
        resources,
        "SELECT s.id FROM subscriptions s JOIN subscription_items i ON i.subscription = s.id"
        " JOIN prices p ON p.id = i.price JOIN customer_access a ON a.customer = s.customer AND a.access = 'active'",
    )
    assert {row["id"] for row in whole} == recorded
    for table in ("subscriptions", "subscription_items", "prices", "customers", "customer_access"):
        assert len(await read(resources, f"SELECT * FROM {table}")) == len(recorded), table  # noqa: S608

    repeats = await asyncio.gather(*(post(client, one) for one in sent))
    assert {answer.status_code for answer in repeats} == {200}
    assert len(await read(resources, "SELECT id FROM subscriptions")) == len(sent)


async def test_idle_postgres_connection_cut(app: FastAPI, client: httpx.AsyncClient, resources: Resources) -> None:
    """All of them, as after a restart of a proxy: the next event does not even notice."""
    await connect_all(app)
    async with db.transaction(resources.engine) as connection:
        # It waits until each of them has ended.
        assert await connection.scalar(text(CUT_ALL))

    assert await deliver(client, event("customer.created", customer())) == ["applied"]


async def test_forged_request(client: httpx.AsyncClient, resources: Resources) -> None:
    """It is refused before anything is written, a row about the request itself included."""
    body = json.dumps(event("customer.deleted", customer()))

    answer = await client.post("/webhooks/stripe", content=body, headers=sign(body, secret="whsec_of_somebody_else"))

    assert answer.status_code == 400
    async with db.transaction(resources.engine) as connection:
        tables = "SELECT tablename FROM pg_tables WHERE tablename LIKE 'stripe_event%' OR tablename LIKE 'customer%'"
        for table in list((await connection.execute(text(tables))).scalars()):
            assert await connection.scalar(text(f"SELECT count(*) FROM {table}")) == 0, table  # noqa: S608
