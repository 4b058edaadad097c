"""Delivery: claim, send, settle. Every try of a delivery says the same to Stripe, byte for byte.

    pending ──claim──▶ sending ──sent──▶ sent
       ▲                  │ └───refused──▶ parked
       └──────retry───────┘

A claim is a lease: a worker that dies while it sends leaves a row that another claims once the lease has ended. What
the dead one managed to say is then said again with the same identifier, which Stripe counts once for at least 24 hours.
So a delivery whose outcome has been unknown for 23 hours is parked instead of being sent again, and so is usage that
has come too late for its invoice (usage/late.py); both in the transaction of the claim.

Each sender has a queue of its own and takes from its own rate limit; the limits are shared by all workers. Of a
customer and meter one delivery is on its way at a time, whichever sender it has.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from time import monotonic
from typing import Literal, NamedTuple

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.config import Settings
from tallystick.loops import all_ended
from tallystick.metrics import DELIVERIES
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.usage.late import MAY_BE_CLOSED, Taken, mark_taken_late, prices_of, set_aside
from tallystick.usage.parking import announce_parked
from tallystick.usage.rates import refill, take
from tallystick.usage.senders.meter_event_stream import send_stream
from tallystick.usage.senders.meter_events import send_meter_events
from tallystick.usage.senders.outcomes import Message, Outcome
from tallystick.usage.senders.usage_records import Record, send_usage_records

log = structlog.get_logger()

Sender = Literal["meter_events", "meter_event_stream", "usage_records"]
SENDERS: tuple[Sender, ...] = ("meter_events", "meter_event_stream", "usage_records")

# Claimed and settled together. A call carries one delivery, or a hundred of them with the stream.
PER_CLAIM: dict[Sender, int] = {"meter_events": 200, "meter_event_stream": 2000, "usage_records": 200}
# While one claim is sent, another is written down: PostgreSQL and the calls need not wait for each other.
CLAIMS_AT_ONCE = 2
# Of one claim. Two claims have far fewer than the hundred connections that are kept open; the processor is the limit.
CALLS_AT_ONCE = 10
STREAM_REQUESTS_AT_ONCE = 2

# Beside the calls a claim needs two commits.
LEASE_MARGIN = timedelta(seconds=15)
# How long a claim of the stream goes on to begin requests; with all well it takes one second.
STREAM_SECONDS = 60

MAX_BACKOFF_SECONDS = 300

CLAIM_LOCK = 0x7A13

FIND_SENDERS = text("""
    SELECT s.sender FROM unnest(CAST(:senders AS text[])) AS s(sender)
     WHERE EXISTS (SELECT FROM usage_deliveries d WHERE d.state = 'pending' AND d.sender = s.sender)
        OR EXISTS (SELECT FROM usage_deliveries d
                    WHERE d.state = 'sending' AND d.sender = s.sender AND d.lease_until <= :now)
""")

# First what a dead worker left, then the oldest due delivery of each customer and meter that has none on its way. The
# recursion goes from one customer and meter to the next by index, so it costs what it finds, and not what waits.
# Whether one is on its way is asked inside, pair by pair: outside, all pairs that wait would be found first, to be
# joined.
CHOOSE = text("""
    WITH RECURSIVE pairs AS (
        (SELECT customer, event_name FROM usage_deliveries
          WHERE state = 'pending' AND sender = :sender AND (customer, event_name) > (:customer, :event_name)
          ORDER BY customer, event_name LIMIT 1)
        UNION ALL
        SELECT n.customer, n.event_name
          FROM pairs p
         CROSS JOIN LATERAL (
               SELECT customer, event_name FROM usage_deliveries
                WHERE state = 'pending' AND sender = :sender
                  AND (customer, event_name) > (p.customer, p.event_name)
                ORDER BY customer, event_name LIMIT 1) n
    )
    SELECT id, customer, event_name, false AS pending FROM usage_deliveries
     WHERE state = 'sending' AND sender = :sender AND lease_until <= :now
    UNION ALL
    SELECT d.id, p.customer, p.event_name, true
      FROM pairs p
     CROSS JOIN LATERAL (
           SELECT id FROM usage_deliveries
            WHERE state = 'pending' AND sender = :sender AND customer = p.customer AND event_name = p.event_name
              AND next_attempt_at <= :now
              AND NOT EXISTS (SELECT FROM usage_deliveries o
                               WHERE o.customer = p.customer AND o.event_name = p.event_name AND o.state = 'sending')
            ORDER BY next_attempt_at, id LIMIT 1) d
     LIMIT :limit
