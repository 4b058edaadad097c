"""Meters of every aggregation, from the ledger's events to what their deliveries say to Stripe."""

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from tallystick import db
from tallystick.resources import Resources
from tallystick.rules import Rules, RulesFile
from tallystick.usage import parts
from tallystick.usage.corrections import Wanted, record_correction
from tallystick.usage.events import UsageEvent
from tallystick.usage.ledger import record_events
from tallystick.usage.parked import resend
from tallystick.usage.sealing import seal_due, seal_everything
from tests.conftest import empty_stores
from tests.usage.making import (
    CUSTOMER,
    REF,
    conservation,
    last_hour,
    make_boundaries,
    make_customer,
    make_event,
    make_meter,
    read_all,
    run,
)
from tests.waiting import wait_until

RULES = """
[meters.sum]
properties = ["user", "region"]
[meters.max]
aggregation = "max"
[meters.unique_count]
aggregation = "unique_count"
property = "user"
[meters.records]
sender = "usage_records"
price = "price_records"
"""
FORMULAS = {"sum": "sum", "count": "count", "last": "last", "max": "last", "unique_count": "last"}

DAY = datetime.combine(date.today() - timedelta(days=3), datetime.min.time(), UTC)  # noqa: DTZ011
BOUNDARIES = [
    DAY,
    DAY + timedelta(minutes=41, seconds=17),
    DAY + timedelta(hours=2, seconds=3),
    DAY + timedelta(days=1),
]

DELIVERIES = "SELECT value, timestamp, events, state FROM usage_deliveries ORDER BY id"


@pytest.fixture
def ruled(resources: Resources, tmp_path: Path) -> Resources:
    """The resources, with rules for meters of every kind."""
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    return dataclasses.replace(resources, rules=RulesFile(path))


async def make_meters(resources: Resources) -> None:
    for name, formula in FORMULAS.items():
        await make_meter(resources, name, formula=formula)


async def record(resources: Resources, *events: UsageEvent) -> None:
    rules = resources.rules.rules.meters
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True, rules=rules)


def unix(at: datetime) -> int:
    return int(at.timestamp())


# The whole of it: whatever happens in whatever order, Stripe's own formula over what it was told gives what the events
# of the period come to.

Made = tuple[int, str, str, int, int, str]
made_events = st.lists(
    st.tuples(
        st.integers(0, 30),  # few ids, so that some are repeated
        st.sampled_from(list(FORMULAS)),
        st.sampled_from([REF, CUSTOMER]),
        # In tenths of a second, often the same second and often at a boundary.
        st.one_of(
            st.sampled_from([24770, 24769, 24771, 72030, 72029, 36000, 35999]),
            st.integers(0, 90).map(lambda n: 3000 + n),
            st.integers(0, 3 * 36000),
        ),
        st.integers(-30, 90),
        st.sampled_from(["ann", "bob", "eve"]),
    ),
    max_size=12,
)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes here
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(before=made_events, steps=st.lists(made_events, min_size=1, max_size=3))
async def test_what_stripe_computes_of_the_deliveries_is_what_the_events_of_the_period_come_to(
    ruled: Resources, before: list[Made], steps: list[list[Made]]
) -> None:
    await empty_stores(ruled)
    await make_meters(ruled)
    await make_customer(ruled)
    turn = 0
    for number, batch in enumerate([before, *steps]):
        if number == 1:
            await make_boundaries(ruled, *BOUNDARIES)  # learnt after the first events, before anything was sealed
        events = []
        for id, meter, ref, tenths, value, user in batch:
            turn += 1
            event = make_event(f"{meter}{id}", at=DAY + tenths * timedelta(milliseconds=100), value=str(value))
            properties = (("user", user),) if meter in ("sum", "unique_count") else ()
            event = event._replace(meter=meter, customer_ref=ref, properties=properties)
            event = event._replace(received_at=event.received_at + timedelta(microseconds=turn))
            events.append(event._replace(value=Decimal(1)) if meter == "count" else event)
        await record(ruled, *events)
        if number:
            await seal_everything(ruled, datetime.now(UTC))
    assert await told(ruled) == await used(ruled)
    await conservation(ruled)
    await check_rows(ruled)


