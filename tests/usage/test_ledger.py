import asyncio
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.buffer import IDS, claim_and_append
from tallystick.usage.drain import drain
from tallystick.usage.events import UsageEvent
from tallystick.usage.ledger import Recorded, record_events
from tallystick.usage.sealing import seal_everything
from tests.conftest import empty_stores
from tests.usage.making import (
    conservation,
    last_hour,
    make_boundaries,
    make_customer,
    make_event,
    make_meter,
    read_all,
    run,
    wait_until_blocked,
)


async def record(resources: Resources, *events: UsageEvent, accepted_already: bool = False) -> list[Recorded]:
    async with db.transaction(resources.engine) as connection:
        return await record_events(connection, events, accepted_already=accepted_already)


async def test_an_event_is_recorded_once_and_added_to_its_total(resources: Resources) -> None:
    event = make_event(at=last_hour(), value="1.5")
    assert await record(resources, event) == ["recorded"]
    assert await record(resources, event, event) == ["duplicate", "duplicate"]
    assert await read_all(resources, "SELECT quantity, events, seal FROM usage_totals") == [(Decimal("1.5"), 1, 1)]
    assert await read_all(resources, "SELECT t.id = e.total_id, e.seal FROM usage_events e, usage_totals t") == [
        (True, 1)
    ]


async def test_copies_within_one_batch_count_once(resources: Resources) -> None:
    event = make_event(at=last_hour())
    assert await record(resources, event, event._replace(value=Decimal(2)), event) == [
        "recorded",
        "conflict",
        "duplicate",
    ]
    assert (await conservation(resources)).accepted == 1


async def test_two_sources_may_use_the_same_id(resources: Resources) -> None:
    event = make_event(at=last_hour())
    assert await record(resources, event, event._replace(source="other")) == ["recorded", "recorded"]


async def test_the_same_id_with_another_body_is_a_conflict_and_kept_if_it_was_accepted(resources: Resources) -> None:
    event = make_event(at=last_hour(), value="1")
    other = event._replace(value=Decimal(7))
    await record(resources, event)
    assert await record(resources, other) == ["conflict"]
    assert await read_all(resources, "SELECT * FROM usage_conflicts") == []
    assert await record(resources, other, accepted_already=True) == ["conflict"]
    assert await record(resources, other, accepted_already=True) == ["conflict"]
    assert await read_all(resources, "SELECT id, value FROM usage_conflicts") == [("e1", Decimal(7))]
    assert (await conservation(resources)).accepted == 1


async def test_properties_are_part_of_what_an_event_says(resources: Resources) -> None:
    event = make_event(at=last_hour())._replace(properties=(("region", "eu"), ("user", "ann")))
    assert await record(resources, event) == ["recorded"]
    assert await record(resources, event, event._replace(properties=event.properties[:1])) == ["duplicate", "conflict"]
    assert await record(resources, event._replace(properties=())) == ["conflict"]


async def test_an_event_without_timestamp_counts_once_even_if_its_copy_was_stamped_on_another_day(
    resources: Resources,
) -> None:
    before_midnight = datetime.now(UTC).replace(hour=23, minute=59, second=59) - timedelta(days=1)
    first = make_event(timestamp=before_midnight, stamped=True)
    copy = first._replace(timestamp=before_midnight + timedelta(seconds=2))
    assert copy.timestamp.date() != first.timestamp.date()
    assert await record(resources, copy) == ["recorded"]
    assert await record(resources, first) == ["duplicate"]
    assert await record(resources, first._replace(value=Decimal(3))) == ["conflict"]
    assert (await conservation(resources)).accepted == 1


async def test_many_drains_at_once_neither_deadlock_nor_double(resources: Resources) -> None:
    customers = [f"customer-{n}" for n in range(20)]
    events = [
        make_event(f"{customer}-{n}", at=last_hour(), customer_ref=customer) for customer in customers for n in range(5)
    ]
    results = await asyncio.gather(
        *(record(resources, *(events if turn % 2 else reversed(events))) for turn in range(5))
    )
    assert sum(batch.count("recorded") for batch in results) == len(events)
    assert (await conservation(resources)).accepted == len(events)


async def test_drains_and_direct_writers_on_the_same_totals_neither_deadlock_nor_double(resources: Resources) -> None:
    """Two drains share what is buffered, in which each event is three times, while a third one writes past them."""
    await make_customer(resources)
    for name in ("api_requests", "latest"):
        await make_meter(resources, name, formula="last" if name == "latest" else "sum")
    now = datetime.now(UTC)
    events = [
        make_event(f"{meter}{n}", at=last_hour() - timedelta(hours=n % 3), customer_ref=f"c{n % 7}", meter=meter)
        for n in range(60)
        for meter in ("api_requests", "latest")
    ]
    turned = [*events[60:], *reversed(events[:60])]
    for start in range(0, len(events), 20):
        for order in (events, turned, events[::-1]):
            batch = order[start : start + 20]
            # Claimed anew each time, as by processes of which each had lost the other's answer.
            await claim_and_append(resources.redis, batch, now, dedupe_hours=72, max_bytes=10**9)
            async for key in resources.redis.scan_iter(f"{IDS}:*"):
                await resources.redis.delete(key)
    recorded = await asyncio.gather(
        drain(resources, now),
        drain(resources, now),
        *(record(resources, *order[start : start + 15]) for order in (turned, events) for start in range(0, 120, 15)),
    )
    assert sum(number for number in recorded if isinstance(number, int)) == 3 * len(events)
    assert (await conservation(resources)).events == len(events)


