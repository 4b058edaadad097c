"""Usage that comes too late for its invoice: before it is sent, when it is settled, and when that is learnt later."""

import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tallystick.resources import Resources
from tallystick.rules import RulesFile
from tallystick.usage.delivery import deliver, deliver_all
from tallystick.usage.late import check_finalized
from tests.conftest import FakeStripe
from tests.usage.making import conservation, make_invoice, make_period, read_all, run
from tests.usage.test_delivery import make_deliveries, misbehave, next_due, taken_by_stripe
from tests.waiting import wait_until

STATES = "SELECT value, state, reason FROM usage_deliveries ORDER BY value"
TOLD = "SELECT data->>'reason' FROM notifications WHERE type = 'usage.parked'"
DAY = timedelta(days=1)


def next_hour() -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)


async def make_closed(resources: Resources, fake: FakeStripe, *values: str) -> tuple[str, datetime]:
    """Deliveries of the last hours; the period of all but the first ended an hour before, and its invoice is final."""
    customer = await make_deliveries(resources, fake, *values)
    end = next_hour() - timedelta(hours=2)
    await make_period(resources, end - 30 * DAY, end, customer=customer)
    await make_invoice(resources, customer=customer, finalized_at=datetime.now(UTC) - timedelta(minutes=1))
    await make_period(resources, end, end + 30 * DAY, customer=customer)
    return customer, end


def carrying(resources: Resources, folder: Path) -> Resources:
    file = folder / "rules.toml"
    file.write_text('[usage]\nlate = "carry"\n')
    return dataclasses.replace(resources, rules=RulesFile(file))