async def used(resources: Resources) -> dict[tuple[str, datetime], Decimal]:
    """What the ledger's events come to, by meter and period, computed without any total."""
    rows = await read_all(
        resources, "SELECT meter, timestamp, received_at, source, id, value, properties ->> 'user' FROM usage_events"
    )
    events = defaultdict(list)
    for meter, timestamp, *rest in sorted(rows, key=lambda row: row[1:5]):
        events[str(meter), period_of(timestamp)].append(rest)
    return {key: come_to(key[0], rows) for key, rows in events.items()}


def come_to(meter: str, rows: Sequence[Any]) -> Decimal:
    values = [row[3] for row in rows]
    match meter:
        case "last":
            return Decimal(values[-1])
        case "max":
            return Decimal(max(values))
        case "unique_count":
            return Decimal(len({row[4] for row in rows}))
        case "count":
            return Decimal(len(rows))
    return sum(values, Decimal(0))


async def told(resources: Resources) -> dict[tuple[str, datetime], Decimal]:
    """What Stripe makes of the deliveries by its meters' formulas; they are sent in the order of their making."""
    rows = await read_all(
        resources, "SELECT event_name, timestamp, payload FROM usage_deliveries WHERE state = 'pending' ORDER BY id"
    )
    deliveries = defaultdict(list)
    for meter, second, payload in rows:
        deliveries[str(meter), period_of(datetime.fromtimestamp(int(str(second)), UTC))].append((second, payload))
    return {key: compute(FORMULAS[key[0]], rows) for key, rows in deliveries.items()}


def compute(formula: str, rows: Sequence[Any]) -> Decimal:
    values = [Decimal(payload["value"]) for _, payload in sorted(rows, key=lambda row: int(row[0]))]
    if formula == "count":
        return Decimal(len(values))
    return values[-1] if formula == "last" else sum(values, Decimal(0))


def period_of(at: Any) -> datetime:
    return max(boundary for boundary in BOUNDARIES if boundary <= at)


# Rows that no meter should leave behind.
WRONG = """
    -- An event is in its total's open seal, or some delivery carries it.
    SELECT e.id FROM usage_events e JOIN usage_totals t ON t.id = e.total_id
     WHERE e.seal <> t.seal
       AND NOT EXISTS (SELECT FROM usage_deliveries d WHERE d.total_id = t.id AND d.opened_seal = e.seal);
    SELECT id FROM usage_totals WHERE events <> sealed_events OR quantity <> sealed;
    SELECT t.id FROM usage_totals t JOIN usage_events e ON e.total_id = t.id WHERE t.aggregation = 'sum'
     GROUP BY t.id
    HAVING (SELECT coalesce(sum(quantity), 0) FROM usage_group_totals g WHERE g.total_id = t.id) <> sum(e.value);
    SELECT id FROM usage_deliveries WHERE aggregation = 'count' AND (value, events) <> (1, 1);
    -- A running value is said later than the one before it.
    SELECT d.id FROM usage_deliveries d
      JOIN usage_deliveries o ON o.event_name = d.event_name AND o.id < d.id AND o.timestamp = d.timestamp
     WHERE d.aggregation IN ('max', 'unique_count') AND d.state = 'pending' AND o.state = 'pending'
"""


async def check_rows(resources: Resources) -> None:
    for wrong in WRONG.split(";"):
        assert await read_all(resources, wrong) == [], wrong


# One by one.


async def test_each_event_of_a_count_meter_is_a_meter_event_at_its_own_second(
    ruled: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "COUNTED_PER_SEAL", 3)
    await make_meters(ruled)
    await make_customer(ruled)
    start = last_hour(0)
    times = [start + timedelta(minutes=n, milliseconds=700) for n in range(8)]
    await record(ruled, *(make_event(f"e{n}", at=at, meter="count") for n, at in enumerate(times)))
    assert await seal_due(ruled, start + timedelta(minutes=61)) > 0
    assert await read_all(ruled, "SELECT value, timestamp, events FROM usage_deliveries ORDER BY timestamp") == [
        (1, unix(at), 1) for at in times
    ]
    carried = await read_all(
        ruled,
        "SELECT d.timestamp, e.timestamp FROM usage_events e JOIN usage_deliveries d"
        " ON d.total_id = e.total_id AND d.opened_seal = e.seal ORDER BY 1",
    )
    assert carried == [(unix(at), at) for at in times]
    await record(ruled, make_event("late", at=start, meter="count"))
    await seal_everything(ruled, datetime.now(UTC))
    assert len(await read_all(ruled, DELIVERIES)) == 9
    await check_rows(ruled)
    assert (await conservation(ruled)).pending == 9


