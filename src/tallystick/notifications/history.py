"""What became of the notifications: to look at, to send again, to count, and to forget in time."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import text

from tallystick import db
from tallystick.metrics import NOTIFICATIONS_BY_STATE, OLDEST_NOTIFICATION_SECONDS
from tallystick.notifications.delivery import advance, lock_queues
from tallystick.resources import Resources

log = structlog.get_logger()

# What was delivered is kept as a record of it for this long, and what nobody got for longer.
KEEP_DELIVERED = timedelta(days=30)
KEEP_DEAD = timedelta(days=90)
DROPPED_PER_TRANSACTION = 1000

# What waits for an endpoint that is not, or no longer, in the rules file may still be sent if it comes back within:
WAIT_FOR_ENDPOINT = timedelta(days=3)

STATES = ("queued", "pending", "sending", "delivered", "dead", "superseded")

LIST = text("""
    SELECT n.id, n.type, n.customer, d.endpoint, d.state, d.attempts, d.outcome, n.created_at,
           CASE WHEN d.state = 'pending' THEN d.next_attempt_at END AS next_attempt_at, d.settled_at
      FROM notification_deliveries d JOIN notifications n ON n.id = d.notification
     WHERE d.state = ANY(:states)
     ORDER BY d.number DESC, d.endpoint
     LIMIT :limit
""")

# An outdated state is not told after a newer one: whoever keeps what was told last would keep the wrong one.
REPLAY = """
    WITH chosen AS (
        SELECT d.notification, d.endpoint, d.state,
               EXISTS (SELECT FROM notifications m JOIN notification_deliveries e ON e.notification = m.id
                        WHERE m.customer = n.customer AND m.subject = n.subject AND m.type = n.type
                          AND m.number > n.number AND e.endpoint = d.endpoint AND e.state IN ('sending', 'delivered')
               ) AS outdated
          FROM notification_deliveries d JOIN notifications n ON n.id = d.notification
         WHERE {which}
    )
    UPDATE notification_deliveries d
       SET state = CASE WHEN c.state = 'pending' THEN 'pending' WHEN c.outdated THEN 'superseded' ELSE 'queued' END,
           attempts = CASE c.state WHEN 'pending' THEN d.attempts ELSE 0 END,
           next_attempt_at = CASE c.state WHEN 'pending' THEN CAST(:now AS timestamptz) END
      FROM chosen c WHERE d.notification = c.notification AND d.endpoint = c.endpoint
    RETURNING d.notification AS id, d.endpoint, d.customer, d.state
"""
REPLAY_DEAD = text(REPLAY.format(which="d.state = 'dead'"))
REPLAY_THESE = text(REPLAY.format(which="d.state IN ('dead', 'pending') AND d.notification = ANY(:ids)"))

# What is older than the one that is to be sent next goes before it.
STEP_BACK = text("""
    UPDATE notification_deliveries d SET state = 'queued', next_attempt_at = NULL
      FROM json_to_recordset(CAST(:queues AS json)) AS q(endpoint text, customer text)
     WHERE d.endpoint = q.endpoint AND d.customer = q.customer AND d.state = 'pending'
       AND EXISTS (SELECT FROM notification_deliveries o
                    WHERE o.endpoint = d.endpoint AND o.customer = d.customer AND o.state = 'queued'
                      AND o.number < d.number)
""")

# Only what has an index: the delivered ones are many and of no concern.
COUNT = text("""
    SELECT 'waiting', count(*), min(created_at) FROM notification_deliveries WHERE state = 'queued'
    UNION ALL
    SELECT 'waiting', count(*), min(created_at) FROM notification_deliveries WHERE state IN ('pending', 'sending')
    UNION ALL
    SELECT 'dead', count(*), NULL FROM notification_deliveries WHERE state = 'dead'
