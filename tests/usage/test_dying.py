"""Usage, its deliveries, corrections and thresholds, when a process dies between any two steps (tests/dying.py)."""

import dataclasses
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tallystick import db
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.usage.buffer import claim_and_append
from tallystick.usage.cancellations import cancel_events
from tallystick.usage.corrections import Wanted, record_correction
from tallystick.usage.delivery import deliver_all
from tallystick.usage.drain import drain
from tallystick.usage.meters import refresh_meters
from tallystick.usage.sealing import answer_seal_requests, seal_everything
from tallystick.usage.sealing_requests import request_seals
from tallystick.usage.thresholds import announce_thresholds
from tests.conftest import FakeStripe, empty_stores
from tests.dying import die_everywhere
from tests.usage.making import METER, conservation, last_hour, make_customer, make_event, read_all

COUNT = "jobs"
RULES = Rules.model_validate({"meters": {METER: {"thresholds": ["2", "5"]}}})

END = {
    "ledger": "SELECT id, meter, value FROM usage_events ORDER BY id",
    "totals": "SELECT meter, bucket_start, quantity, events, sealed, sealed_events FROM usage_totals ORDER BY 1, 2",
    "deliveries": "SELECT event_name, timestamp, value, events, state FROM usage_deliveries ORDER BY 1, 2, 3",
    "corrections": "SELECT id, method, state, delta FROM usage_corrections ORDER BY id",
    "told": "SELECT type, data FROM notifications ORDER BY type, data ->> 'threshold'",
    "requests": "SELECT customer FROM seal_requests",
}

Flow = Callable[[Resources, datetime], Awaitable[None]]


async def send_usage(resources: Resources, now: datetime) -> None:
    await drain(resources, now, reclaim_after=timedelta(0))
    await announce_thresholds(resources, now)
    await answer_seal_requests(resources, now)
    await deliver_all(resources, now)


async def correct_usage(resources: Resources, now: datetime) -> None:
    for id, event, value in (("void", "alone", None), ("count", "job-1", None), ("adjust", "e1", Decimal("0.5"))):
        action = "void" if value is None else "adjust"
        wanted = Wanted("tests", id, event, None, action, value, "a test")  # type: ignore[arg-type]
        async with db.transaction(resources.engine) as connection:
            await record_correction(connection, wanted, RULES, now)
    await cancel_events(resources, now)
    await seal_everything(resources, now)
    await deliver_all(resources, now)


async def make_usage(resources: Resources, fake: FakeStripe) -> None:
    """An empty world, the same each time, in which Redis has usage of two meters and an invoice was drafted."""
    await empty_stores(resources)
    (await fake.control.post("/_fake/reset", json={"seed": 1})).raise_for_status()
    for name, formula in ((METER, "sum"), (COUNT, "count")):
        await fake.client.v1.billing.meters.create_async(
            {"display_name": name, "event_name": name, "default_aggregation": {"formula": formula}}
        )
    now = datetime.now(UTC)
    await refresh_meters(resources, now)
    customer = (await fake.client.v1.customers.create_async({})).id
    await make_customer(resources, customer=customer)
    at = last_hour()
    events = [
        *(make_event(f"e{n}", at=at, value="1.5") for n in (1, 2)),
        make_event("alone", at=at - timedelta(hours=2), value="7"),
        *(make_event(f"job-{n}", at=at + timedelta(seconds=n), meter=COUNT) for n in (1, 2)),
    ]
    for some in (events[:3], events[3:]):
        await claim_and_append(resources.redis, some, now, dedupe_hours=72, max_bytes=10**9)
    async with db.transaction(resources.engine) as connection:
        await request_seals(connection, {customer: "in_1"})


async def make_sent_usage(resources: Resources, fake: FakeStripe) -> None:
    await make_usage(resources, fake)
    await send_usage(resources, datetime.now(UTC))


async def make_sealed_usage(resources: Resources, fake: FakeStripe) -> None:
    """Usage that reached a threshold, and was sealed since anybody looked: only what the seal noted tells of it."""
    await make_usage(resources, fake)
    await announce_thresholds(resources, datetime.now(UTC))
    await drain(resources, datetime.now(UTC), reclaim_after=timedelta(0))
    await seal_everything(resources, datetime.now(UTC))


async def read_end(resources: Resources, fake: FakeStripe) -> dict[str, Any]:
    taken = (await fake.control.get("/_fake/meter_events")).json()["meter_events"]
    await conservation(resources)
    at_stripe = sorted((event["event_name"], event["timestamp"], event["value"], event["cancelled"]) for event in taken)
    return {name: await read_all(resources, statement) for name, statement in END.items()} | {"stripe": at_stripe}


@pytest.mark.parametrize(
    ("prepare", "flow"), [(make_usage, send_usage), (make_sent_usage, correct_usage)], ids=["usage", "corrections"]
)
async def test_whoever_dies_wherever_each_effect_comes_once(
    resources: Resources, fake_stripe: FakeStripe, prepare: Callable[..., Awaitable[None]], flow: Flow
) -> None:
    settings = resources.settings.model_copy(update={"stripe_calls_per_second": 10_000})
    resources = dataclasses.replace(resources, settings=settings)
    resources.rules.rules = RULES
    steps, end = await die_everywhere(
        resources,
        lambda: prepare(resources, fake_stripe),
        lambda now: flow(resources, now),
        lambda: read_end(resources, fake_stripe),
    )
    assert end["stripe"]
    assert {"commit", "post meter_events"} <= set(steps)


async def test_whoever_dies_with_what_was_to_be_looked_at_leaves_it_to_the_next(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    resources.rules.rules = RULES
    _, end = await die_everywhere(
        resources,
        lambda: make_sealed_usage(resources, fake_stripe),
        lambda now: announce_thresholds(resources, now),
        lambda: read_end(resources, fake_stripe),
    )
    assert {type_ for type_, _ in end["told"]} == {"usage.threshold_reached"}