async def test_counted_events_that_stay_open_are_not_written_anew(
    ruled: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "COUNTED_PER_SEAL", 3)
    monkeypatch.setattr(parts, "COUNTED_PER_TRANSACTION", 3)
    await make_meters(ruled)
    await make_customer(ruled)
    await record(ruled, *(make_event(f"e{n}", at=last_hour(n), meter="count") for n in range(8)))
    writers = "SELECT e.xmin::text::bigint FROM usage_events e ORDER BY 1"
    (recorded,) = set(await read_all(ruled, writers))
    await run(ruled, "ALTER TABLE usage_deliveries ADD CONSTRAINT few CHECK (seal <= 3) NOT VALID")
    try:
        with pytest.raises(IntegrityError):
            await seal_everything(ruled, datetime.now(UTC))
    finally:
        await run(ruled, "ALTER TABLE usage_deliveries DROP CONSTRAINT few")
    written = await read_all(ruled, writers)
    assert written.count(recorded) == 5
    assert len(written) == 8
    await seal_everything(ruled, datetime.now(UTC))
    assert len(await read_all(ruled, DELIVERIES)) == 8
    await check_rows(ruled)


async def test_a_counted_event_is_told_under_one_name_whatever_was_sealed_before_it(ruled: Resources) -> None:
    names = []
    first, second = (make_event(name, at=last_hour(minute), meter="count") for minute, name in enumerate(("a", "b")))
    for one, other in ((first, second), (second, first)):
        await empty_stores(ruled)  # as a database that was restored, and sealed what it had in another order
        await make_meters(ruled)
        await make_customer(ruled)
        for event in (one, other):
            await record(ruled, event)
            await seal_everything(ruled, datetime.now(UTC))
        names.append(await read_all(ruled, "SELECT timestamp, identifier FROM usage_deliveries ORDER BY 1"))
    assert len(names[0]) == 2
    assert names[0] == names[1]