""")

GIVE_UP_UNKNOWN = text("""
    UPDATE notification_deliveries SET state = 'dead', outcome = 'endpoint unknown', settled_at = :now
     WHERE state IN ('queued', 'pending', 'sending') AND NOT endpoint = ANY(:endpoints) AND created_at <= :before
    RETURNING endpoint, customer
""")

DROP = text("""
    DELETE FROM notifications WHERE id IN (
        SELECT id FROM notifications n
         WHERE created_at <= :delivered_before AND fanned_out_at IS NOT NULL
           AND NOT EXISTS (SELECT FROM notification_deliveries d
                            WHERE d.notification = n.id
                              AND (d.state IN ('queued', 'pending', 'sending')
                                   OR d.state = 'dead' AND d.settled_at > :dead_before))
         ORDER BY created_at LIMIT :limit)
    RETURNING id
""")


async def list_deliveries(resources: Resources, *, states: Sequence[str] = STATES, limit: int) -> list[dict[str, Any]]:
    """The newest notifications in these states, one entry for each endpoint."""
    async with db.transaction(resources.engine) as connection:
        rows = await connection.execute(LIST, {"states": list(states), "limit": limit})
        return [dict(row) for row in rows.mappings()]


async def replay(resources: Resources, ids: Sequence[str] | None, now: datetime) -> list[dict[str, Any]]:
    """Send dead notifications again, all of them or those with these ids; waiting ones with these ids are sent at once.

    Each is sent under its old id, before the later ones of its customer. One that tells a state of which the endpoint
    has been told a newer one becomes `superseded` instead. Returns id, endpoint, customer and state of each.
    """
    async with db.transaction(resources.engine) as connection:
        await lock_queues(connection)
        if ids is None:
            result = await connection.execute(REPLAY_DEAD, {"now": now})
        else:
            result = await connection.execute(REPLAY_THESE, {"now": now, "ids": list(ids)})
        rows = [dict(row) for row in result.mappings()]
        queues = {(row["endpoint"], row["customer"]) for row in rows}
        listed = [{"endpoint": endpoint, "customer": customer} for endpoint, customer in sorted(queues)]
        await connection.execute(STEP_BACK, {"queues": json.dumps(listed)})
        await advance(connection, queues, now)
    return rows


async def measure_notifications(resources: Resources, now: datetime) -> int:
    """Set the gauges: how many notifications wait, the age of the oldest of them, and how many are dead."""
    async with db.transaction(resources.engine) as connection:
        rows = (await connection.execute(COUNT)).all()
    waiting = [created_at for state, _, created_at in rows if state == "waiting" and created_at is not None]
    for counted in ("waiting", "dead"):
        NOTIFICATIONS_BY_STATE.labels(counted).set(sum(number for state, number, _ in rows if state == counted))
    OLDEST_NOTIFICATION_SECONDS.set(max(timedelta(0), now - min(waiting)).total_seconds() if waiting else 0)
    return 0


async def retire_notifications(resources: Resources, now: datetime) -> int:
    """Give up what waits for endpoints that are gone, and delete what is past its time; how many were deleted."""
    endpoints = [endpoint.name for endpoint in resources.rules.current(now).notifications]
    async with db.transaction(resources.engine) as connection:
        await lock_queues(connection)
        result = await connection.execute(
            GIVE_UP_UNKNOWN, {"endpoints": endpoints, "before": now - WAIT_FOR_ENDPOINT, "now": now}
        )
        given_up = result.all()
        await advance(connection, given_up, now)
    if given_up:
        log.warning("notifications_without_endpoint", dead=len(given_up))
    dropped = 0
    while True:
        async with db.transaction(resources.engine) as connection:
            result = await connection.execute(
                DROP,
                {
                    "delivered_before": now - KEEP_DELIVERED,
                    "dead_before": now - KEEP_DEAD,
                    "limit": DROPPED_PER_TRANSACTION,
                },
            )
            count = len(result.all())
        dropped += count
        if count < DROPPED_PER_TRANSACTION:
            return dropped