""")

CLAIM = text("""
    UPDATE usage_deliveries d
       SET state = 'sending', attempts = d.attempts + 1, lease_until = :lease_until,
           unknown_since = coalesce(d.unknown_since, CAST(:now AS timestamptz))
      FROM (SELECT id, unknown_since FROM usage_deliveries
             WHERE id = ANY(:ids) AND (state = 'pending' OR state = 'sending' AND lease_until <= :now)
               FOR UPDATE) chosen
     WHERE d.id = chosen.id
    RETURNING d.id, chosen.unknown_since AS unknown_before, d.value,
              d.event_name, d.identifier, d.payload, d.timestamp, d.attempts
""")

# The item whose period covers the usage, and what Stripe has been told of that second before.
FIND_RECORDS = text("""
    SELECT d.id,
           (SELECT m.item FROM metered_periods m
             WHERE m.customer = d.customer AND m.price = CAST(:prices AS json) ->> d.event_name
               AND m.period_start <= to_timestamp(d.timestamp) AND m.period_end > to_timestamp(d.timestamp)
             ORDER BY m.period_start DESC, m.item LIMIT 1) AS item,
           (SELECT coalesce(sum(o.value), 0) FROM usage_deliveries o
             WHERE o.customer = d.customer AND o.event_name = d.event_name AND o.timestamp = d.timestamp
               AND o.sender = 'usage_records' AND o.state IN ('sent', 'confirmed')) AS before
      FROM usage_deliveries d WHERE d.id = ANY(:ids)
""")

# `attempts` fences: a worker that comes back after its lease was taken over no longer has a say. Given back is what the
# product may have to be told of. Mostly no delivery is on its way, and then that is what PostgreSQL's statistics say:
# asked for `state`, it would begin with those that are, and compare each with each that is given. An expression has no
# index, so that it begins with what is given.
SETTLE = text(f"""
    WITH settled AS (
        UPDATE usage_deliveries d
           SET state = r.state, reason = r.reason, next_attempt_at = r.next_attempt_at, lease_until = NULL,
               unknown_since = r.unknown_since,
               settled_at = CASE WHEN r.state = 'pending' THEN NULL ELSE CAST(:settled_at AS timestamptz) END
          FROM unnest(CAST(:id AS bigint[]), CAST(:attempts AS integer[]), CAST(:state AS text[]),
                      CAST(:reason AS text[]), CAST(:next_attempt_at AS timestamptz[]),
                      CAST(:unknown_since AS timestamptz[]), CAST(:outcome AS text[]), CAST(:said AS text[]),
                      CAST(:http_status AS integer[]), CAST(:request_id AS text[]))
            AS r(id, attempts, state, reason, next_attempt_at, unknown_since, outcome, said, http_status, request_id)
         WHERE d.id = r.id AND d.attempts = r.attempts AND d.state || '' = 'sending'
        RETURNING d.id, d.state, d.customer, d.identifier, d.event_name, d.timestamp, d.reason, d.attempts,
                  r.outcome, r.said, r.http_status, r.request_id, {MAY_BE_CLOSED} AS may_be_closed
    ), noted AS (
        INSERT INTO usage_delivery_attempts (delivery_id, attempt, at, outcome, reason, http_status, request_id)
        SELECT id, attempts, CAST(:at AS timestamptz), outcome, said, http_status, request_id FROM settled
    )
    SELECT id, state, customer, identifier, event_name, timestamp, reason FROM settled
     WHERE state = 'parked' OR state = 'sent' AND may_be_closed
