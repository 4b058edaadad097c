"""`replay` runs events through the flow again, whatever became of them before."""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tallystick.webhooks.failures import FAILURES_BEFORE_QUARANTINE
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.recovery import recover
from tallystick.webhooks.replay import Replayed, find_quarantined, replay
from tests.recovery.shop import Shop, access_of, refresh_all
from tests.webhooks.stripe_events import let_an_hour_pass, read


def now() -> datetime:
    return datetime.now(UTC)


async def change(resources: Resources, statement: str, **parameters: object) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text(statement), parameters)


async def event_about(shop: Shop, type_: str, object_id: str) -> dict[str, Any]:
    [event] = [
        event for event in await shop.events() if event["type"] == type_ and event["data"]["object"]["id"] == object_id
    ]
    return event


@pytest.fixture
def reader(resources: Resources) -> Reader:
    return Reader(resources)


async def test_an_event_that_was_never_received_is_applied(shop: Shop, resources: Resources, reader: Reader) -> None:
    customer, _ = await shop.sign_up("acme")
    event = await event_about(shop, "customer.created", customer)

    assert await replay(reader, event["id"], now()) == Replayed(event["id"], None, "applied")

    assert await read(resources, "SELECT ref FROM customers") == [{"ref": "acme"}]
    assert [row["id"] for row in await read(resources, "SELECT id FROM stripe_events")] == [event["id"]]


async def test_an_old_event_stays_stale_and_undoes_nothing(shop: Shop, resources: Resources, reader: Reader) -> None:
    _, subscription = await shop.sign_up("acme")
    await shop.control("clock", advance_seconds=60)
    await shop.cancel(subscription)
    await recover(resources, now())
    await refresh_all(resources)
    event = await event_about(shop, "customer.subscription.created", subscription)
    before = await read(resources, "SELECT * FROM stripe_events WHERE id = :id", id=event["id"])

    assert await replay(reader, event["id"], now()) == Replayed(event["id"], "stale", "stale")

    assert await access_of(resources, "acme") == ("none", "ended")
    assert await read(resources, "SELECT * FROM stripe_events WHERE id = :id", id=event["id"]) == before


async def test_an_event_that_was_applied_stays_applied(shop: Shop, resources: Resources, reader: Reader) -> None:
    customer, _ = await shop.sign_up("acme")
    await recover(resources, now())
    event = await event_about(shop, "customer.created", customer)

    assert await replay(reader, event["id"], now()) == Replayed(event["id"], "applied", "applied")


async def test_an_event_whose_type_was_ignored_is_applied(shop: Shop, resources: Resources, reader: Reader) -> None:
    customer, _ = await shop.sign_up("acme")
    event = await event_about(shop, "customer.created", customer)
    await recover(resources, now())
    await change(resources, "UPDATE stripe_events SET verdict = 'ignored' WHERE id = :id", id=event["id"])
    await change(resources, "DELETE FROM customers")

    assert await replay(reader, event["id"], now()) == Replayed(event["id"], "ignored", "applied")


async def test_events_in_quarantine_are_handled_once_the_bug_is_gone(
    shop: Shop, resources: Resources, reader: Reader
) -> None:
    customer, _ = await shop.sign_up("acme")
    event = await event_about(shop, "customer.created", customer)
    # A database that refuses this customer stands for any bug of ours; the constraint is real, and so is the error.
    await change(resources, f"ALTER TABLE customers ADD CONSTRAINT a_bug CHECK (id <> '{customer}')")
    try:
        for _ in range(FAILURES_BEFORE_QUARANTINE):
            await let_an_hour_pass(resources)
            await recover(resources, now())
        quarantined = await find_quarantined(resources)
        assert event["id"] in quarantined

        still = await replay(reader, event["id"], now())
        assert (still.now, still.problem) == (None, "our own code failed on it: IntegrityError")
        assert await find_quarantined(resources) == quarantined
    finally:
        await change(resources, "ALTER TABLE customers DROP CONSTRAINT a_bug")

    replayed = [await replay(reader, event_id, now()) for event_id in quarantined]

    assert {one.before for one in replayed} == {"quarantined"}
    assert {one.now for one in replayed} <= {"applied", "stale"}
    assert await find_quarantined(resources) == []
    assert await read(resources, "SELECT error FROM stripe_events WHERE error IS NOT NULL") == []
    await refresh_all(resources)
    assert await access_of(resources, "acme") == ("active", "subscription_active")


async def test_an_event_that_stripe_no_longer_has_is_said_to_be_gone(shop: Shop, reader: Reader) -> None:
    gone = await replay(reader, "evt_none", now())

    assert gone == Replayed("evt_none", None, None, "Stripe does not have it; it keeps events for 30 days")
