import asyncio
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import cast

import pytest
from redis.asyncio import Redis
from sqlalchemy.exc import IntegrityError

from tallystick import db
from tallystick.errors import TooBusy
from tallystick.resources import Resources
from tallystick.usage import buffer
from tallystick.usage.buffer import BufferUnavailable, acknowledge, buffered_bytes, claim_and_append, read_entries
from tallystick.usage.drain import drain
from tallystick.usage.events import UsageEvent
from tallystick.usage.ledger import record_events
from tests.usage.making import conservation, make_event
from tests.waiting import wait_until

NOW = datetime.now(UTC)
HOUR_AGO = NOW - timedelta(hours=1)


async def claim(redis: Redis, *events: UsageEvent, now: datetime = NOW, max_bytes: int = 10**9) -> list[str]:
    return list(await claim_and_append(redis, events, now, dedupe_hours=72, max_bytes=max_bytes))


async def test_an_id_is_taken_once_and_another_body_is_a_conflict(resources: Resources) -> None:
    event = make_event(at=HOUR_AGO, value="1.50")
    other = event._replace(value=Decimal(2))
    assert await claim(resources.redis, event, event, other) == ["accepted", "duplicate", "conflict"]
    assert await claim(resources.redis, event._replace(value=Decimal("1.5")), other) == ["duplicate", "conflict"]
    assert await claim(resources.redis, event._replace(source="other")) == ["accepted"]


async def test_a_repeat_without_timestamp_is_the_same_event_at_another_time(resources: Resources) -> None:
    event = make_event(timestamp=HOUR_AGO, stamped=True)
    assert await claim(resources.redis, event, event._replace(timestamp=NOW)) == ["accepted", "duplicate"]


async def test_an_id_is_remembered_for_the_whole_window_and_then_expires(resources: Resources) -> None:
    event = make_event(at=HOUR_AGO)
    await claim(resources.redis, event)
    for hours in (1, 47, 72):
        assert await claim(resources.redis, event, now=NOW + timedelta(hours=hours)) == ["duplicate"]
    lifetimes = [await resources.redis.ttl(key) async for key in resources.redis.scan_iter(f"{buffer.IDS}:*")]
    assert lifetimes
    assert all(72 * 3600 <= ttl <= 108 * 3600 for ttl in lifetimes)


async def test_only_new_events_are_appended_and_they_come_out_as_they_went_in(resources: Resources) -> None:
    events = [make_event(f"e{n}", at=HOUR_AGO + timedelta(microseconds=n), value=f"0.{n}7") for n in range(3)]
    await claim(resources.redis, events[0])
    await claim(resources.redis, *events)
    entries = await read_entries(resources.redis, "tests", 10, reclaim_after=timedelta(minutes=1))
    assert [event for entry in entries for event in entry.events] == events
    await acknowledge(resources.redis, entries)
    await acknowledge(resources.redis, entries)
    assert await buffered_bytes(resources.redis) == 0


async def test_properties_lie_in_the_stream_and_what_an_older_release_left_there_is_read_too(
    resources: Resources,
) -> None:
    plain_event = make_event("plain", at=HOUR_AGO)
    event = plain_event._replace(id="e", properties=(("region", "eu"), ("user", "ann")))
    await claim(resources.redis, plain_event, event)
    ((_, fields),) = cast("list[tuple[bytes, dict[bytes, bytes]]]", await resources.redis.xrange(buffer.STREAM))
    assert [len(written) for written in json.loads(fields[b"events"])] == [8, 9]
    assert buffer.read_batch(fields[b"events"]) == [plain_event, event]
    assert await claim(resources.redis, event._replace(properties=event.properties[:1])) == ["conflict"]


async def test_what_a_remembered_id_costs_is_measured(resources: Resources) -> None:
    assert await buffer.measure_ids(resources.redis) == (0, 0)
    await claim(resources.redis, *(make_event(f"e{n}", at=HOUR_AGO) for n in range(200)))
    size, number = await buffer.measure_ids(resources.redis)
    assert number == 200
    assert 16 * number < size < 500 * number


async def test_above_the_high_water_mark_nothing_is_taken(resources: Resources) -> None:
    first, second = make_event("first", at=HOUR_AGO), make_event("second", at=HOUR_AGO)
    assert await claim(resources.redis, first, max_bytes=10) == ["accepted"]
    with pytest.raises(TooBusy):
        await claim(resources.redis, second, max_bytes=10)
    await drain(resources, NOW)
    assert await claim(resources.redis, second, max_bytes=10) == ["accepted"]


async def test_a_server_that_forgot_the_script_is_taught_again(resources: Resources) -> None:
    await claim(resources.redis, make_event("first"))
    await resources.redis.script_flush()
    assert await claim(resources.redis, make_event("second")) == ["accepted"]


async def test_without_an_append_only_file_nothing_is_promised(resources: Resources) -> None:
    await resources.redis.config_set("appendonly", "no")
    try:
        with pytest.raises(BufferUnavailable):
            await claim(resources.redis, make_event())
    finally:
        await resources.redis.config_set("appendonly", "yes")
        await wait_until(lambda: rewritten(resources.redis))


async def rewritten(redis: Redis) -> bool:
    """Whether the new append-only file is complete: until then nothing is synced to it."""
    return not (await redis.info("persistence"))["aof_rewrite_in_progress"]


async def test_a_batch_that_a_dead_drain_left_behind_is_taken_over(resources: Resources) -> None:
    await claim(resources.redis, make_event("one", at=HOUR_AGO), make_event("two", at=HOUR_AGO))
    assert len(await read_entries(resources.redis, "dead", 10, reclaim_after=timedelta(minutes=1))) == 1
    assert await drain(resources, NOW) == 0
    assert await drain(resources, NOW, reclaim_after=timedelta(0)) == 2
    assert (await conservation(resources)).events == 2


async def test_a_drain_that_died_after_its_commit_counts_nothing_twice(resources: Resources) -> None:
    await claim(resources.redis, make_event("one", at=HOUR_AGO))
    (entry,) = await read_entries(
        resources.redis, "dies before it acknowledges", 10, reclaim_after=timedelta(minutes=1)
    )
    async with db.transaction(resources.engine) as connection:
        assert await record_events(connection, entry.events, accepted_already=True) == ["recorded"]
    assert await drain(resources, NOW, reclaim_after=timedelta(0)) == 1
    assert (await conservation(resources)).events == 1
    assert await buffered_bytes(resources.redis) == 0


async def test_several_drains_share_the_work(resources: Resources) -> None:
    for n in range(30):
        await claim(resources.redis, make_event(f"e{n}", at=HOUR_AGO))
    drained = await asyncio.gather(*(drain(resources, NOW) for _ in range(3)))
    assert sum(drained) == 30
    assert (await conservation(resources)).events == 30


async def test_a_batch_that_the_ledger_cannot_take_does_not_hold_up_the_others(resources: Resources) -> None:
    no_partition = make_event("long ago", at=HOUR_AGO.replace(year=2001))
    await claim(resources.redis, no_partition)
    await claim(resources.redis, make_event("good", at=HOUR_AGO))
    with pytest.raises(IntegrityError):
        await drain(resources, NOW)
    assert (await conservation(resources)).events == 1
    assert await buffered_bytes(resources.redis) > 0


async def test_fewer_synced_replicas_than_asked_for_promise_nothing(resources: Resources) -> None:
    with pytest.raises(BufferUnavailable):
        await claim_and_append(resources.redis, [make_event()], NOW, dedupe_hours=72, max_bytes=10**9, replicas=1)