async def test_usage_whose_invoice_is_final_is_parked_and_never_sent(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_closed(resources, fake_stripe, "1", "2", "3")
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [
        (1, "sent", None),
        (2, "parked", "period_closed"),
        (3, "parked", "period_closed"),
    ]
    assert len(await taken_by_stripe(fake_stripe)) == 1
    assert await read_all(resources, TOLD) == [("period_closed",)] * 2
    await conservation(resources)


async def test_usage_of_a_draft_is_sent(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_closed(resources, fake_stripe, "1", "2")
    await run(resources, "UPDATE invoices SET status = 'draft', finalized_at = NULL")
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [(1, "sent", None), (2, "sent", None)]


async def test_usage_that_another_open_subscription_still_bills_is_sent(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    customer, end = await make_closed(resources, fake_stripe, "1", "2")
    await run(
        resources,
        "INSERT INTO subscriptions (id, customer, status) VALUES ('sub_other', :customer, 'active')",
        customer=customer,
    )
    await run(
        resources,
        "INSERT INTO billing_periods (item, price, period_start, period_end, subscription, customer)"
        " SELECT 'si_2', price, :start, :end, 'sub_other', customer FROM billing_periods LIMIT 1",
        start=end - DAY,
        end=end + DAY,
    )
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [(1, "sent", None), (2, "sent", None)]


async def test_usage_that_is_too_late_is_carried_into_the_open_period_by_setting(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path
) -> None:
    _, end = await make_closed(resources, fake_stripe, "1", "2", "3")
    await run(resources, "UPDATE usage_deliveries SET aggregation = 'last' WHERE value = 3")
    await run(resources, "UPDATE meters SET status = 'inactive'")  # nor is it an active one's, which adds up
    now = datetime.now(UTC)
    await deliver_all(carrying(resources, tmp_path), now)
    assert await read_all(resources, STATES) == [
        (1, "sent", None),
        (2, "sent", None),
        (3, "parked", "period_closed"),  # a latest value belongs to its own period
    ]
    ((at, carried_from),) = await read_all(
        resources, "SELECT timestamp, carried_from FROM usage_deliveries WHERE value = 2"
    )
    assert isinstance(at, int)
    assert at >= int(now.timestamp())
    assert carried_from == end - timedelta(hours=1)
    await conservation(resources)


async def test_nothing_is_carried_where_no_open_period_would_bill_it(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path
) -> None:
    _, end = await make_closed(resources, fake_stripe, "1", "2")
    await run(resources, "DELETE FROM billing_periods WHERE period_start = :end", end=end)
    await deliver_all(carrying(resources, tmp_path), datetime.now(UTC))
    assert await read_all(resources, STATES) == [(1, "sent", None), (2, "parked", "period_closed")]


async def test_what_was_tried_is_repeated_as_it_was_and_told_when_stripe_may_have_taken_it_too_late(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path
) -> None:
    customer = await make_deliveries(resources, fake_stripe, "1")
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    await deliver(resources, datetime.now(UTC))
    first = await taken_by_stripe(fake_stripe)
    end = next_hour() - timedelta(hours=1)
    await make_period(resources, end - 30 * DAY, end, customer=customer)
    await make_invoice(resources, customer=customer, finalized_at=datetime.now(UTC))
    await deliver(carrying(resources, tmp_path), await next_due(resources))
    ((reason, late),) = await read_all(
        resources, "SELECT reason, taken_late FROM usage_deliveries WHERE state = 'sent'"
    )
    assert (reason, late) == ("taken_around_finalization", False)
    assert await taken_by_stripe(fake_stripe) == first
    assert ("taken_around_finalization",) in await read_all(resources, TOLD)


async def test_what_stripe_takes_after_finalization_is_marked_when_that_is_learnt_later(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    customer = await make_deliveries(resources, fake_stripe, "1", "2")
    before = datetime.now(UTC)
    end = next_hour() - timedelta(hours=1)
    await make_period(resources, end - 30 * DAY, end, customer=customer)
    await deliver_all(resources, datetime.now(UTC))
    assert await check_finalized(resources, datetime.now(UTC)) == 0
    # Stripe's webhook comes only now.
    await make_invoice(resources, customer=customer, finalized_at=before - timedelta(seconds=1))
    assert await check_finalized(resources, datetime.now(UTC)) == 1
    assert await check_finalized(resources, datetime.now(UTC)) == 0
    assert await read_all(resources, "SELECT state, taken_late FROM usage_deliveries") == [("sent", True)] * 2
    assert await read_all(resources, TOLD) == [("taken_after_finalization",)] * 2


async def test_what_stripe_took_in_time_is_not_marked(resources: Resources, fake_stripe: FakeStripe) -> None:
    customer = await make_deliveries(resources, fake_stripe, "1")
    end = next_hour() - timedelta(hours=1)
    await make_period(resources, end - 30 * DAY, end, customer=customer)
    await deliver_all(resources, datetime.now(UTC))
    await make_invoice(resources, customer=customer, finalized_at=datetime.now(UTC) + timedelta(seconds=1))
    assert await check_finalized(resources, datetime.now(UTC)) == 1
    assert await read_all(resources, "SELECT state, taken_late FROM usage_deliveries") == [("sent", False)]
    assert await read_all(resources, TOLD) == []


async def test_an_invoice_is_not_checked_while_a_delivery_is_on_its_way(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    customer = await make_deliveries(resources, fake_stripe, "1")
    end = next_hour() - timedelta(hours=1)
    await make_period(resources, end - 30 * DAY, end, customer=customer)
    await misbehave(fake_stripe, "slow", seconds="0.2")
    sending = asyncio.create_task(deliver(resources, datetime.now(UTC)))

    async def is_sending() -> bool:
        return await read_all(resources, "SELECT state FROM usage_deliveries") == [("sending",)]

    await wait_until(is_sending)
    await make_invoice(resources, customer=customer, finalized_at=datetime.now(UTC) - DAY)
    assert await check_finalized(resources, datetime.now(UTC)) == 0
    await sending
    assert await read_all(resources, "SELECT state, taken_late FROM usage_deliveries") == [("sent", True)]
    assert await check_finalized(resources, datetime.now(UTC)) == 1
    assert await read_all(resources, TOLD) == [("taken_after_finalization",)]


@pytest.mark.parametrize(("days", "state"), [(34, "sent"), (35, "parked")])
async def test_what_waited_until_stripe_takes_it_no_more_is_parked(
    resources: Resources, fake_stripe: FakeStripe, days: int, state: str
) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    await run(
        resources,
        "UPDATE usage_deliveries SET timestamp = :at",
        at=int((datetime.now(UTC) - timedelta(days=days)).timestamp()),
    )
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT state FROM usage_deliveries") == [(state,)]
