"""The gauges of the queues: what waits where, and for how long. docs/operations.md says what to do about each.

Every worker measures the same queues, so of several workers' gauges the greatest counts, and not their sum.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from tallystick import db
from tallystick.metrics import (
    BUFFER_BYTES,
    BUFFER_LIMIT_BYTES,
    DELIVERIES_BY_STATE,
    QUEUE_LENGTH,
    QUEUE_OLDEST_SECONDS,
)
from tallystick.resources import Resources
from tallystick.usage.buffer import STREAM, buffered_bytes
from tallystick.webhooks.refresh import KINDS

# Of deliveries those that are confirmed or voided are at their end, and kept for good: counting them takes ever longer.
DELIVERY_STATES = ("pending", "sending", "sent", "parked")

COUNT_STATES = " UNION ALL ".join(
    f"SELECT '{state}' AS state, count(*) AS number FROM usage_deliveries WHERE state = '{state}'"  # noqa: S608
    for state in DELIVERY_STATES
)

NEEDS_REFRESH = " UNION ALL ".join(
    f"SELECT updated_at FROM {kind.table} WHERE needs_refresh"  # noqa: S608  names from our own table of kinds
    for kind in KINDS.values()
)

# "pending or sending" is asked so that each has its own index.
COUNT_QUEUES = text(f"""
    SELECT 'open_usage' AS queue, count(*) AS length, min(bucket_end) AS since
      FROM usage_totals t
     WHERE events <> sealed_events AND bucket_end <= :now
       AND EXISTS (SELECT FROM customer_references r WHERE r.ref = t.customer_ref)
    UNION ALL
    SELECT 'unlinked_usage', count(*), min(opened_at)
      FROM usage_totals t
     WHERE events <> sealed_events
       AND NOT EXISTS (SELECT FROM customer_references r WHERE r.ref = t.customer_ref)
    UNION ALL
    SELECT 'deliveries', count(*), min(created_at) FROM usage_deliveries WHERE state = 'pending' OR state = 'sending'
    UNION ALL
    SELECT 'parked_deliveries', count(*), min(created_at) FROM usage_deliveries WHERE state = 'parked'
    UNION ALL
    SELECT 'seal_requests', count(*), min(requested_at) FROM seal_requests
    UNION ALL
    SELECT 'error_reports', count(*), min(received_at) FROM meter_error_reports WHERE fetched_at IS NULL
    UNION ALL
    SELECT 'corrections', count(*), min(requested_at) FROM usage_corrections WHERE state = 'pending'
    UNION ALL
    SELECT 'proposed_corrections', count(*), min(requested_at) FROM usage_corrections WHERE state = 'proposed'
    UNION ALL
    SELECT 'conflicts', count(*), min(found_at) FROM usage_conflicts
    UNION ALL
    SELECT 'failing_events', count(*), min(first_at) FROM stripe_event_failures
    UNION ALL
    SELECT 'quarantined_events', count(*), min(received_at) FROM stripe_events WHERE verdict = 'quarantined'
    UNION ALL
    SELECT 'refresh', count(*), min(updated_at) FROM ({NEEDS_REFRESH}) marked
""")  # noqa: S608


async def measure_queues(resources: Resources, now: datetime) -> int:
    """Set the gauges of what waits in PostgreSQL."""
    async with db.transaction(resources.engine) as connection:
        queues = (await connection.execute(COUNT_QUEUES, {"now": now})).all()
        states = (await connection.execute(text(COUNT_STATES))).all()
    for queue, length, since in queues:
        _set(queue, length, since, now)
    for state, number in states:
        DELIVERIES_BY_STATE.labels(state).set(number)
    return 0


async def measure_buffer(resources: Resources, now: datetime) -> int:
    """Set the gauges of what waits in Redis. On its own, since it matters most while PostgreSQL is away."""
    BUFFER_LIMIT_BYTES.set(resources.settings.usage_buffer_max_bytes)
    BUFFER_BYTES.set(await buffered_bytes(resources.redis))
    length = await resources.redis.xlen(STREAM)
    oldest: Any = await resources.redis.xrange(STREAM, count=1)
    # The first half of an entry's id is when Redis took it, in milliseconds.
    since = datetime.fromtimestamp(int(oldest[0][0].partition(b"-")[0]) / 1000, UTC) if oldest else None
    _set("buffer", length, since, now)
    return 0


def _set(queue: str, length: int, since: datetime | None, now: datetime) -> None:
    QUEUE_LENGTH.labels(queue).set(length)
    waited = now - since if since is not None else timedelta(0)
    QUEUE_OLDEST_SECONDS.labels(queue).set(max(waited, timedelta(0)).total_seconds())
