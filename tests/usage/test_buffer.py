import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy.exc import IntegrityError

from tallystick import db
from tallystick.config import Settings
from tallystick.errors import TooBusy
from tallystick.resources import Resources
from tallystick.usage import buffer
from tallystick.usage.buffer import (
    CALLS_AT_ONCE,
    Buffer,
    BufferUnavailable,
    Claim,
    acknowledge,
    buffered_bytes,
    claim_and_append,
    read_entries,
)
from tallystick.usage.drain import ENTRIES_PER_READING, drain, drain_on
from tallystick.usage.events import MAX_EVENTS, UsageEvent
from tallystick.usage.ledger import record_events
from tests.usage.making import conservation, make_event, read_all
from tests.waiting import wait_until

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
HOUR_AGO = NOW - HOUR


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


async def test_an_event_comes_out_of_the_stream_as_it_went_in(resources: Resources) -> None:
    plain_event = make_event("plain \u00fc \u2028", at=HOUR_AGO.replace(microsecond=0), value="-0.000000000001")
    event = make_event("e", at=HOUR_AGO, value="100")._replace(properties=(("region", "eu"), ("user", "ann")))
    stamped = make_event("stamped", timestamp=HOUR_AGO, stamped=True)
    await claim(resources.redis, plain_event, event, stamped)
    (entry,) = await read_entries(resources.redis, "tests", 10, reclaim_after=timedelta(minutes=1))
    assert entry.events == [plain_event, event, stamped]
    assert [(str(e.value), e.timestamp.tzinfo) for e in entry.events] == [
        (str(e.value), UTC) for e in (plain_event, event, stamped)
    ]
    assert await claim(resources.redis, event._replace(properties=event.properties[:1])) == ["conflict"]


async def test_requests_that_come_together_share_a_call_and_hear_each_of_their_own_events(
    resources: Resources, settings: Settings
) -> None:
    shared = Buffer(resources.redis, settings)
    event = make_event("same", at=HOUR_AGO)
    requests = [
        [make_event("first", at=HOUR_AGO)],
        [event, make_event("second", at=HOUR_AGO)],
        [event],
        [event._replace(value=Decimal(9)), make_event("third", at=HOUR_AGO)],
    ]
    heard = await asyncio.gather(*(shared.append(events, NOW) for events in requests))
    assert heard == [["accepted"], ["accepted", "accepted"], ["duplicate"], ["conflict", "accepted"]]
    assert await resources.redis.xlen(buffer.STREAM) == 1
    assert await drain(resources, NOW) == 4
    assert (await conservation(resources)).events == 4


async def test_one_who_hangs_up_while_he_shares_a_call_changes_nothing(
    resources: Resources, settings: Settings
) -> None:
    shared = Buffer(resources.redis, settings)
    appends = [asyncio.create_task(shared.append([make_event(f"e{n}", at=HOUR_AGO)], NOW)) for n in range(3)]
    await asyncio.sleep(0)  # all of them wait, and the call has not begun
    appends[1].cancel()
    assert list(await asyncio.gather(appends[0], appends[2])) == [["accepted"], ["accepted"]]
    assert await shared.append([make_event("e1", at=HOUR_AGO)], NOW) == ["duplicate"]


async def test_what_goes_wrong_is_told_to_all_who_share_the_call_and_later_ones_go_on(
    resources: Resources, settings: Settings
) -> None:
    shared = Buffer(resources.redis, settings.model_copy(update={"usage_buffer_max_bytes": 1}))
    assert await shared.append([make_event("fills it", at=HOUR_AGO)], NOW) == ["accepted"]
    refused = await asyncio.gather(
        *(shared.append([make_event(f"e{n}", at=HOUR_AGO)], NOW) for n in range(3)), return_exceptions=True
    )
    assert [type(error) for error in refused] == [TooBusy] * 3
    await drain(resources, NOW)
    assert await shared.append([make_event("e0", at=HOUR_AGO)], NOW) == ["accepted"]


