"""Sealing: what a total has gathered since its last seal becomes a delivery, written down before anyone calls Stripe.

When a total is due:

    its bucket has ended        hourly by default (`TALLYSTICK_SEAL_EVERY_SECONDS`); at once when its period has
    ended too a threshold is reached      `TALLYSTICK_SEAL_THRESHOLD`, in the bucket that is still open
    Stripe drafted an invoice   a row in `seal_requests`, written in the webhook's own transaction
    by command                  `tallystick flush`

A delivery's identifier is made of the total's key and the seal's number, so sealing twice cannot make two deliveries
of one quantity: the number and the quantity move together in one transaction.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_DOWN, Decimal, localcontext
from typing import Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.drain import drain
from tallystick.usage.events import MAX_DIGITS, plain
from tallystick.usage.meters import Meter, read_meters
from tallystick.usage.parking import announce_parked

TOTALS_PER_TRANSACTION = 500

LARGEST_PART = Decimal(10) ** MAX_DIGITS - 1
MAX_SUM_DIGITS = 100

# Usage of an hour that has just ended may still be on its way through Redis.
SETTLE = timedelta(seconds=60)

# Stripe refuses timestamps older than this; what is closer to it than a day of retries would need is not worth the try.
STRIPE_MAX_AGE = timedelta(days=35)

# A total without a linked customer or without a meter stays open. One whose customer has no subscription waits a
# while for it: the subscription's start may cut the bucket, and without one there is no invoice to be in time for.
SELECT_DUE = """
    SELECT t.id, t.customer_ref, t.meter, t.bucket_start, t.bucket_end, t.quantity - t.sealed AS unsealed,
           t.events - t.sealed_events AS unsealed_events, t.seal, r.customer
      FROM usage_totals t JOIN customer_references r ON r.ref = t.customer_ref
     WHERE t.events <> t.sealed_events AND t.meter = ANY(:meters) AND ({due})
     ORDER BY t.customer_ref, t.meter, t.bucket_start
     LIMIT :limit
       FOR UPDATE OF t {locked}
"""

DUE_BY_TIME = """
    (EXISTS (SELECT FROM subscriptions s WHERE s.customer = r.customer)
     OR t.opened_at <= :held_until)
    AND (
        t.quantity - t.sealed >= :threshold
        OR t.bucket_end <= :settled AND (
            t.sealed_at IS NULL
            OR t.sealed_at <= :sealed_before
            OR EXISTS (SELECT FROM period_boundaries b
                        WHERE b.customer = r.customer AND b.at >= t.bucket_end AND b.at <= :now))
    )
"""

FIND_CUTS = text("""
    SELECT t.id, b.at
      FROM usage_totals t
      JOIN customer_references r ON r.ref = t.customer_ref
      JOIN period_boundaries b ON b.customer = r.customer AND b.at > t.bucket_start AND b.at < t.bucket_end
     WHERE t.id = ANY(:totals)
     ORDER BY t.id, b.at DESC
""")

OPEN_CUT = text("""
    INSERT INTO usage_totals AS t (customer_ref, meter, bucket_start, bucket_end)
    SELECT customer_ref, meter, :at, bucket_end FROM usage_totals WHERE id = :total
    ON CONFLICT (customer_ref, meter, bucket_start) DO UPDATE SET bucket_end = least(t.bucket_end, excluded.bucket_end)
    RETURNING id, seal
""")

MOVE_EVENTS = text("""
    WITH moved AS (
        UPDATE usage_events SET total_id = :new_total, seal = :new_seal
         WHERE total_id = :total AND seal = :seal AND timestamp >= :at
           AND day BETWEEN CAST(:first_day AS date) AND CAST(:last_day AS date)
        RETURNING value
    ), sums AS (SELECT coalesce(sum(value), 0) AS quantity, count(*) AS events FROM moved)
    UPDATE usage_totals t
       SET quantity = t.quantity + CASE t.id WHEN :total THEN -sums.quantity ELSE sums.quantity END,
           events = t.events + CASE t.id WHEN :total THEN -sums.events ELSE sums.events END,
           bucket_end = CASE t.id WHEN :total THEN :at ELSE t.bucket_end END
      FROM sums WHERE t.id IN (:total, :new_total)
