import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.delivery import UNKNOWN_FOR_AT_MOST, backoff, deliver, deliver_all, lease
from tallystick.usage.ledger import record_events
from tallystick.usage.meters import refresh_meters
from tallystick.usage.sealing import seal_everything
from tests.conftest import FakeStripe
from tests.usage.making import METER, conservation, last_hour, make_customer, make_event, read_all
from tests.waiting import wait_until

STATES = "SELECT state, count(*) FROM usage_deliveries GROUP BY state ORDER BY state"


async def make_deliveries(resources: Resources, fake: FakeStripe, *values: str, customer: str | None = None) -> str:
    """One sealed delivery an hour with these values, for a customer that the fake Stripe knows; the customer's id."""
    now = datetime.now(UTC)
    if customer is None:
        await fake.client.v1.billing.meters.create_async(
            {"display_name": "API", "event_name": METER, "default_aggregation": {"formula": "sum"}}
        )
        await refresh_meters(resources, now)
        customer = (await fake.client.v1.customers.create_async({})).id
        await make_customer(resources, customer=customer)
    events = [make_event(f"e{n}", at=last_hour() - timedelta(hours=n), value=value) for n, value in enumerate(values)]
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)
    await seal_everything(resources, now)
    return customer


async def misbehave(fake: FakeStripe, kind: str, times: int | None = 1, **more: object) -> None:
    rule = {"method": "POST", "path": "/v1/billing/meter_events", "kind": kind, "times": times} | more
    (await fake.control.post("/_fake/faults", json=rule)).raise_for_status()


async def taken_by_stripe(fake: FakeStripe) -> list[tuple[str, Decimal]]:
    events = (await fake.control.get("/_fake/meter_events")).json()["meter_events"]
    return [(event["identifier"], Decimal(event["value"])) for event in events]


async def next_due(resources: Resources) -> datetime:
    """A moment at which whatever is to be retried is due."""
    ((at,),) = await read_all(resources, "SELECT max(greatest(next_attempt_at, lease_until)) FROM usage_deliveries")
    assert isinstance(at, datetime)
    return at + timedelta(seconds=1)


