"""The drain: batches from Redis to the ledger. Any number of processes may drain at once.

Read, commit, acknowledge, in this order. A crash before the commit leaves the batches unacknowledged, and another drain
takes them over; a crash after it hands them out once more, and the ledger recognises every event.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from datetime import datetime, timedelta
from time import monotonic

from tallystick import db
from tallystick.loops import all_ended
from tallystick.resources import Resources
from tallystick.usage.buffer import Entry, acknowledge, find_newest, place_of, read_entries
from tallystick.usage.ledger import record_events

# An entry holds what requests brought that came together, some thousand events at the most. These are some megabytes.
ENTRIES_PER_READING = 32
MAX_EVENTS_PER_TRANSACTION = 20_000
# While PostgreSQL works on the transaction of one lane, the other reads the next batches and makes rows of them. They
# mostly touch the same totals, so that their transactions come one after the other, and a third lane would only wait.
LANES = 2

# Longer than a reading takes while PostgreSQL is well, so that mostly it is a dead drain whose entries are taken over.
# Those of one that is only slow are recorded twice, which the ledger's key makes harmless.
RECLAIM_AFTER = timedelta(seconds=15)

# A run of the worker's loop ends now and then, so that it is seen to run and follows the rules as they are.
RUN_SECONDS = 10

CONSUMER = f"{socket.gethostname()}:{os.getpid()}"


async def drain(resources: Resources, now: datetime, *, reclaim_after: timedelta = RECLAIM_AFTER) -> int:
    """Move into the ledger what waits in Redis at this moment; how many events were read.

    What comes meanwhile is only taken with it: under steady traffic there would be no end, and the callers have
    something to do that must not be put off.
    """
    newest = await find_newest(resources.redis)
    return await _drain_until(lambda entries: place_of(entries[-1]) >= newest, resources, now, reclaim_after)


async def drain_on(resources: Resources, now: datetime) -> int:
    """The worker's loop: move usage into the ledger as long as there is some, without a pause; how many events."""
    ends = monotonic() + RUN_SECONDS
    return await _drain_until(lambda _: monotonic() >= ends, resources, now, RECLAIM_AFTER)


async def _drain_until(
    is_enough: Callable[[list[Entry]], bool], resources: Resources, now: datetime, reclaim_after: timedelta
) -> int:
    """Drain until nothing is left or a reading is enough. They come in order, so that all before it was read, too."""
    drained = 0
    while entries := await _read(resources, reclaim_after):
        lanes = [_drain_lane(is_enough, resources, some, now) for some in (entries, *([] for _ in range(LANES - 1)))]
        drained += sum(await all_ended(lanes))
        if is_enough(entries):
            break
    return drained


async def _drain_lane(
    is_enough: Callable[[list[Entry]], bool], resources: Resources, entries: list[Entry], now: datetime
) -> int:
    drained = 0
    # What the other lane has in hand was taken a moment ago, so this one does not take it for abandoned.
    while entries := entries or await _read(resources, RECLAIM_AFTER):
        for batch in _split(entries):
            drained += await _record(resources, batch, now)
        if is_enough(entries):
            break
        entries = []
    return drained


async def _read(resources: Resources, reclaim_after: timedelta) -> list[Entry]:
    return await read_entries(resources.redis, CONSUMER, ENTRIES_PER_READING, reclaim_after=reclaim_after)


async def _record(resources: Resources, batch: list[Entry], now: datetime) -> int:
    events = [event for entry in batch for event in entry.events]
    try:
        async with db.transaction(resources.engine) as connection:
            rules = resources.rules.current(now).meters
            await record_events(connection, events, accepted_already=True, rules=rules)
    except db.STORAGE_ERRORS as error:
        if len(batch) == 1 or db.is_storage_failure(error):
            raise
        # Something in one of them is more than the ledger can take. The others must not wait for it.
        recorded = await asyncio.gather(*(_record(resources, [entry], now) for entry in batch), return_exceptions=True)
        failed = [result for result in recorded if isinstance(result, BaseException)]
        if failed:
            raise failed[0] from error
        return len(events)
    # Died here: the batch is committed and will come again; every event in it is then a duplicate.
    await acknowledge(resources.redis, batch)
    return len(events)


def _split(entries: list[Entry]) -> list[list[Entry]]:
    """Cut a reading into transactions of a bounded number of events."""
    batches: list[list[Entry]] = []
    size = MAX_EVENTS_PER_TRANSACTION
    for entry in entries:
        if size + len(entry.events) > MAX_EVENTS_PER_TRANSACTION:
            batches.append([])
            size = 0
        batches[-1].append(entry)
        size += len(entry.events)
    return batches
