"""What is known of an event is forgotten in time, and the mirror does without it."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tallystick.webhooks.retention import forget_events
from tests.webhooks.stripe_events import customer, deliver, event, read, read_access, subscription

DAY = timedelta(days=1)


async def change(resources: Resources, statement: str, **values: object) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text(statement), values)


@pytest.fixture
def kept(resources: Resources) -> timedelta:
    return timedelta(days=resources.settings.event_retention_days)


async def test_old_events_are_forgotten_in_batches(
    resources: Resources, kept: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "ROWS_PER_DELETE", 4)
    now = datetime.now(UTC)
    for name, age, number in (("old", kept + DAY, 10), ("new", kept - DAY, 2)):
        await change(
            resources,
            "INSERT INTO stripe_events (id, type, livemode, created, received_at, verdict)"
            " SELECT :name || n, 'customer.updated', false, :at, :at, 'applied' FROM generate_series(1, :number) n",
            name=name,
            at=now - age,
            number=number,
        )
    await change(resources, "UPDATE stripe_events SET verdict = 'quarantined' WHERE id = 'old7'")

    assert await forget_events(resources, now) == 9
    rows = await read(resources, "SELECT id FROM stripe_events ORDER BY id")
    assert [row["id"] for row in rows] == ["new1", "new2", "old7"]
    assert await forget_events(resources, now) == 0


async def test_a_forgotten_event_that_comes_again_changes_nothing(
    client: httpx.AsyncClient, resources: Resources, kept: timedelta
) -> None:
    sent = [
        event("customer.created", customer()),
        event("customer.subscription.created", subscription(status="incomplete")),
        event("customer.subscription.updated", subscription(), at=1),
    ]
    assert await deliver(client, *sent) == ["applied"] * 3
    before = await read_access(client)
    told = await read(resources, "SELECT id FROM notifications")
    assert await forget_events(resources, datetime.now(UTC) + kept + DAY) == 3
    assert (await client.get(f"/v1/events/{sent[0]['id']}")).status_code == 404
    lines = (await client.get("/v1/customers/cus_1/timeline")).json()["lines"]
    assert {line["event"]["id"] for line in lines if line["event"]} <= {one["id"] for one in sent}
    assert {line["event"]["type"] for line in lines if line["event"]} == {None}

    assert await deliver(client, *sent) == ["stale"] * 3

    assert await read_access(client) == before
    assert await read(resources, "SELECT id FROM notifications") == told
    assert len((await client.get("/v1/customers/cus_1/timeline")).json()["lines"]) == len(lines)