async def test_what_was_sealed_is_sent_once(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1.5", "2", "0.000000000001")
    now = datetime.now(UTC)
    assert await deliver_all(resources, now) == 3
    assert await deliver_all(resources, now) == 0
    assert sorted(value for _, value in await taken_by_stripe(fake_stripe)) == [
        Decimal("0.000000000001"),
        Decimal("1.5"),
        Decimal(2),
    ]
    assert (await conservation(resources)).sent == Decimal("3.500000000001")


async def test_a_call_that_timed_out_after_stripe_did_the_work_is_repeated_and_counts_once(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    await deliver(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT state, unknown_since IS NOT NULL FROM usage_deliveries") == [
        ("pending", True)
    ]
    await deliver(resources, await next_due(resources))
    assert [value for _, value in await taken_by_stripe(fake_stripe)] == [Decimal(5)]
    assert await read_all(resources, "SELECT state, reason, attempts FROM usage_deliveries") == [("sent", "repeat", 2)]


@pytest.mark.parametrize("kind", ["error_500", "rate_limit", "drop_before"])
async def test_what_stripe_could_not_take_is_tried_again_with_the_same_words(
    resources: Resources, fake_stripe: FakeStripe, kind: str
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await misbehave(fake_stripe, kind, times=2)
    for _ in range(3):
        await deliver(resources, await next_due(resources))
    assert await read_all(resources, "SELECT state, attempts FROM usage_deliveries") == [("sent", 3)]
    requests = [
        request
        for request in (await fake_stripe.control.get("/_fake/requests")).json()["requests"]
        if request["path"] == "/v1/billing/meter_events"
    ]
    assert len({str(request["params"]) for request in requests}) == 1
    keys = [request["idempotency_key"] for request in requests]
    assert len(set(keys)) == len(keys), "an answer that Stripe cached under an old key would be replayed"


async def test_a_refusal_is_parked_with_stripes_reason_and_does_not_stop_the_others(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5", "6")
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("UPDATE usage_deliveries SET event_name = 'gone', payload = '{}' WHERE value = 5")
        )
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [("parked", 1), ("sent", 1)]
    ((reason,),) = await read_all(resources, "SELECT reason FROM usage_deliveries WHERE state = 'parked'")
    assert reason
    counted = await conservation(resources)
    assert (counted.parked, counted.sent) == (Decimal(5), Decimal(6))


async def test_one_delivery_of_a_customer_and_meter_is_on_its_way_at_a_time(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1", "2", "3")
    now = datetime.now(UTC)
    assert await deliver(resources, now) == 1
    assert sum(await asyncio.gather(*(deliver(resources, now) for _ in range(4)))) <= 2
    await deliver_all(resources, now)
    assert await read_all(resources, STATES) == [("sent", 3)]


async def is_sending(resources: Resources) -> bool:
    return await read_all(resources, STATES) == [("sending", 1)]


async def test_a_worker_that_died_while_sending_is_replaced_after_its_lease(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    now = datetime.now(UTC)
    await misbehave(fake_stripe, "slow", seconds="0.3")
    dies = asyncio.create_task(deliver(resources, now))
    await wait_until(lambda: is_sending(resources))
    dies.cancel()
    await asyncio.gather(dies, return_exceptions=True)
    assert await deliver(resources, now + lease(resources.settings) - timedelta(seconds=1)) == 0
    assert await deliver(resources, now + lease(resources.settings)) == 1
    while await read_all(resources, STATES) != [("sent", 1)]:
        # Stripe may still be busy with the call whose caller has died.
        await deliver(resources, await next_due(resources))
    assert len(await taken_by_stripe(fake_stripe)) == 1
    assert (await conservation(resources)).sent == 1


async def test_an_outcome_unknown_for_too_long_is_not_sent_again(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    now = datetime.now(UTC)
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    await deliver(resources, now)
    await deliver(resources, now + UNKNOWN_FOR_AT_MOST)
    assert await read_all(resources, "SELECT state, reason FROM usage_deliveries") == [("parked", "outcome_unknown")]
    assert len(await taken_by_stripe(fake_stripe)) == 1


async def test_refusals_do_not_start_the_clock_of_the_unknown(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    now = datetime.now(UTC)
    await misbehave(fake_stripe, "rate_limit")
    await deliver(resources, now)
    await deliver(resources, now + timedelta(days=2))
    assert await read_all(resources, STATES) == [("sent", 1)]


async def test_the_rate_limit_is_shared_by_all_workers(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    now = datetime.now(UTC)
    for n in range(6):
        customer = (await fake_stripe.client.v1.customers.create_async({})).id
        await make_customer(resources, ref=f"other-{n}", customer=customer)
        async with db.transaction(resources.engine) as connection:
            event = make_event(f"other-{n}", at=last_hour(), customer_ref=f"other-{n}")
            await record_events(connection, [event], accepted_already=True)
    await seal_everything(resources, now)
    slow = dataclasses.replace(resources, settings=resources.settings.model_copy(update={"stripe_calls_per_second": 3}))
    tried = await asyncio.gather(deliver(slow, now), deliver(slow, now))
    # Three tokens at first, and whatever a slow machine lets grow back between the two claims.
    assert 3 <= sum(tried) <= 6
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("UPDATE rate_limits SET tokens = 0, refilled_at = clock_timestamp()"))
    assert await deliver(slow, now) <= 1
    assert await deliver_all(resources, now) >= 1
    assert await read_all(resources, STATES) == [("sent", 7)]


def test_the_wait_between_tries_grows_to_five_minutes() -> None:
    assert timedelta(seconds=1) <= backoff(1) <= timedelta(seconds=2)
    assert timedelta(seconds=150) <= backoff(50) <= timedelta(seconds=300)