""")  # noqa: S608  put together from constants


class Place(NamedTuple):
    """A customer and meter: where a claim begins to look for the next ones."""

    customer: str
    event_name: str


BEGINNING = Place("", "")


class Claimed(NamedTuple):
    """A delivery that this worker may send until its lease ends. `unknown_before`: since when, before this try."""

    id: int
    message: Message
    unknown_before: datetime | None
    record: Record | None


@dataclass(frozen=True)
class Turn:
    """What a claim came to: how many were due, how many tried, and from where to go on. `limited`: for want of rate."""

    due: int
    tried: int
    reached: Place
    limited: bool = False


async def deliver(resources: Resources, now: datetime) -> int:
    """Send what one claim of each sender takes, as far as the rate limits go; how many deliveries were tried."""
    turns = await all_ended(_take_turn(resources, sender, now, BEGINNING) for sender in SENDERS)
    return sum(turn.tried for turn in turns)


async def deliver_all(resources: Resources, now: datetime) -> int:
    """Send until nothing is due. What is to be retried later is left for later."""
    return await _deliver_until_done(resources, now, SENDERS)


async def deliver_by(resources: Resources, now: datetime, *, sender: Sender) -> int:
    """The worker's loop of one sender, for which no other sender's long run is waited: as `deliver_all`."""
    return await _deliver_until_done(resources, now, [sender])


async def _deliver_until_done(resources: Resources, now: datetime, senders: Sequence[Sender]) -> int:
    async with db.transaction(resources.engine) as connection:
        found = await connection.execute(FIND_SENDERS, {"senders": list(senders), "now": now})
        busy: list[Sender] = list(found.scalars())
    runs = [_take_turns(resources, sender, now) for sender in busy for _ in range(CLAIMS_AT_ONCE)]
    return sum(await all_ended(runs))


async def _take_turns(resources: Resources, sender: Sender, started_at: datetime) -> int:
    began = monotonic()
    delivered, place = 0, BEGINNING
    while True:
        # A long run must not give out leases that have ended already.
        turn = await _take_turn(resources, sender, started_at + timedelta(seconds=monotonic() - began), place)
        delivered += turn.tried
        if turn.limited:
            # Nothing could be claimed for want of rate only: a second brings a second's worth of it.
            await asyncio.sleep(1)
        elif not turn.due and place == BEGINNING:
            return delivered
        place = turn.reached


async def _take_turn(resources: Resources, sender: Sender, now: datetime, place: Place) -> Turn:
    began = monotonic()
    settings, rules = resources.settings, resources.rules.current(now)
    async with db.transaction(resources.engine) as connection:
        turn, claimed = await _claim(connection, settings, rules, sender, now, place)
    if not claimed:
        return turn
    # Died here, or anywhere below: the rows are `sending` until their lease ends, then they are claimed again.
    outcomes = await _send(resources, sender, claimed, now)
    # Died here: Stripe has them, we do not know it; the next try is answered "already exists", which counts as sent.
    settled_at = now + timedelta(seconds=monotonic() - began)
    async with db.transaction(resources.engine) as connection:
        await _settle(connection, rules, claimed, outcomes, now, settled_at)
    for state, number in Counter(outcome.state for outcome in outcomes).items():
        DELIVERIES.labels(state).inc(number)
    for delivery, outcome in zip(claimed, outcomes, strict=True):
        if outcome.state != "sent":
            log.warning(
                "delivery_not_sent",
                outcome=outcome.state,
                identifier=delivery.message.identifier,
                reason=outcome.reason,
                attempts=delivery.message.attempt,
            )
    return turn


def lease(settings: Settings, sender: Sender = "meter_events") -> timedelta:
    """How long a claim is left alone: as long as its calls may take when each of them times out."""
    one_call = timedelta(seconds=settings.stripe_timeout_seconds)
    if sender == "meter_event_stream":
        # The last request may need a new session and be said twice.
        return timedelta(seconds=STREAM_SECONDS) + 4 * one_call + LEASE_MARGIN
    return one_call * -(-PER_CLAIM[sender] // CALLS_AT_ONCE) + LEASE_MARGIN


def _rate(settings: Settings, sender: Sender) -> tuple[str, int]:
    """The rate limit that a sender takes from, and how much a second it has."""
    if sender == "meter_event_stream":
        return "stripe_stream", settings.stripe_stream_events_per_second
    return "stripe", settings.stripe_calls_per_second


async def _claim(
    connection: AsyncConnection, settings: Settings, rules: Rules, sender: Sender, now: datetime, place: Place
) -> tuple[Turn, list[Claimed]]:
    # Claims come one after the other, so that two workers cannot both pick a delivery of one (customer, meter).
    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": CLAIM_LOCK})
    name, per_second = _rate(settings, sender)
    limit = min(int(await refill(connection, name, per_second)), PER_CLAIM[sender])
    wanted = {"sender": sender, "now": now, "limit": max(limit, 1), **place._asdict()}
    chosen = (await connection.execute(CHOOSE, wanted)).all()
    if not chosen:
        return Turn(0, 0, BEGINNING), []
    if limit <= 0:
        return Turn(len(chosen), 0, place, limited=True), []
    # Fewer than asked for: the last customer and meter has been looked at.
    last = chosen[-1]
    reached = Place(last.customer, last.event_name) if len(chosen) == limit and last.pending else BEGINNING
    ids = [row.id for row in chosen]
    await set_aside(connection, ids, rules, now)
    rows = (
        await connection.execute(CLAIM, {"ids": ids, "now": now, "lease_until": now + lease(settings, sender)})
    ).all()
    records = {}
    if sender == "usage_records" and rows:
        found = await connection.execute(FIND_RECORDS, {"ids": [row.id for row in rows], "prices": prices_of(rules)})
        records = {row.id: (row.item, row.before) for row in found}
    claimed = []
    for id, unknown_before, value, *said in rows:
        message = Message(*said)
        item, before = records.get(id, (None, Decimal(0)))
        record = Record(message, item, before + value) if id in records else None
        claimed.append(Claimed(id, message, unknown_before, record))
    await take(connection, name, len(claimed))
    return Turn(len(chosen), len(claimed), reached), claimed


async def _send(resources: Resources, sender: Sender, claimed: Sequence[Claimed], now: datetime) -> list[Outcome]:
    messages = [delivery.message for delivery in claimed]
    match sender:
        case "meter_events":
            seconds = (lease(resources.settings, sender) - LEASE_MARGIN) // timedelta(seconds=1)
            return await send_meter_events(resources.stripe, messages, lanes=CALLS_AT_ONCE, seconds=seconds)
        case "meter_event_stream":
            session = resources.meter_event_session
            return await send_stream(session, messages, now, lanes=STREAM_REQUESTS_AT_ONCE, seconds=STREAM_SECONDS)
        case "usage_records":
            records = [delivery.record for delivery in claimed if delivery.record is not None]
            return await send_usage_records(resources.stripe, records, lanes=CALLS_AT_ONCE)


async def _settle(
    connection: AsyncConnection,
    rules: Rules,
    claimed: Sequence[Claimed],
    outcomes: Sequence[Outcome],
    at: datetime,
    settled_at: datetime,
) -> None:
    """Write down the answers to tries that were made at `at`, and each try."""
    settled = [
        _settle_one(delivery, outcome, at, settled_at) for delivery, outcome in zip(claimed, outcomes, strict=True)
    ]
    written = await connection.execute(
        SETTLE, {"at": at, "settled_at": settled_at, **db.to_columns(_Settled._fields, settled)}
    )
    to_tell = written.mappings().all()
    await announce_parked(connection, [row for row in to_tell if row["state"] == "parked"])
    first = {delivery.id: delivery.unknown_before or at for delivery in claimed}
    sent = [Taken(row["id"], first[row["id"]]) for row in to_tell if row["state"] == "sent"]
    await mark_taken_late(connection, sent, rules)


class _Settled(NamedTuple):
    """What a try came to, as SETTLE takes it."""

    id: int
    attempts: int
    state: str
    reason: str | None
    next_attempt_at: datetime
    unknown_since: datetime | None
    outcome: str
    said: str | None
    http_status: int | None
    request_id: str | None


def _settle_one(delivery: Claimed, outcome: Outcome, at: datetime, settled_at: datetime) -> _Settled:
    """What becomes of a delivery by the answer to the try that was made at `at`."""
    attempt = delivery.message.attempt
    unknown_since = delivery.unknown_before or (at if outcome.unknown else None)
    reason, next_attempt_at = outcome.reason, settled_at
    match outcome.state:
        case "sent":
            unknown_since = None  # whatever earlier tries came to: Stripe has it, once
        case "retry":
            next_attempt_at += backoff(attempt)
        case "parked" if unknown_since is not None and delivery.record is None:
            # That this try was refused says nothing about an earlier one; Stripe's summaries will. Of usage records
            # there are none, and saying one again is harmless whether or not an earlier try was taken.
            reason = "outcome_unknown"
    return _Settled(
        id=delivery.id,
        attempts=attempt,
        state="pending" if outcome.state == "retry" else outcome.state,
        reason=reason,
        next_attempt_at=next_attempt_at,
        unknown_since=unknown_since,
        outcome=outcome.state,
        said=outcome.reason,
        http_status=outcome.http_status,
        request_id=outcome.request_id,
    )


def backoff(attempts: int) -> timedelta:
    """How long to wait after the given number of tries: doubling from 1 s to 5 minutes, with jitter."""
    longest = min(2 ** min(attempts, 16), MAX_BACKOFF_SECONDS)
    return timedelta(milliseconds=random.randint(500 * longest, 1000 * longest))