async def test_one_who_comes_when_all_calls_end_at_once_does_not_wait_for_the_next(
    resources: Resources, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, answered = asyncio.Semaphore(0), asyncio.Event()

    async def claim_together(*of: Any, **more: Any) -> list[Claim]:
        claims = await claim_and_append(*of, **more)
        waiting.release()
        await answered.wait()
        return claims

    monkeypatch.setattr(buffer, "claim_and_append", claim_together)
    shared = Buffer(resources.redis, settings)

    async def append(*names: str) -> None:
        for name in names:
            assert await shared.append([make_event(name, at=HOUR_AGO)], NOW) == ["accepted"]

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(append("first", "third"))
        await waiting.acquire()
        for number in range(1, CALLS_AT_ONCE):
            group.create_task(append(f"second {number}"))
            await waiting.acquire()
        answered.set()


async def test_more_events_than_one_call_may_bring_go_in_several(resources: Resources, settings: Settings) -> None:
    shared = Buffer(resources.redis, settings)
    requests = [[make_event(f"r{r}-{n}", at=HOUR_AGO) for n in range(MAX_EVENTS)] for r in range(5)]
    heard = await asyncio.gather(*(shared.append(events, NOW) for events in requests))
    assert heard == [["accepted"] * MAX_EVENTS] * 5
    lengths = [len(entry.events) for entry in await read_entries(resources.redis, "t", 10, reclaim_after=HOUR)]
    assert sum(lengths) == 5 * MAX_EVENTS
    assert max(lengths) <= buffer.EVENTS_PER_CALL


async def test_a_generation_that_is_not_asked_any_more_is_given_up(resources: Resources) -> None:
    await claim(resources.redis, make_event("old", at=HOUR_AGO))
    assert await claim(resources.redis, make_event("old", at=HOUR_AGO), now=NOW + timedelta(hours=144)) == ["accepted"]
    assert len([key async for key in resources.redis.scan_iter(f"{buffer.IDS}:*")]) == 2
    await claim(resources.redis, make_event("new", at=HOUR_AGO), now=NOW + timedelta(hours=108))
    assert len([key async for key in resources.redis.scan_iter(f"{buffer.IDS}:*")]) == 2


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


@contextmanager
def as_fast_as_it_is_read(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Whenever something is read from the stream, more of it has come meanwhile; how many events each reading had."""
    readings: list[int] = []

    async def read_and_append(*arguments: Any, **named: Any) -> list[buffer.Entry]:
        entries = await read_entries(*arguments, **named)
        readings.append(len(entries))
        for n in range(2):
            await claim(resources.redis, make_event(f"meanwhile-{len(readings)}-{n}", at=HOUR_AGO))
        return entries

    with monkeypatch.context() as patched:
        patched.setattr("tallystick.usage.drain.read_entries", read_and_append)
        yield readings


async def test_a_drain_ends_though_usage_keeps_coming(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(40):
        await claim(resources.redis, make_event(f"e{n}", at=HOUR_AGO))
    with as_fast_as_it_is_read(resources, monkeypatch) as readings:
        async with asyncio.timeout(10):
            assert await drain(resources, NOW) == sum(readings)
    ((waited,),) = await read_all(resources, "SELECT count(*) FROM usage_events WHERE id LIKE 'e%'")
    assert waited == 40
    assert len(readings) < 8, "two that were needed, and one or two more of each that reads"


async def test_a_drain_takes_over_what_was_left_behind_though_usage_keeps_coming(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3 * ENTRIES_PER_READING):
        await claim(resources.redis, make_event(f"e{n}", at=HOUR_AGO))
    await read_entries(resources.redis, "dead", 2 * ENTRIES_PER_READING, reclaim_after=HOUR)
    with as_fast_as_it_is_read(resources, monkeypatch):
        async with asyncio.timeout(10):
            await drain(resources, NOW, reclaim_after=timedelta(0))
    ((waited,),) = await read_all(resources, "SELECT count(*) FROM usage_events WHERE id LIKE 'e%'")
    assert waited == 3 * ENTRIES_PER_READING


async def test_the_workers_drain_goes_on_while_usage_comes_and_ends_now_and_then(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    await claim(resources.redis, make_event("first", at=HOUR_AGO))
    monkeypatch.setattr("tallystick.usage.drain.RUN_SECONDS", 0.2)
    with as_fast_as_it_is_read(resources, monkeypatch) as readings:
        async with asyncio.timeout(10):
            assert await drain_on(resources, NOW) == sum(readings)
    assert len(readings) > 4
    assert await drain_on(resources, NOW) > 0
    assert await buffered_bytes(resources.redis) == 0


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