""")

INSERT_DELIVERIES = text("""
    INSERT INTO usage_deliveries
           (total_id, opened_seal, seal, events, customer, event_name, identifier, payload, value, timestamp, state,
            reason, next_attempt_at)
    SELECT total_id, opened_seal, seal, events, customer, event_name, identifier, payload, value, timestamp, state,
           reason, :now
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(total_id bigint, opened_seal integer, seal integer, events bigint, customer text, event_name text,
             identifier text, payload jsonb, value numeric, timestamp bigint, state text, reason text)
""")

# The totals are locked, so their quantity is still the one that was read.
CLOSE_SEALS = text("""
    UPDATE usage_totals t
       SET sealed = t.quantity, sealed_events = t.events, seal = r.next_seal, sealed_at = :now
      FROM json_to_recordset(CAST(:rows AS json)) AS r(id bigint, next_seal integer)
     WHERE t.id = r.id
""")


@dataclass(frozen=True)
class Total:
    """A locked total with something to seal."""

    id: int
    customer_ref: str
    meter: str
    bucket_start: datetime
    bucket_end: datetime
    unsealed: Decimal
    unsealed_events: int
    seal: int
    customer: str


async def seal_due(resources: Resources, now: datetime) -> int:
    """Seal every total that is due by time or threshold; how many. Other workers' totals are left to them."""
    settings = resources.settings
    due = (
        DUE_BY_TIME
        if settings.seal_threshold is not None
        else DUE_BY_TIME.replace("t.quantity - t.sealed >= :threshold\n        OR ", "")
    )
    parameters: dict[str, object] = {
        "now": now,
        "settled": now - SETTLE,
        "sealed_before": now - timedelta(seconds=settings.seal_every_seconds),
        "held_until": now - timedelta(hours=settings.hold_without_subscription_hours),
    }
    if settings.seal_threshold is not None:
        parameters["threshold"] = settings.seal_threshold
    return await _seal_all(resources, now, due, parameters, locked="SKIP LOCKED")


async def seal_everything(resources: Resources, now: datetime) -> int:
    """Drain, then seal every total that a linked customer has: what `tallystick flush` does before it delivers."""
    await drain(resources, now)
    return await _seal_all(resources, now, "true", {}, locked="")


async def answer_seal_requests(resources: Resources, now: datetime) -> int:
    """For each customer with a freshly drafted invoice: drain, seal everything, and only then forget the request."""
    async with db.transaction(resources.engine) as connection:
        requests = (
            await connection.execute(
                text("SELECT customer, requested_at FROM seal_requests ORDER BY requested_at LIMIT 500")
            )
        ).all()
    if not requests:
        return 0
    await drain(resources, now)
    customers = sorted(request.customer for request in requests)
    await _seal_all(resources, now, "r.customer = ANY(:customers)", {"customers": customers}, locked="")
    # Died here: the requests are still there, and sealing again finds nothing left to seal.
    async with db.transaction(resources.engine) as connection:
        for request in requests:
            await connection.execute(
                text("DELETE FROM seal_requests WHERE customer = :customer AND requested_at = :requested_at"),
                {"customer": request.customer, "requested_at": request.requested_at},
            )
    return len(requests)


async def _seal_all(
    resources: Resources, now: datetime, due: str, parameters: dict[str, object], *, locked: Literal["", "SKIP LOCKED"]
) -> int:
    sealed = 0
    while True:
        async with db.transaction(resources.engine) as connection:
            count = await _seal_some(connection, now, due, parameters, locked)
        sealed += count
        if count < TOTALS_PER_TRANSACTION:
            return sealed


async def _seal_some(
    connection: AsyncConnection, now: datetime, due: str, parameters: dict[str, object], locked: str
) -> int:
    meters = {name: meter for name, meter in (await read_meters(connection)).items() if meter.refusal() is None}
    rows = await connection.execute(
        text(SELECT_DUE.format(due=due, locked=locked)),
        {"meters": sorted(meters), "limit": TOTALS_PER_TRANSACTION, **parameters},
    )
    totals = [Total(*row) for row in rows]
    if not totals:
        return 0
    if await _cut(connection, totals):
        # The locked rows have changed; what was cut off may not be due yet. They stay locked, so this ends.
        return await _seal_some(connection, now, due, parameters, locked)
    installation = str(await connection.scalar(text("SELECT id FROM installation")))
    deliveries: list[dict[str, object]] = []
    seals: list[dict[str, object]] = []
    for total in totals:
        parts = split_value(total.unsealed)
        deliveries += [
            _delivery(installation, total, total.seal + number, part, meters[total.meter], now)
            for number, part in enumerate(parts)
        ]
        seals.append({"id": total.id, "next_seal": total.seal + len(parts)})
    await connection.execute(INSERT_DELIVERIES, {"rows": json.dumps(deliveries), "now": now})
    await announce_parked(connection, [delivery for delivery in deliveries if delivery["state"] == "parked"])
    await connection.execute(CLOSE_SEALS, {"rows": json.dumps(seals), "now": now})
    return len(totals)


