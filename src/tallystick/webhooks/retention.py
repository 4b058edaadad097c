"""Retention: the records of events are dropped when they are older than `TALLYSTICK_EVENT_RETENTION_DAYS`.

A record is what a repeat is known by. Stripe sends and lists events for 30 days, and the retention is never shorter
than twice that. The mirror does not need it: a row's own mark makes an old event stale.
"""

from datetime import datetime, timedelta

from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources

EVENTS_PER_DELETE = 5_000
DELETES_PER_RUN = 200

# Those in quarantine are few, and wait for an operator.
DELETE_OLD_EVENTS = text("""
    DELETE FROM stripe_events
     WHERE id = ANY(ARRAY(
        SELECT id FROM stripe_events WHERE received_at < :oldest AND verdict <> 'quarantined'
         ORDER BY received_at LIMIT :limit FOR UPDATE SKIP LOCKED))
""")


async def forget_events(resources: Resources, now: datetime) -> int:
    """Drop the records that are past the retention, some thousand a transaction; how many."""
    oldest = now - timedelta(days=resources.settings.event_retention_days)
    forgotten = 0
    for _ in range(DELETES_PER_RUN):
        async with db.transaction(resources.engine) as connection:
            deleted = await connection.execute(DELETE_OLD_EVENTS, {"oldest": oldest, "limit": EVENTS_PER_DELETE})
        # Died here: the next run drops the rest.
        forgotten += deleted.rowcount
        if deleted.rowcount < EVENTS_PER_DELETE:
            break
    return forgotten