async def test_many_events_of_a_count_meter_are_not_left_to_gather(
    ruled: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tallystick.usage.sealing.COUNTED_PER_SEAL", 3)
    await make_meters(ruled)
    await make_customer(ruled)
    start = last_hour(0)
    await record(ruled, *(make_event(f"e{n}", at=start, meter="count") for n in range(2)))
    assert await seal_due(ruled, start + timedelta(minutes=1)) == 0
    await record(ruled, make_event("third", at=start, meter="count"))
    assert await seal_due(ruled, start + timedelta(minutes=1)) == 1


async def test_of_a_last_meter_nothing_is_said_that_is_older_than_what_was_said(ruled: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    start = last_hour(0)
    now = datetime.now(UTC)
    await record(
        ruled,
        make_event("a", at=start + timedelta(minutes=9, milliseconds=900), value="7", meter="last"),
        make_event("b", at=start + timedelta(minutes=5), value="99", meter="last"),
    )
    await seal_everything(ruled, now)
    within_the_second = start + timedelta(minutes=9)
    await record(
        ruled,
        make_event("c", at=start + timedelta(minutes=8), value="3", meter="last"),
        make_event("other reference", at=within_the_second, value="4", meter="last", customer_ref=CUSTOMER),
    )
    await seal_everything(ruled, now)
    await record(ruled, make_event("d", at=start + timedelta(minutes=10), value="2", meter="last"))
    await seal_everything(ruled, now)
    assert await read_all(ruled, DELIVERIES) == [
        (7, unix(within_the_second), 2, "pending"),
        (4, unix(within_the_second), 1, "voided"),
        (7, unix(within_the_second), 1, "voided"),
        (2, unix(start + timedelta(minutes=10)), 1, "pending"),
    ]
    assert await read_all(ruled, "SELECT DISTINCT reason FROM usage_deliveries WHERE state = 'voided'") == [
        ("superseded",)
    ]


async def test_a_running_value_is_said_later_each_time_and_only_when_it_has_changed(ruled: Resources) -> None:
    await make_meters(ruled)
    hours = [last_hour(0) - timedelta(hours=n) for n in (2, 1, 0)]
    await make_customer(ruled, boundaries=(hours[0] - timedelta(days=9), hours[2]))
    now = datetime.now(UTC)
    for name, at, value in (
        ("a", hours[1], "5"),
        ("late and greater", hours[0], "8"),
        ("late and less", hours[0], "6"),
        ("of the next period", hours[2], "1"),
    ):
        await record(ruled, make_event(name, at=at, value=value, meter="max"))
        await seal_everything(ruled, now)
    assert await read_all(ruled, DELIVERIES) == [
        (5, unix(hours[1]), 1, "pending"),
        (8, unix(hours[1]) + 1, 1, "pending"),
        (8, unix(hours[0]), 1, "voided"),
        (1, unix(hours[2]), 1, "pending"),
    ]


async def test_a_running_value_never_leaves_its_period(ruled: Resources) -> None:
    await make_meters(ruled)
    start = last_hour(0)
    await make_customer(ruled, boundaries=(start - timedelta(days=9), start, start + timedelta(seconds=2)))
    for value in ("1", "2", "3", "4"):
        await record(ruled, make_event(value, at=start, value=value, meter="max"))
        await seal_everything(ruled, datetime.now(UTC))
    # Of two values at one second Stripe could not tell which is the later one.
    assert [(value, at, state) for value, at, _, state in await read_all(ruled, DELIVERIES)] == [
        (1, unix(start), "pending"),
        (2, unix(start) + 1, "pending"),
        (3, unix(start) + 1, "parked"),
        (4, unix(start) + 1, "parked"),
    ]
    assert await read_all(ruled, "SELECT DISTINCT reason FROM usage_deliveries WHERE state = 'parked'") == [
        ("no_second_left",)
    ]
    ((identifier,),) = await read_all(ruled, "SELECT identifier FROM usage_deliveries WHERE value = 3")
    now = datetime.now(UTC)
    async with db.transaction(ruled.engine) as connection:
        (decision,) = await resend(connection, [str(identifier)], ruled.rules.rules, now, by="a test", carried=True)
    assert decision.refused == "no_second_left"
    assert (await conservation(ruled)).events_by_state["parked"] == 2


async def test_a_running_value_that_would_be_too_far_ahead_stays_open_until_there_is_room(ruled: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    now = last_hour()
    await record(ruled, make_event("a", at=now, value="5", meter="max"))
    await seal_everything(ruled, now)
    ahead = unix(now) + 150
    await run(ruled, "UPDATE usage_deliveries SET timestamp = :ahead", ahead=ahead)
    await record(ruled, make_event("b", at=now, value="8", meter="max"))
    assert await seal_everything(ruled, now) == 0
    assert await seal_everything(ruled, now + timedelta(seconds=1)) == 1
    assert [row[:2] for row in await read_all(ruled, DELIVERIES)] == [(5, ahead), (8, ahead + 1)]


async def test_running_values_are_said_by_one_worker_after_the_other(ruled: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    await record(ruled, make_event("a", at=last_hour(), value="5", meter="max"))

    async def waits() -> bool:
        return bool(await read_all(ruled, "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))

    async with db.transaction(ruled.engine) as another:
        await another.execute(parts.TAKE_TURN, {"lock": parts.RUNNING_LOCK, "name": f"{CUSTOMER} max"})
        sealing = asyncio.create_task(seal_everything(ruled, datetime.now(UTC)))
        await wait_until(waits)
    assert await sealing == 1


async def test_unique_values_are_counted_over_all_references_and_buckets_of_the_period(ruled: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    for n, (ref, user) in enumerate([(REF, "ann"), (CUSTOMER, "bob"), (REF, "bob"), (REF, "ann"), (CUSTOMER, "eve")]):
        event = make_event(
            f"e{n}", at=last_hour(0) - timedelta(hours=n), value="50", meter="unique_count", customer_ref=ref
        )
        event = event._replace(properties=(("user", user),))
        await record(ruled, event, event._replace(id=f"again{n}"))
        await record(ruled, event._replace(id=f"once more{n}"))
    await seal_everything(ruled, datetime.now(UTC))
    assert [row[0] for row in await read_all(ruled, DELIVERIES) if row[3] == "pending"] == [3]
    assert await read_all(ruled, "SELECT quantity FROM usage_totals ORDER BY bucket_start") == [(1,)] * 5


@pytest.mark.parametrize(("meter", "running"), [("max", [5, 3]), ("unique_count", [2, 1])])
async def test_a_running_value_has_nothing_of_what_another_customer_was_told(
    ruled: Resources, client: httpx.AsyncClient, meter: str, running: list[int]
) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    await make_customer(ruled, ref="other", customer="cus_other")
    users = {"old": "ann", "old too": "bob", "new": "eve"}
    used = {
        id: make_event(id, at=last_hour() - timedelta(hours=n), value=value, meter=meter, properties=(("user", user),))
        for n, ((id, user), value) in enumerate(zip(users.items(), ("5", "4", "3"), strict=True))
    }
    await record(ruled, used["old"], used["old too"])
    await seal_everything(ruled, datetime.now(UTC))
    await run(ruled, "INSERT INTO customer_links (ref, customer) VALUES (:ref, 'cus_other')", ref=REF)
    await record(ruled, used["new"])
    await seal_everything(ruled, datetime.now(UTC))
    told = "SELECT customer, value FROM usage_deliveries WHERE state = 'pending' ORDER BY id"
    assert await read_all(ruled, told) == [(CUSTOMER, running[0]), ("cus_other", running[1])]
    # As docs/reading.md says: shown is what was used under the name, whoever was billed.
    asked = {"customer": "cus_other", "meter": meter, "from": (last_hour(0) - timedelta(hours=3)).isoformat()}
    shown = (await client.get("/v1/usage", params=asked | {"window": "billing_period"})).json()["data"]
    assert sum(row["events"] for row in shown) == 3


async def test_a_total_keeps_the_aggregation_that_it_was_opened_with(ruled: Resources, resources: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    at = last_hour()
    await record(resources, make_event("before", at=at, value="9", meter="max"))
    await record(ruled, make_event("after", at=at + timedelta(minutes=1), value="4", meter="max"))
    await record(ruled, make_event("next hour", at=at - timedelta(hours=1), value="4", meter="max"))
    assert await read_all(ruled, "SELECT aggregation, quantity FROM usage_totals ORDER BY id") == [
        ("last", 4),
        ("max", 4),
    ]


async def test_a_total_counts_the_property_that_it_was_opened_with(ruled: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    at = last_hour(20)

    def used(id: str, user: str, team: str, at: datetime = at) -> UsageEvent:
        return make_event(id, at=at, meter="unique_count", properties=(("team", team), ("user", user)))

    await record(ruled, used("a", "ann", "red"), used("b", "bob", "red"), used("c", "eve", "red"))
    other = {"meters": {"unique_count": {"aggregation": "unique_count", "property": "team", "properties": ["user"]}}}
    ruled.rules.rules = Rules.model_validate(other)
    await record(ruled, used("d", "ann", "blue"), used("e", "joe", "red", at + timedelta(minutes=20)))
    await record(ruled, *(used(f"next {user}", user, "red", at - timedelta(hours=1)) for user in ("ann", "bob")))
    quantities = "SELECT quantity FROM usage_totals ORDER BY bucket_start"
    assert await read_all(ruled, quantities) == [(1,), (4,)], "teams in the new hour, users in the one that ran"
    correction = Wanted("tests", "fix", "b", None, "void", None, "a test")
    async with db.transaction(ruled.engine) as connection:
        await record_correction(connection, correction, ruled.rules.rules, datetime.now(UTC))
    assert await read_all(ruled, quantities) == [(1,), (3,)]
    await make_boundaries(ruled, at + timedelta(minutes=10))
    ruled.rules.rules = Rules()
    await seal_everything(ruled, datetime.now(UTC))
    assert await read_all(ruled, quantities) == [(1,), (2,), (1,)]


async def test_a_delivery_names_its_sender(ruled: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    for name in ("sum", "records"):
        await record(ruled, make_event(name, at=last_hour(), meter=name, value="3"))
    streaming = dataclasses.replace(ruled, settings=ruled.settings.model_copy(update={"sender": "meter_event_stream"}))
    await seal_everything(streaming, datetime.now(UTC))
    assert await read_all(
        ruled, "SELECT event_name, sender, payload, value, aggregation FROM usage_deliveries ORDER BY event_name"
    ) == [
        ("records", "usage_records", {"price": "price_records"}, 3, "sum"),
        ("sum", "meter_event_stream", {"stripe_customer_id": CUSTOMER, "value": "3"}, 3, "sum"),
    ]


async def test_usage_records_are_told_before_their_period_ends_though_the_hour_has_not(ruled: Resources) -> None:
    await make_meters(ruled)
    end = last_hour(45)
    await make_customer(ruled, boundaries=(end - timedelta(days=9), end))
    await record(
        ruled, make_event("a", at=last_hour(5), meter="records"), make_event("b", at=last_hour(5), meter="sum")
    )
    assert await seal_due(ruled, last_hour(20)) == 0
    assert await seal_due(ruled, last_hour(31)) == 1
    await record(ruled, make_event("c", at=last_hour(5), meter="records"))
    assert await seal_due(ruled, last_hour(31) + timedelta(seconds=59)) == 0
    assert await seal_due(ruled, last_hour(32)) == 1
    assert await read_all(ruled, "SELECT DISTINCT event_name FROM usage_deliveries") == [("records",)]


async def test_counted_events_that_are_too_old_for_stripe_are_parked_as_one(ruled: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    now = datetime.now(UTC)
    at = now - timedelta(days=33)
    events = [make_event(name, at=at.replace(minute=0), meter="count") for name in "abc"]
    await record(ruled, *events, make_event("latest", at=at, meter="last", value="5"))
    await seal_everything(ruled, now + timedelta(days=4))
    assert [row[2:] for row in await read_all(ruled, DELIVERIES)] == [(3, "parked"), (1, "parked")]
    assert (await conservation(ruled)).events == 4


async def test_parts_by_property_are_moved_with_the_events_when_a_total_is_cut(ruled: Resources) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    boundary = last_hour(30)
    for n, (minute, region) in enumerate([(10, "eu"), (40, "eu"), (50, "us")]):
        event = make_event(f"e{n}", at=last_hour(minute), value="2", meter="sum")
        await record(ruled, event._replace(properties=(("region", region),)))
    await make_boundaries(ruled, boundary)
    await seal_everything(ruled, datetime.now(UTC))
    assert await read_all(
        ruled,
        "SELECT t.bucket_start, g.value, g.quantity, g.events FROM usage_group_totals g"
        " JOIN usage_totals t ON t.id = g.total_id ORDER BY 1, 2",
    ) == [(last_hour(0), "eu", 2, 1), (boundary, "eu", 2, 1), (boundary, "us", 2, 1)]


@pytest.mark.parametrize(
    ("meter", "before", "behind"), [("count", 2, 2), ("last", 9, 5), ("max", 9, 7), ("unique_count", 2, 1)]
)
async def test_a_total_that_is_cut_comes_to_what_its_own_events_come_to(
    ruled: Resources, meter: str, before: int, behind: int
) -> None:
    await make_meters(ruled)
    await make_customer(ruled)
    for minute, value, user in ((10, "2", "ann"), (20, "9", "bob"), (40, "7", "bob"), (50, "5", "bob")):
        value = "1" if meter == "count" else value
        event = make_event(f"e{minute}", at=last_hour(minute), value=value, meter=meter)
        await record(ruled, event._replace(properties=(("user", user),)))
    await make_boundaries(ruled, last_hour(30))
    await seal_everything(ruled, datetime.now(UTC))
    assert await read_all(ruled, "SELECT aggregation, quantity FROM usage_totals ORDER BY bucket_start") == [
        (meter, before),
        (meter, behind),
    ]
    await check_rows(ruled)


async def test_usage_of_a_meter_that_was_made_anew_with_another_formula_stays_open(ruled: Resources) -> None:
    await make_meter(ruled, "latest", formula="sum")
    await make_customer(ruled)
    await record(ruled, make_event("a", at=last_hour(), meter="latest"))
    await run(ruled, "UPDATE meters SET formula = 'last'")
    assert await seal_everything(ruled, datetime.now(UTC)) == 0
    assert (await conservation(ruled)).open == 1
