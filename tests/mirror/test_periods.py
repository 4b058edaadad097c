"""Which billing period and which invoice usage belongs to, as the mirror knows it from events in any order."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import httpx
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tests.usage.making import read_all
from tests.webhooks.stripe_events import NOON, deliver, event, invoice, item, meter, subscription

DAY = 86_400
MONTH = 30 * DAY


def at(seconds: int) -> datetime:
    return datetime.fromtimestamp(NOON + seconds, UTC)


async def read_periods(resources: Resources) -> list[tuple[Any, ...]]:
    return await read_all(
        resources, "SELECT event_name, item, period_start, period_end FROM metered_periods ORDER BY period_start"
    )


async def forget(resources: Resources) -> None:
    async with db.transaction(resources.engine) as connection:
        for table in ("stripe_events", "billing_periods", "subscription_items", "subscriptions", "prices"):
            await connection.execute(text(f"DELETE FROM {table}"))  # noqa: S608  names from the line above


def cycles(*starts: int) -> Sequence[dict[str, Any]]:
    return [
        event("customer.subscription.updated", subscription(items=[item(start=start, end=start + MONTH)]), at=start)
        for start in starts
    ]


async def test_every_order_of_a_subscriptions_events_gives_the_same_periods(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await deliver(client, event("billing.meter.created", meter()))
    trial = event(
        "customer.subscription.created", subscription(items=[item(end=20 * DAY)]), at=-1
    )  # then it was extended
    events = cycles(0, MONTH, 40 * DAY)  # the anchor moved ten days into the second period
    for order in permutations([trial, *events]):
        await forget(resources)
        await deliver(client, *order)
        assert await read_periods(resources) == [
            ("calls", "si_1", at(0), at(MONTH)),
            ("calls", "si_1", at(MONTH), at(40 * DAY)),
            ("calls", "si_1", at(40 * DAY), at(40 * DAY + MONTH)),
        ]


async def test_a_period_ends_with_its_subscription(client: httpx.AsyncClient, resources: Resources) -> None:
    ended = subscription(status="canceled", ended_at=NOON + 5 * DAY)
    await deliver(client, event("customer.subscription.deleted", ended))
    assert [(start, end) for _, _, start, end in await read_periods(resources)] == [(at(0), at(5 * DAY))]


async def test_only_an_invoice_at_a_periods_end_bills_metered_usage(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    period: dict[str, Any] = {"period_start": NOON, "period_end": NOON + MONTH}
    await deliver(
        client,
        *cycles(0),
        event("invoice.created", invoice("in_cycle", "draft", **period)),
        event("invoice.created", invoice("in_proration", billing_reason="subscription_update", **period)),
        event("invoice.created", invoice("in_amount", billing_reason="subscription_threshold", **period)),
        event("invoice.created", invoice("in_one_off", of=None, **period)),
    )
    found = await read_all(resources, "SELECT invoice, status, item, period_start, period_end FROM metered_invoices")
    assert found == [("in_cycle", "draft", "si_1", at(0), at(0) + timedelta(seconds=MONTH))]
