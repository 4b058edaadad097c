"""The ledger's partitions: one a day, made ahead of time, dropped when past the retention."""

from datetime import date, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.events import MAX_AGE

# Enough for a worker that is down for a week: usage with a day that has no partition cannot be recorded.
DAYS_AHEAD = 8

# Another number than that of the migrations: two workers that make partitions wait for each other, not for those.
PARTITION_LOCK = 0x7A12

# Every event is counted; quantities only of meters whose quantities add up, as conservation counts them.
RETIRE = """
    INSERT INTO usage_retired
    SELECT :day, count(*), coalesce(sum(e.value) FILTER (WHERE t.aggregation IN ('sum', 'count')), 0)
      FROM {partition} e LEFT JOIN usage_totals t ON t.id = e.total_id
"""


async def keep_partitions(resources: Resources, now: datetime) -> int:
    """Make the partitions that are needed soon, drop those past the retention; how many were touched."""
    async with db.transaction(resources.engine) as connection:
        made = await make_partitions(connection, now)
        dropped = await drop_partitions(
            connection, now.date() - timedelta(days=resources.settings.usage_retention_days)
        )
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


async def drop_partitions(connection: AsyncConnection, before: date) -> int:
    """Drop the partitions before a day, and the stamps that point into them. Sums, totals and deliveries stay."""
    old = sorted(day for day in await _find_partitions(connection) if day < before)
    for day in old:
        await connection.execute(
            text(RETIRE.format(partition=_name(day))),
            {"day": day},
        )
        await connection.execute(text(f"DROP TABLE {_name(day)}"))
    if old:
        await connection.execute(text("DELETE FROM usage_stamps WHERE day < :before"), {"before": before})
    return len(old)


async def _find_partitions(connection: AsyncConnection) -> set[date]:
    names = await connection.scalars(
        text(
            "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'usage_events'::regclass"
        )
    )
    return {datetime.strptime(name.removeprefix("usage_events_"), "%Y%m%d").date() for name in names}  # noqa: DTZ007  a day


def _name(day: date) -> str:
    return f"usage_events_{day:%Y%m%d}"
