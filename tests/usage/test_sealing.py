import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tallystick import db
from tallystick.redis_client import REDIS_ERRORS, create_redis
from tallystick.resources import Resources
from tallystick.stripe_limits import METER_EVENT_MAX_AGE
from tallystick.usage.buffer import claim_and_append
from tallystick.usage.events import MAX_DECIMALS, MAX_DIGITS, UsageEvent, plain
from tallystick.usage.ledger import record_events
from tallystick.usage.parts import delivery_timestamp, split_value
from tallystick.usage.sealing import (
    FAILURES_AT_MOST,
    FIND_CUSTOMERS,
    LOCK_DUE,
    answer_seal_requests,
    seal_due,
    seal_everything,
)
from tests.conftest import make_settings
from tests.planning import FORGET_STATISTICS
from tests.usage.making import (
    CUSTOMER,
    METER,
    conservation,
    count_looks,
    last_hour,
    make_boundaries,
    make_customer,
    make_event,
    make_meter,
    read_all,
    run,
)

DELIVERIES = "SELECT value, timestamp FROM usage_deliveries ORDER BY timestamp, seal"


async def record(resources: Resources, *events: UsageEvent) -> None:
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)


def unix(at: datetime) -> int:
    return int(at.timestamp())


def with_settings(resources: Resources, **changed: object) -> Resources:
    return dataclasses.replace(resources, settings=resources.settings.model_copy(update=changed))


