"""Delivery of notifications: fan out, claim, send, settle.

    queued ──▶ pending ──claim──▶ sending ──2xx──▶ delivered
                  ▲                  │ └──tried for three days, or 410──▶ dead
                  └──────retry───────┘

Of one customer at one endpoint only the oldest is `pending` or `sending`; when it is settled, the next one in the queue
becomes `pending`. A claim is a lease: what a dead worker had claimed is sent again by another once the lease has ended,
with the same `webhook-id`, by which the receiver knows a repeat.

Each endpoint has places of its own for what is on its way, so one that hangs fills its own places and no others.
"""

import asyncio
import json
import random
from collections.abc import Collection, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db, tracing
from tallystick.metrics import NOTIFICATION_TRIES
from tallystick.notifications.sending import SEND_SECONDS, Connections, Outcome, render, send, sign
from tallystick.resources import Resources
from tallystick.rules import NotificationEndpoint

log = structlog.get_logger()

# On their way to one endpoint at once, from this worker: of so many different customers.
IN_FLIGHT_PER_ENDPOINT = 32
FANNED_OUT_AT_ONCE = 1000

# While something is on its way, look for new work this often.
LOOK_AGAIN_SECONDS = 0.5
# After this a run claims only as long as something from before is still on its way, so that waiting for a slow endpoint
# does not stop the others; then it ends. A worker that is to stop thus waits for half a minute at most.
RUN_SECONDS = 10

# Longer than a try can take.
LEASE = timedelta(seconds=60)

# The waits after each failed try; when there is none left, the notification is dead: after a little more than three
# days, as Standard Webhooks recommends.
RETRY_AFTER = (
    timedelta(seconds=5),
    timedelta(minutes=1),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=5),
    *[timedelta(hours=10)] * 7,
)

QUEUES_LOCK = 0x7A14

# One row for each endpoint that wants this type, by the rules as they are now: an endpoint that is added later does not
# get what was fanned out before.
FAN_OUT = text("""
    WITH fresh AS (
        UPDATE notifications SET fanned_out_at = :now
         WHERE number IN (SELECT number FROM notifications WHERE fanned_out_at IS NULL ORDER BY number LIMIT :limit)
        RETURNING id, number, type, customer
    )
    INSERT INTO notification_deliveries (notification, endpoint, number, customer)
    SELECT f.id, e.name, f.number, f.customer
      FROM fresh f JOIN json_to_recordset(CAST(:endpoints AS json)) AS e(name text, events text[])
           ON f.type = ANY(e.events) OR '*' = ANY(e.events)
    RETURNING endpoint, customer
""")

# The first in each of these queues is to be sent, if no other is.
ADVANCE = text("""
    UPDATE notification_deliveries d SET state = 'pending', next_attempt_at = :now
      FROM json_to_recordset(CAST(:queues AS json)) AS q(endpoint text, customer text)
     CROSS JOIN LATERAL (
        SELECT f.notification FROM notification_deliveries f
         WHERE f.endpoint = q.endpoint AND f.customer = q.customer AND f.state = 'queued'
         ORDER BY f.number LIMIT 1) first
     WHERE d.notification = first.notification AND d.endpoint = q.endpoint
       AND NOT EXISTS (SELECT FROM notification_deliveries o
                        WHERE o.endpoint = q.endpoint AND o.customer = q.customer
                          AND o.state IN ('pending', 'sending'))
""")

# For each endpoint as many as it has places; also what was left behind by a worker that died.
CLAIM = text(f"""
    WITH due AS (
        SELECT first.notification, first.endpoint
          FROM unnest(CAST(:names AS text[]), CAST(:free AS integer[])) AS p(endpoint, free)
         CROSS JOIN LATERAL (
            SELECT notification, endpoint, row_number() OVER (ORDER BY next_attempt_at, number) AS place
              FROM notification_deliveries
             WHERE endpoint = p.endpoint AND state IN ('pending', 'sending') AND next_attempt_at <= :now
             ORDER BY next_attempt_at, number LIMIT {IN_FLIGHT_PER_ENDPOINT}) first
         WHERE first.place <= p.free
    )
    UPDATE notification_deliveries d
       SET state = 'sending', attempts = d.attempts + 1, next_attempt_at = :lease_until
      FROM due JOIN notifications n ON n.id = due.notification
     WHERE d.notification = due.notification AND d.endpoint = due.endpoint
    RETURNING n.id, d.endpoint, n.customer, d.attempts, n.type, n.created_at, n.data
""")  # noqa: S608  a number from above

# `attempts` fences: a worker that comes back after its lease was taken over no longer has a say.
SETTLE = text("""
    UPDATE notification_deliveries d
       SET state = r.state, outcome = r.outcome, next_attempt_at = r.next_attempt_at,
           settled_at = CASE WHEN r.state = 'pending' THEN NULL ELSE CAST(:now AS timestamptz) END
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(notification text, endpoint text, attempts integer, state text, outcome text, next_attempt_at timestamptz)
     WHERE d.notification = r.notification AND d.endpoint = r.endpoint
       AND d.attempts = r.attempts AND d.state = 'sending'
    RETURNING d.endpoint, d.customer
""")


@dataclass(frozen=True)
class Claimed:
    """A notification that this worker may send to an endpoint until its lease ends."""

    id: str
    endpoint: str
    customer: str
    attempts: int
    type: str
    created_at: datetime
    data: Mapping[str, Any]


