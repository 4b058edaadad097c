"""Retention: the records of events are dropped when they are older than `TALLYSTICK_EVENT_RETENTION_DAYS`.

A record is what a repeat is known by. Stripe sends and lists events for 30 days, and the retention is never shorter
than twice that. The mirror does not need it: a row's own mark makes an old event stale.
"""

from datetime import datetime, timedelta

from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources

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
    return await db.delete_old(resources.engine, DELETE_OLD_EVENTS, oldest)
