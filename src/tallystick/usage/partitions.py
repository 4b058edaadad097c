"""The ledger's partitions: one a day, made ahead of time, dropped when past the retention.

1. make   the days to come, in a transaction of their own: usage of a day without a partition is refused, so nothing
          that is wrong with an old day may keep the next ones from being made
2. drop   each old day in a transaction of its own, its sums written down with it
3. forget the stamps that point into dropped days, some thousands at a time
"""

import asyncio
from datetime import date, datetime, timedelta

import structlog
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.metrics import OVERDUE_PARTITIONS
from tallystick.resources import Resources
from tallystick.usage.events import MAX_AGE

log = structlog.get_logger()

# Enough for a worker that is down for a week: usage with a day that has no partition cannot be recorded.
DAYS_AHEAD = 8

# Other numbers than that of the migrations: two workers that make partitions, or drop them, meet each other only.
PARTITION_LOCK = 0x7A12
RETIRE_LOCK = 0x7A15

# A day may have a hundred million events.
RETIRE_WITHIN = timedelta(minutes=10)

# To drop a partition PostgreSQL locks the whole ledger. Whoever reads it, as conservation does for minutes, is waited
# for; and all who would record usage wait behind the one that waits. So it gives up soon, lets them pass, and tries
# again, some times now and then at the next run.
DROP_LOCK_TIMEOUT = timedelta(milliseconds=200)
DROP_TRIES = 5
DROP_PAUSE = timedelta(seconds=1)

STAMPS_PER_DELETE = 10_000

# Every event is counted; quantities only of meters whose quantities add up, as conservation counts them.
RETIRE = """
    INSERT INTO usage_retired
    SELECT $1, count(*), coalesce(sum(e.value) FILTER (WHERE t.aggregation IN ('sum', 'count')), 0)
      FROM {partition} e LEFT JOIN usage_totals t ON t.id = e.total_id
"""

DELETE_STAMPS = text("""
    DELETE FROM usage_stamps
     WHERE (source, id) IN (SELECT source, id FROM usage_stamps WHERE day < :before LIMIT :most FOR UPDATE SKIP LOCKED)
""")


async def keep_partitions(resources: Resources, now: datetime) -> int:
    """Make the partitions that are needed soon, drop those past the retention; how many were touched."""
    async with db.transaction(resources.engine) as connection:
        made = await make_partitions(connection, now)
    # Died here: what is past the retention is dropped at the next run.
    dropped = await drop_partitions(resources, now.date() - timedelta(days=resources.settings.usage_retention_days))
    return made + dropped


async def make_partitions(connection: AsyncConnection, now: datetime) -> int:
    """Make each missing partition from the oldest day that an event may have to `DAYS_AHEAD` days from now."""
    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": PARTITION_LOCK})
    existing = await _find_partitions(connection)
    first = now.date() - MAX_AGE - timedelta(days=1)
    missing = [
        day
        for offset in range(MAX_AGE.days + DAYS_AHEAD + 2)
        if (day := first + timedelta(days=offset)) not in existing
    ]
    for day in missing:
        # Attached in a second step: PARTITION OF would lock the whole ledger against readers and writers.
        name = _name(day)
        await connection.execute(text(f"CREATE TABLE {name} (LIKE usage_events INCLUDING ALL)"))
        await connection.execute(
            text(
                f"ALTER TABLE usage_events ATTACH PARTITION {name}"
                f" FOR VALUES FROM ('{day}') TO ('{day + timedelta(days=1)}')"
            )
        )
    return len(missing)


async def drop_partitions(resources: Resources, before: date) -> int:
    """Drop the partitions before a day, and the stamps that point into them; how many were dropped.

    Sums, totals and deliveries stay. A day that cannot be dropped holds up no other; the next run tries it again.
    """
    dropped = 0
    for day in await _find_old(resources, before):
        try:
            dropped += await _retire(resources, day)
        except db.STORAGE_ERRORS as error:
            log.warning("partition_not_dropped", day=day.isoformat(), error=type(error).__name__)
    OVERDUE_PARTITIONS.set(len(await _find_old(resources, before)))
    # Died between two of these, or before them: the next run deletes the rest.
    while await _delete_stamps(resources, before) == STAMPS_PER_DELETE:
        continue
    return dropped


async def _find_old(resources: Resources, before: date) -> list[date]:
    async with db.transaction(resources.engine) as connection:
        return sorted(day for day in await _find_partitions(connection) if day < before)


async def _retire(resources: Resources, day: date) -> bool:
    """Write down a day's sums and drop its partition, both or nothing; false when another worker is at it.

    No event of such a day is accepted any more, so the sums stay right until the drop. Raises `TimeoutError` when the
    ledger is in use each time, and what counts as storage failed.
    """
    async with db.transaction(resources.engine) as connection:
        if not await connection.scalar(text("SELECT pg_try_advisory_xact_lock(:lock)"), {"lock": RETIRE_LOCK}):
            return False
        if day not in await _find_partitions(connection):
            return False
        await db.fetch_patiently(connection, RETIRE.format(partition=_name(day)), [day], RETIRE_WITHIN)
        for attempt in range(DROP_TRIES):
            if attempt:
                await asyncio.sleep(DROP_PAUSE.total_seconds())
            if await _drop_unless_used(connection, day):
                return True
        raise TimeoutError("the ledger is in use")  # in here, so that the sums are taken back with it


async def _drop_unless_used(connection: AsyncConnection, day: date) -> bool:
    milliseconds = DROP_LOCK_TIMEOUT // timedelta(milliseconds=1)
    try:
        # The savepoint keeps the sums when the lock is not to be had, and its end frees the queue for the lock.
        async with connection.begin_nested():
            await connection.execute(text(f"SET LOCAL lock_timeout = {milliseconds}"))
            await connection.execute(text(f"DROP TABLE {_name(day)}"))
    except DBAPIError as error:
        if not db.is_lock_timeout(error):
            raise
        return False
    return True


async def _delete_stamps(resources: Resources, before: date) -> int:
    async with db.transaction(resources.engine) as connection:
        deleted = await connection.execute(DELETE_STAMPS, {"before": before, "most": STAMPS_PER_DELETE})
        return deleted.rowcount


async def _find_partitions(connection: AsyncConnection) -> set[date]:
    names = await connection.scalars(
        text(
            "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'usage_events'::regclass"
        )
    )
    return {datetime.strptime(name.removeprefix("usage_events_"), "%Y%m%d").date() for name in names}  # noqa: DTZ007  a day


def _name(day: date) -> str:
    return f"usage_events_{day:%Y%m%d}"