async def deliver_notifications(resources: Resources, now: datetime) -> int:
    """Fan out what is new and send what is due, until nothing is; how many tries there were."""
    started = monotonic()
    endpoints = {endpoint.name: endpoint for endpoint in resources.rules.current(now).notifications}
    on_their_way: dict[asyncio.Task[Outcome], tuple[Claimed, float]] = {}
    tries = 0
    async with AsyncExitStack() as stack:
        connections = Connections(stack)
        try:
            while True:
                elapsed = monotonic() - started
                at = now + timedelta(seconds=elapsed)
                if elapsed < RUN_SECONDS or any(since < RUN_SECONDS for _, since in on_their_way.values()):
                    flying = [claimed.endpoint for claimed, _ in on_their_way.values()]
                    async with db.transaction(resources.engine) as connection:
                        claimed_now = await _claim(connection, endpoints.values(), flying, at)
                    # Died here, or anywhere below: the rows are `sending` until their lease ends, then claimed again.
                    for claimed in claimed_now:
                        task = asyncio.create_task(_try(connections, endpoints[claimed.endpoint], claimed, at))
                        on_their_way[task] = claimed, elapsed
                if not on_their_way:
                    return tries
                done, _ = await asyncio.wait(
                    on_their_way, timeout=LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                # Died here: the receivers have them, we do not know it; they get them again under the same ids.
                if done:
                    settled = [(on_their_way.pop(task)[0], task.result()) for task in done]
                    await _settle(resources, settled, now + timedelta(seconds=monotonic() - started))
                    tries += len(settled)
        finally:
            for task in on_their_way:
                task.cancel()
            await asyncio.gather(*on_their_way, return_exceptions=True)


async def _claim(
    connection: AsyncConnection, endpoints: Collection[NotificationEndpoint], flying: list[str], at: datetime
) -> list[Claimed]:
    await lock_queues(connection)
    wanted = [{"name": endpoint.name, "events": endpoint.events} for endpoint in endpoints]
    fanned_out = await connection.execute(
        FAN_OUT, {"endpoints": json.dumps(wanted), "now": at, "limit": FANNED_OUT_AT_ONCE}
    )
    await advance(connection, fanned_out.all(), at)
    rows = await connection.execute(
        CLAIM,
        {
            "names": [endpoint.name for endpoint in endpoints],
            "free": [IN_FLIGHT_PER_ENDPOINT - flying.count(endpoint.name) for endpoint in endpoints],
            "now": at,
            "lease_until": at + LEASE,
        },
    )
    return [Claimed(*row) for row in rows]


async def lock_queues(connection: AsyncConnection) -> None:
    """Held for the few milliseconds in which queues change, so that all workers agree on who is first in each."""
    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": QUEUES_LOCK})


async def advance(connection: AsyncConnection, queues: Iterable[Any], at: datetime) -> None:
    """Let the next one be sent in each of these queues, given as endpoint and customer. The caller has locked them."""
    rows = [{"endpoint": endpoint, "customer": customer} for endpoint, customer in sorted(set(map(tuple, queues)))]
    if rows:
        await connection.execute(ADVANCE, {"queues": json.dumps(rows), "now": at})


async def _try(connections: Connections, endpoint: NotificationEndpoint, claimed: Claimed, at: datetime) -> Outcome:
    try:
        body = render(claimed.type, claimed.created_at, claimed.data)
        headers = sign(endpoint, claimed.id, at, body)
        with tracing.span("notification", endpoint=endpoint.name, attempt=claimed.attempts):
            async with asyncio.timeout(SEND_SECONDS):
                return await send(await connections.client(endpoint), endpoint, headers, body)
    except TimeoutError:
        return Outcome("failed", "timeout")
    except Exception as error:  # noqa: BLE001  the row's edge: one that cannot be sent must not stop the others
        return Outcome("failed", type(error).__name__)


async def _settle(resources: Resources, settled: list[tuple[Claimed, Outcome]], at: datetime) -> None:
    rows = [_row(claimed, outcome, at) for claimed, outcome in settled]
    async with db.transaction(resources.engine) as connection:
        await lock_queues(connection)
        advanced = await connection.execute(SETTLE, {"rows": json.dumps(rows), "now": at})
        await advance(connection, advanced.all(), at)
    for row, (claimed, outcome) in zip(rows, settled, strict=True):
        result = "retry" if row["state"] == "pending" else str(row["state"])
        NOTIFICATION_TRIES.labels(claimed.endpoint, result).inc()
        if result != "delivered":
            log.warning(
                "notification_not_delivered",
                outcome=result,
                id=claimed.id,
                endpoint=claimed.endpoint,
                reason=outcome.reason,
                attempts=claimed.attempts,
            )


def _row(claimed: Claimed, outcome: Outcome, at: datetime) -> dict[str, object]:
    row: dict[str, object] = {
        "notification": claimed.id,
        "endpoint": claimed.endpoint,
        "attempts": claimed.attempts,
        "outcome": outcome.reason,
    }
    if outcome.state == "delivered":
        return row | {"state": "delivered"}
    if outcome.state == "gone" or claimed.attempts > len(RETRY_AFTER):
        return row | {"state": "dead"}
    next_attempt_at = at + max(retry_after(claimed.attempts), outcome.retry_after)
    return row | {"state": "pending", "next_attempt_at": next_attempt_at.isoformat()}


def retry_after(attempts: int) -> timedelta:
    """How long to wait after so many tries; up to a tenth more, so that what failed together does not come together."""
    return RETRY_AFTER[attempts - 1] * random.uniform(1, 1.1)
