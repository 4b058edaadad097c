"""Delivery: claim, send, settle. Every try of a delivery says the same to Stripe, byte for byte.

    pending ──claim──▶ sending ──sent──▶ sent
       ▲                  │ └───refused──▶ parked
       └──────retry───────┘

A claim is a lease: a worker that dies while it sends leaves a row that another claims once the lease has ended. What
the dead one managed to say is then said again with the same identifier, which Stripe counts once for at least 24 hours.
So a delivery whose outcome has been unknown for 23 hours is parked instead of being sent again.
"""

import asyncio
import json
import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.config import Settings
from tallystick.metrics import DELIVERIES
from tallystick.resources import Resources
from tallystick.usage.parking import announce_parked
from tallystick.usage.senders.meter_events import send_meter_event
from tallystick.usage.senders.outcomes import Outcome

log = structlog.get_logger()

# Claimed and settled together; the calls go out so many at a time, in rounds.
DELIVERIES_PER_CLAIM = 200
CONCURRENCY = 32
ROUNDS = -(-DELIVERIES_PER_CLAIM // CONCURRENCY)

# Beside the calls a claim needs two commits.
LEASE_MARGIN = timedelta(seconds=15)

UNKNOWN_FOR_AT_MOST = timedelta(hours=23)
MAX_BACKOFF_SECONDS = 300

CLAIM_LOCK = 0x7A13

# Tokens are whole calls; what a second adds is the limit, and a pause saves up at most one second of it.
TAKE_TOKENS = text("""
    INSERT INTO rate_limits AS l (name, tokens, refilled_at) VALUES ('stripe', :per_second, clock_timestamp())
    ON CONFLICT (name) DO UPDATE SET
        tokens = least(:per_second,
                       l.tokens + :per_second * extract(epoch FROM clock_timestamp() - l.refilled_at)),
        refilled_at = clock_timestamp()
    RETURNING floor(tokens)
""")

# The oldest due delivery of each (customer, meter) that has none on its way; or one whose lease has ended, before
# all else.
CLAIM = text("""
    WITH due AS (
        SELECT DISTINCT ON (customer, event_name) id
          FROM usage_deliveries d
         WHERE (state = 'sending' AND lease_until <= :now)
            OR (state = 'pending' AND next_attempt_at <= :now
                AND NOT EXISTS (SELECT FROM usage_deliveries o
                                 WHERE o.customer = d.customer AND o.event_name = d.event_name AND o.state = 'sending'))
         ORDER BY customer, event_name, state DESC, next_attempt_at, id
    ), chosen AS (
        SELECT d.id, d.unknown_since FROM usage_deliveries d JOIN due USING (id)
         ORDER BY d.next_attempt_at, d.id LIMIT :limit
    )
    UPDATE usage_deliveries d
       SET state = 'sending', attempts = d.attempts + 1, lease_until = :lease_until,
           unknown_since = coalesce(d.unknown_since, CAST(:now AS timestamptz))
      FROM chosen WHERE d.id = chosen.id
    RETURNING d.id, d.event_name, d.identifier, d.payload, d.timestamp, d.attempts, d.created_at,
              chosen.unknown_since AS unknown_before
""")

USE_TOKENS = text("UPDATE rate_limits SET tokens = tokens - :used WHERE name = 'stripe'")

# `attempts` fences: a worker that comes back after its lease was taken over no longer has a say.
SETTLE = text("""
    UPDATE usage_deliveries d
       SET state = r.state, reason = r.reason, next_attempt_at = r.next_attempt_at, lease_until = NULL,
           unknown_since = r.unknown_since,
           settled_at = CASE WHEN r.state = 'pending' THEN NULL ELSE CAST(:now AS timestamptz) END
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(id bigint, attempts integer, state text, reason text, next_attempt_at timestamptz, unknown_since
        timestamptz)
     WHERE d.id = r.id AND d.attempts = r.attempts AND d.state = 'sending'
    RETURNING d.state, d.customer, d.identifier, d.event_name, d.timestamp, d.reason
""")


@dataclass(frozen=True)
class Claimed:
    """A delivery that this worker may send until its lease ends. `unknown_before`: since when, before this try."""

    id: int
    event_name: str
    identifier: str
    payload: dict[str, str]
    timestamp: int
    attempts: int
    created_at: datetime
    unknown_before: datetime | None


async def deliver(resources: Resources, now: datetime) -> int:
    """Send what is due, as far as the rate limit goes; how many deliveries were tried."""
    settings = resources.settings
    async with db.transaction(resources.engine) as connection:
        claimed = await _claim(connection, now, now + lease(settings), settings.stripe_calls_per_second)
    # Died here, or anywhere below: the rows are `sending` until their lease ends, then they are claimed again.
    lanes = asyncio.Semaphore(CONCURRENCY)

    async def send(delivery: Claimed) -> Outcome:
        if delivery.unknown_before is not None and delivery.unknown_before <= now - UNKNOWN_FOR_AT_MOST:
            return Outcome("parked", "outcome_unknown", unknown=True)
        async with lanes:
            return await send_meter_event(
                resources.stripe,
                event_name=delivery.event_name,
                identifier=delivery.identifier,
                payload=delivery.payload,
                timestamp=delivery.timestamp,
            )

    outcomes = await asyncio.gather(*(send(delivery) for delivery in claimed))
    # Died here: Stripe has them, we do not know it; the next try is answered "already exists", which counts as sent.
    if claimed:
        async with db.transaction(resources.engine) as connection:
            await _settle(connection, claimed, outcomes, now)
    for delivery, outcome in zip(claimed, outcomes, strict=True):
        DELIVERIES.labels(outcome.state).inc()
        if outcome.state != "sent":
            log.warning(
                "delivery_not_sent",
                outcome=outcome.state,
                identifier=delivery.identifier,
                reason=outcome.reason,
                attempts=delivery.attempts,
            )
    return len(claimed)


async def deliver_all(resources: Resources, now: datetime) -> int:
    """Send until nothing is due. What is to be retried later is left for later."""
    delivered = 0
    while True:
        tried = await deliver(resources, now)
        delivered += tried
        if tried == 0 and not await _rate_limited(resources, now):
            return delivered
        if tried == 0:
            # Nothing could be claimed for want of tokens only: a second brings a second's worth of them.
            await asyncio.sleep(1)


def lease(settings: Settings) -> timedelta:
    """How long a claim is left alone: as long as its calls may take when each of them times out."""
    return timedelta(seconds=settings.stripe_timeout_seconds) * ROUNDS + LEASE_MARGIN


async def _claim(connection: AsyncConnection, now: datetime, lease_until: datetime, per_second: int) -> list[Claimed]:
    # Claims come one after the other, so that two workers cannot both pick a delivery of one (customer, meter).
    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": CLAIM_LOCK})
    tokens = Decimal((await connection.execute(TAKE_TOKENS, {"per_second": per_second})).scalar_one())
    limit = min(int(tokens), DELIVERIES_PER_CLAIM)
    if limit <= 0:
        return []
    rows = await connection.execute(CLAIM, {"now": now, "limit": limit, "lease_until": lease_until})
    claimed = [Claimed(*row) for row in rows]
    await connection.execute(USE_TOKENS, {"used": len(claimed)})
    return claimed


async def _rate_limited(resources: Resources, now: datetime) -> bool:
    async with db.transaction(resources.engine) as connection:
        due = await connection.scalar(
            text("""
                SELECT EXISTS (SELECT FROM usage_deliveries d
                                WHERE state = 'pending' AND next_attempt_at <= :now
                                  AND NOT EXISTS (SELECT FROM usage_deliveries o
                                                   WHERE o.customer = d.customer AND o.event_name = d.event_name
                                                     AND o.state = 'sending'))
            """),
            {"now": now},
        )
    return bool(due)


async def _settle(connection: AsyncConnection, claimed: list[Claimed], outcomes: list[Outcome], now: datetime) -> None:
    rows = []
    for delivery, outcome in zip(claimed, outcomes, strict=True):
        still_unknown = delivery.unknown_before or (now if outcome.unknown else None)
        rows.append(
            {
                "id": delivery.id,
                "attempts": delivery.attempts,
                "state": "pending" if outcome.state == "retry" else outcome.state,
                "reason": outcome.reason,
                "next_attempt_at": (now + backoff(delivery.attempts)).isoformat(),
                "unknown_since": still_unknown.isoformat() if still_unknown and outcome.state != "sent" else None,
            }
        )
    settled = (await connection.execute(SETTLE, {"rows": json.dumps(rows), "now": now})).mappings()
    await announce_parked(connection, [row for row in settled if row["state"] == "parked"])


def backoff(attempts: int) -> timedelta:
    """How long to wait after the given number of tries: doubling from 1 s to 5 minutes, with jitter."""
    longest = min(2 ** min(attempts, 16), MAX_BACKOFF_SECONDS)
    return timedelta(milliseconds=random.randint(500 * longest, 1000 * longest))