async def test_usage_on_both_sides_of_a_boundary_in_one_hour_goes_to_two_totals(resources: Resources) -> None:
    boundary = last_hour(17) + timedelta(seconds=23)
    await make_customer(resources, boundaries=(boundary,))
    await record(
        resources,
        make_event("before", at=boundary - timedelta(microseconds=1), value="1"),
        make_event("at", at=boundary, value="2"),
        make_event("after", at=boundary + timedelta(seconds=1), value="4"),
    )
    hour = boundary.replace(minute=0, second=0)
    assert await read_all(resources, "SELECT bucket_start, bucket_end, quantity FROM usage_totals ORDER BY 1") == [
        (hour, boundary, Decimal(1)),
        (boundary, hour + timedelta(hours=1), Decimal(6)),
    ]


async def test_a_boundary_that_was_learnt_later_leaves_nothing_behind_it_in_the_total_before_it(
    resources: Resources,
) -> None:
    await make_customer(resources)
    await make_meter(resources)
    boundary = last_hour(20)
    await record(resources, make_event("before", at=boundary - timedelta(minutes=5)))
    await record(resources, make_event("behind", at=boundary + timedelta(minutes=5)))
    await make_boundaries(resources, boundary)
    await record(resources, make_event("before too", at=boundary - timedelta(minutes=4)))
    await record(resources, make_event("behind too", at=boundary + timedelta(minutes=4), value="4"))
    await seal_everything(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT bucket_start, bucket_end, quantity FROM usage_totals ORDER BY 1") == [
        (last_hour(0), boundary, Decimal(2)),
        (boundary, last_hour(60), Decimal(5)),
    ]


async def test_usage_behind_a_cut_that_only_an_earlier_customer_had_goes_into_a_total_behind_it(
    resources: Resources,
) -> None:
    boundary, later = last_hour(30), last_hour(45)
    await make_customer(resources, boundaries=(boundary,))
    await make_meter(resources)
    await record(resources, make_event("before", at=last_hour(10)))
    await run(resources, "UPDATE customers SET ref = NULL")
    await make_customer(resources, customer="cus_other")
    events = [make_event("behind", at=last_hour(50)), make_event("before too", at=last_hour(20), value="2")]
    await record(resources, *events, make_event("of a group", at=last_hour(40), properties={"region": "eu"}))
    await make_boundaries(resources, later, customer="cus_other")
    await seal_everything(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT bucket_start, bucket_end, quantity FROM usage_totals ORDER BY 1") == [
        (last_hour(0), boundary, Decimal(3)),
        (boundary, later, Decimal(1)),
        (later, last_hour(60), Decimal(1)),
    ]
    await conservation(resources)


async def test_a_cut_while_usage_waits_for_its_total_leaves_nothing_behind_it_in_that_total(
    resources: Resources,
) -> None:
    await make_customer(resources)
    await make_meter(resources)
    boundary = last_hour(20)
    await record(resources, make_event("first", at=last_hour(0)))
    async with db.transaction(resources.engine) as sealing:
        await sealing.execute(text("SELECT FROM usage_totals FOR UPDATE"))
        waiting = asyncio.create_task(record(resources, make_event("behind", at=boundary + timedelta(minutes=5))))
        await wait_until_blocked(resources)
        # What a webhook and a seal do meanwhile.
        await make_boundaries(resources, boundary)
        await sealing.execute(text("UPDATE usage_totals SET bucket_end = :at"), {"at": boundary})
    assert await waiting == ["recorded"]
    assert await read_all(resources, "SELECT bucket_start, bucket_end, quantity FROM usage_totals ORDER BY 1") == [
        (last_hour(0), boundary, Decimal(1)),
        (boundary, last_hour(60), Decimal(1)),
    ]


DAY = datetime.combine(date.today() - timedelta(days=3), datetime.min.time(), UTC)  # noqa: DTZ011
event_copies = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "d"]), st.sampled_from(["acme", "globex"]), st.integers(0, 7200)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(event_copies, min_size=1, max_size=4))
async def test_whatever_is_repeated_in_whatever_batches_each_id_counts_once(
    resources: Resources, batches: list[list[tuple[str, str, int]]]
) -> None:
    await empty_stores(resources)
    first_bodies: dict[str, tuple[str, int]] = {}
    for batch in batches:
        events = [
            make_event(id, at=DAY + timedelta(seconds=second), customer_ref=ref, value=str(second))
            for id, ref, second in batch
        ]
        results = await record(resources, *events)
        for (id, ref, second), result in zip(batch, results, strict=True):
            known = first_bodies.get(id)
            assert result == ("recorded" if known is None else "duplicate" if known == (ref, second) else "conflict")
            first_bodies.setdefault(id, (ref, second))
    counted = await conservation(resources)
    assert counted.events == len(first_bodies)
    assert counted.accepted == sum(second for _, second in first_bodies.values())
    wrong = await read_all(
        resources,
        "SELECT t.id FROM usage_totals t LEFT JOIN usage_events e ON e.total_id = t.id"
        " GROUP BY t.id HAVING t.quantity <> coalesce(sum(e.value), 0) OR t.events <> count(e.id)",
    )
    assert wrong == []