async def test_an_hour_of_events_becomes_one_delivery_after_its_end(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    start = last_hour(0)
    await record(resources, *(make_event(f"e{n}", at=start + timedelta(minutes=n), value="0.25") for n in range(6)))
    assert await seal_due(resources, start + timedelta(minutes=60)) == 0
    assert await seal_due(resources, start + timedelta(minutes=61)) == 1
    assert await seal_due(resources, start + timedelta(minutes=61)) == 0
    assert await read_all(resources, DELIVERIES) == [(Decimal("1.50"), unix(start))]
    assert await read_all(resources, "SELECT payload FROM usage_deliveries") == [
        ({"stripe_customer_id": CUSTOMER, "value": "1.5"},)
    ]
    assert (await conservation(resources)).pending == Decimal("1.5")


async def test_late_events_of_an_open_period_wait_for_the_next_hour(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    start = last_hour(0)
    await record(resources, make_event("in time", at=start))
    now = start + timedelta(minutes=61)
    await seal_due(resources, now)
    await record(resources, make_event("late", at=start))
    assert await seal_due(resources, now + timedelta(minutes=59)) == 0
    assert await seal_due(resources, now + timedelta(minutes=60)) == 1
    assert [
        row[1] for row in await read_all(resources, "SELECT total_id, seal FROM usage_deliveries ORDER BY seal")
    ] == [1, 2]


async def test_late_events_of_a_period_that_has_ended_are_sealed_at_once(resources: Resources) -> None:
    boundary = last_hour(20)
    await make_customer(resources, boundaries=(boundary,))
    await make_meter(resources)
    now = last_hour(25)
    for name in ("in time", "late", "later"):
        await record(resources, make_event(name, at=boundary - timedelta(minutes=1)))
        assert await seal_due(resources, now) == 1


async def test_a_threshold_seals_a_bucket_that_is_still_open(resources: Resources) -> None:
    resources = with_settings(resources, seal_threshold=Decimal(10))
    await make_customer(resources)
    await make_meter(resources)
    start = last_hour(0)
    await record(resources, make_event("a", at=start, value="9.9"))
    assert await seal_due(resources, start + timedelta(minutes=1)) == 0
    await record(resources, make_event("b", at=start, value="0.1"))
    assert await seal_due(resources, start + timedelta(minutes=1)) == 1


async def test_a_customer_without_subscription_is_waited_for_but_not_for_ever(resources: Resources) -> None:
    await make_customer(resources, subscribed=False)
    await make_meter(resources)
    await record(resources, make_event(at=last_hour()))
    now = datetime.now(UTC) + timedelta(minutes=2)
    assert await seal_due(resources, now + timedelta(hours=22)) == 0
    assert await seal_due(resources, now + timedelta(hours=24)) == 1


async def test_usage_of_a_reference_that_is_not_linked_stays_open_until_it_is(resources: Resources) -> None:
    await make_meter(resources)
    await record(resources, make_event(at=last_hour()))
    assert await seal_everything(resources, datetime.now(UTC)) == 0
    await make_customer(resources)
    assert await seal_everything(resources, datetime.now(UTC)) == 1


async def test_a_drafted_invoice_seals_what_is_still_in_the_buffer(resources: Resources) -> None:
    await make_customer(resources)
    await make_customer(resources, ref="globex", customer="cus_globex")
    await make_meter(resources)
    now = datetime.now(UTC)
    events = [make_event("a", at=now), make_event("b", at=now, customer_ref="globex")]
    await claim_and_append(resources.redis, events, now, dedupe_hours=72, max_bytes=10**9)
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("INSERT INTO seal_requests (customer, invoice) VALUES (:customer, 'in_1')"), {"customer": CUSTOMER}
        )
    assert await answer_seal_requests(resources, now) == 1
    assert await answer_seal_requests(resources, now) == 0
    assert await read_all(resources, "SELECT customer FROM usage_deliveries") == [(CUSTOMER,)]


async def test_what_the_ledger_has_is_sealed_while_redis_is_away(resources: Resources) -> None:
    now = datetime.now(UTC)
    await make_customer(resources)
    await make_meter(resources)
    await run(resources, "INSERT INTO seal_requests (customer, invoice) VALUES (:customer, 'in_1')", customer=CUSTOMER)
    events = [make_event(f"e{n}", at=last_hour() - timedelta(hours=n)) for n in range(3)]
    away = dataclasses.replace(resources, redis=create_redis(make_settings()))
    await record(resources, events[0])
    with pytest.raises(REDIS_ERRORS):
        await answer_seal_requests(away, now)
    await record(resources, events[1])
    with pytest.raises(REDIS_ERRORS):
        await seal_everything(away, now)
    assert len(await read_all(resources, DELIVERIES)) == 2
    # What waits in Redis is part of the invoice, too.
    await claim_and_append(resources.redis, events[2:], now, dedupe_hours=72, max_bytes=10**9)
    assert await answer_seal_requests(resources, now) == 1
    assert len(await read_all(resources, DELIVERIES)) == 3


async def test_a_boundary_learnt_after_the_events_cuts_their_total_before_it_is_sealed(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    start, boundary = last_hour(0), last_hour(30) + timedelta(seconds=7)
    later = boundary + timedelta(minutes=10)
    await record(
        resources,
        make_event("a", at=start, value="1"),
        make_event("b", at=boundary, value="2"),
        make_event("c", at=later, value="4"),
    )
    await make_boundaries(resources, boundary, later)
    assert await seal_everything(resources, datetime.now(UTC)) == 3
    assert await read_all(resources, DELIVERIES) == [
        (Decimal(1), unix(start)),
        (Decimal(2), unix(boundary)),
        (Decimal(4), unix(later)),
    ]
    misplaced = await read_all(
        resources,
        "SELECT e.id FROM usage_events e JOIN usage_totals t ON t.id = e.total_id"
        " WHERE e.timestamp < t.bucket_start OR e.timestamp >= t.bucket_end",
    )
    assert misplaced == []
    await conservation(resources)


async def test_a_cut_moves_any_number_of_events(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tallystick.usage.cuts.MOVED_AT_ONCE", 2)
    await make_customer(resources)
    await make_meter(resources)
    await record(resources, *(make_event(f"e{n}", at=last_hour(10 * n)) for n in range(6)))
    await make_boundaries(resources, last_hour(10))
    assert await seal_everything(resources, datetime.now(UTC)) == 2
    assert await read_all(resources, DELIVERIES) == [(1, unix(last_hour(0))), (5, unix(last_hour(10)))]
    await conservation(resources)


async def test_a_total_that_cannot_be_sealed_holds_up_no_other(resources: Resources) -> None:
    await make_meter(resources)
    for name in "abc":
        await make_customer(resources, ref=name, customer=f"cus_{name}")
    await record(resources, *(make_event(name, at=last_hour(), customer_ref=name) for name in "abc"))
    await run(
        resources,
        "ALTER TABLE usage_deliveries ADD CONSTRAINT not_this_one CHECK (customer <> 'cus_a') NOT VALID",
    )
    try:
        with pytest.raises(IntegrityError):
            await seal_everything(resources, datetime.now(UTC))
    finally:
        await run(resources, "ALTER TABLE usage_deliveries DROP CONSTRAINT not_this_one")
    sealed = "SELECT customer FROM usage_deliveries ORDER BY customer"
    assert await read_all(resources, sealed) == [("cus_b",), ("cus_c",)]
    assert await seal_everything(resources, datetime.now(UTC)) == 1
    assert await read_all(resources, sealed) == [("cus_a",), ("cus_b",), ("cus_c",)]


async def test_many_totals_that_cannot_be_sealed_do_not_hold_up_the_others_for_ever(resources: Resources) -> None:
    await make_meter(resources)
    for name in "az":
        await make_customer(resources, ref=name, customer=f"cus_{name}")
    hours = [last_hour() - timedelta(hours=n) for n in range(FAILURES_AT_MOST)]
    bad = [make_event(f"a{n}", at=at, customer_ref="a") for n, at in enumerate(hours)]
    await record(resources, *bad, make_event("z", at=last_hour(), customer_ref="z"))
    await run(resources, "ALTER TABLE usage_deliveries ADD CONSTRAINT not_these CHECK (customer <> 'cus_a') NOT VALID")
    sealed: list[tuple[object, ...]] = []
    try:
        # Each run begins with one of the two.
        for _ in range(40):
            with pytest.raises(IntegrityError):
                await seal_everything(resources, datetime.now(UTC))
            if sealed := await read_all(resources, "SELECT customer FROM usage_deliveries"):
                break
    finally:
        await run(resources, "ALTER TABLE usage_deliveries DROP CONSTRAINT not_these")
    assert sealed == [("cus_z",)]
    assert await seal_everything(resources, datetime.now(UTC)) == len(bad)


@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
async def test_sealing_looks_up_the_customers_of_its_totals_and_not_all(resources: Resources, analyzed: bool) -> None:
    await run(
        resources,
        "INSERT INTO customers (id, ref) SELECT 'cus_' || n, 'ref_' || n FROM generate_series(1, 500) n",
    )
    # Of a table that is hardly larger than what is sealed, each plan is as good as any.
    await run(
        resources,
        "INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end, events, sealed_events)"
        " SELECT 'ref_' || n, :meter, '2026-01-01 09:00Z', '2026-01-01 10:00Z', 1, 1 FROM generate_series(1, 2000) n",
        meter=METER,
    )
    refs = [f"ref_{number}" for number in range(1, 41)]
    await record(resources, *(make_event(ref, at=last_hour(), customer_ref=ref) for ref in refs))
    for statement in (*FORGET_STATISTICS, "ANALYZE") if analyzed else FORGET_STATISTICS:
        await run(resources, statement)
    ids = [id for (id,) in await read_all(resources, "SELECT id FROM usage_totals WHERE events <> sealed_events")]
    lock = LOCK_DUE.format(due="true", locked="")
    parameters = {"meters": [METER], "formulas": ["sum"], "ids": ids, "customers": refs}
    for statement, asked in ((FIND_CUSTOMERS.text, {"refs": refs}), (lock, parameters)):
        async with db.transaction(resources.engine) as connection:
            assert await count_looks(connection, statement, asked) <= 2 * len(refs)


async def test_two_workers_that_seal_at_once_make_one_delivery(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    await record(resources, *(make_event(f"e{n}", at=last_hour() - timedelta(hours=n)) for n in range(20)))
    now = datetime.now(UTC) + timedelta(minutes=2)
    sealed = await asyncio.gather(
        *(seal_due(resources, now) for _ in range(2)), *(seal_everything(resources, now) for _ in range(2))
    )
    assert sum(sealed) == 20
    assert (await conservation(resources)).pending == 20


@pytest.mark.parametrize("changed", [{"formula": "average"}, {"status": "inactive"}, {"event_time_window": "day"}])
async def test_usage_of_a_meter_that_cannot_be_told_stays_open(resources: Resources, changed: dict[str, str]) -> None:
    await make_customer(resources)
    await make_meter(resources, **changed)
    await record(resources, make_event(at=last_hour()))
    assert await seal_everything(resources, datetime.now(UTC)) == 0


async def test_a_total_with_more_digits_than_stripe_takes_is_split(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    at = last_hour()
    await record(
        resources,
        make_event("big", at=at, value="999999999999999"),
        make_event("small", at=at, value="0.000000000001"),
        make_event("one", at=at, value="1"),
    )
    await seal_everything(resources, datetime.now(UTC))
    values = [
        row[0] for row in await read_all(resources, "SELECT payload->>'value' FROM usage_deliveries ORDER BY seal")
    ]
    assert values == ["999999999999999", "1.000000000001"]
    assert (await conservation(resources)).pending == Decimal("1000000000000000.000000000001")


@given(st.integers(-(10**29), 10**29))
def test_the_parts_of_a_split_value_add_up_exactly(picos: int) -> None:
    with localcontext(prec=60):
        value = Decimal(picos).scaleb(-MAX_DECIMALS)
        parts = split_value(value)
        assert sum(parts) == value
    written = [plain(part).replace(".", "").lstrip("-").lstrip("0") for part in parts]
    assert parts == [0] or all(0 < len(digits) <= MAX_DIGITS for digits in written)


def test_a_delivery_carries_the_start_of_its_bucket_or_what_stripe_still_takes() -> None:
    start = datetime(2026, 3, 1, 7, 17, 23, tzinfo=UTC)
    end = start.replace(hour=8, minute=0, second=0)
    assert delivery_timestamp(start, end, start + timedelta(hours=1)) == start
    half_too_old = start + METER_EVENT_MAX_AGE + timedelta(minutes=5)
    assert start < delivery_timestamp(start, end, half_too_old) < end
    assert delivery_timestamp(start, end, half_too_old) >= half_too_old - METER_EVENT_MAX_AGE


async def test_what_is_too_old_for_stripe_is_parked_with_its_reason(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    now = datetime.now(UTC)
    await record(resources, make_event(at=now - timedelta(days=33)))
    await seal_everything(resources, now + timedelta(days=4))
    assert await read_all(resources, "SELECT state, reason FROM usage_deliveries") == [("parked", "older_than_35_days")]
    assert (await conservation(resources)).parked == 1