async def _cut(connection: AsyncConnection, totals: list[Total]) -> bool:
    """Cut totals at boundaries that were learnt after their bucket was opened; only what is not sealed yet can move."""
    cuts = (await connection.execute(FIND_CUTS, {"totals": [total.id for total in totals]})).all()
    by_id = {total.id: total for total in totals}
    for total_id, at in cuts:
        total = by_id[total_id]
        new_total, new_seal = (await connection.execute(OPEN_CUT, {"total": total_id, "at": at})).one()
        await connection.execute(
            MOVE_EVENTS,
            {
                "total": total_id,
                "seal": total.seal,
                "new_total": new_total,
                "new_seal": new_seal,
                "at": at,
                "first_day": total.bucket_start.date(),
                "last_day": total.bucket_end.date(),
            },
        )
    return bool(cuts)


def _delivery(
    installation: str, total: Total, seal: int, value: Decimal, meter: Meter, now: datetime
) -> dict[str, object]:
    timestamp = delivery_timestamp(total.bucket_start, total.bucket_end, now)
    too_old = timestamp < now - STRIPE_MAX_AGE
    return {
        "total_id": total.id,
        "opened_seal": total.seal,
        "seal": seal,
        "events": total.unsealed_events if seal == total.seal else 0,
        "customer": total.customer,
        "event_name": meter.event_name,
        "identifier": make_identifier(installation, total, seal),
        "payload": {meter.customer_key: total.customer, meter.value_key: plain(value)},
        "value": str(value),
        "timestamp": int(timestamp.timestamp()),
        "state": "parked" if too_old else "pending",
        "reason": "older_than_35_days" if too_old else None,
    }


def make_identifier(installation: str, total: Total, seal: int) -> str:
    """The name under which Stripe takes this seal once (docs/decisions/0005-identifiers.md).

    It is made of what the total is and not of its row's number, so that a restored database cannot give one name to two
    different things.
    """
    named = f"{total.customer_ref}\0{total.meter}\0{total.bucket_start.isoformat()}"
    return f"tally-{installation}-{hashlib.blake2b(named.encode(), digest_size=12).hexdigest()}-{seal}"


def delivery_timestamp(bucket_start: datetime, bucket_end: datetime, now: datetime) -> datetime:
    """The bucket's start, or as much later within the bucket as Stripe's 35 days ask for; whole seconds.

    Period boundaries are whole seconds, so every whole second of a bucket lies in the same period as the bucket.
    """
    still_taken = (now - STRIPE_MAX_AGE + timedelta(minutes=10)).replace(microsecond=0)
    return max(bucket_start, min(still_taken, bucket_end - timedelta(seconds=1)))


def split_value(value: Decimal) -> list[Decimal]:
    """Cut a quantity into parts that Stripe takes, of at most 15 digits each as written, with the same exact sum.

    Whole parts are cut off by the largest that fits, so there are never more parts than events of which they are the
    sum. A sum of 0 is one part: its events are told like any others.
    """
    parts: list[Decimal] = []
    with localcontext(prec=MAX_SUM_DIGITS):  # the default context would round at 28
        sign = Decimal(-1 if value < 0 else 1)
        rest = abs(value)
        while rest > LARGEST_PART:
            parts.append(sign * LARGEST_PART)
            rest -= LARGEST_PART
        if len(plain(rest).replace(".", "").lstrip("0")) > MAX_DIGITS:
            parts.append(sign * rest.to_integral_value(ROUND_DOWN))
            rest -= rest.to_integral_value(ROUND_DOWN)
        if rest:
            parts.append(sign * rest)
    return parts or [Decimal(0)]
