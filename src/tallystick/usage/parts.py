"""The parts of a seal: what is told to Stripe of what a total has gathered, by the total's aggregation.

    sum             what was added, in as many parts as Stripe's 15 digits ask for, at the bucket's start
    count           1 for each event, at the event's own second
    last            the latest value, at its event's own second; nothing when something later was said before
    max,            the running value of the billing period over all the customer's references, later than what was
    unique_count    said before; nothing when it has not changed, and parked when the period has no second left for it

A part that says nothing new is still written, as voided: the events that it carries are accounted for by it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_DOWN, Decimal, localcontext
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.stripe_limits import METER_EVENT_DIGITS, METER_EVENT_MAX_AGE, METER_EVENT_MAX_AHEAD
from tallystick.usage.aggregations import COUNTED_OPEN_SEAL
from tallystick.usage.events import plain
from tallystick.usage.periods import Period, UsageMoment, find_periods

LARGEST_PART = Decimal(10) ** METER_EVENT_DIGITS - 1
MAX_SUM_DIGITS = 100

# The hour is for a delivery that is tried some times before Stripe takes it, and ten minutes more for one that waits to
# be tried.
OLDEST_TO_SEND = METER_EVENT_MAX_AGE - timedelta(hours=1)
OLDEST_TO_SEAL = OLDEST_TO_SEND - timedelta(minutes=10)

# Of one total, and of one transaction: each is a row that is changed and one that is made.
COUNTED_PER_SEAL = 5_000
COUNTED_PER_TRANSACTION = 20_000

SECOND = timedelta(seconds=1)

# Any number; with the customer and the meter it lets one worker after the other say a running value.
RUNNING_LOCK = 0x7A14

# Up to `most` open events of each total get seals of their own, after those that the total has; the others stay as they
# are, under the open one.
NUMBER_EVENTS = text(f"""
    WITH numbered AS (
        SELECT e.source, e.id, e.day,
               greatest(sealed.last, 0)  -- what was voided has numbers below 1
               + row_number() OVER (PARTITION BY a.total_id ORDER BY e.timestamp, e.source, e.id) AS seal
          FROM json_to_recordset(CAST(:rows AS json)) AS a(total_id bigint, seal integer)
         CROSS JOIN LATERAL (
               SELECT source, id, day, timestamp FROM usage_events
                WHERE total_id = a.total_id AND seal = a.seal
                  AND day BETWEEN CAST(:first_day AS date) AND CAST(:last_day AS date)
                LIMIT :most) e
         CROSS JOIN LATERAL (
               SELECT max(seal) AS last FROM usage_deliveries
                WHERE total_id = a.total_id AND seal < {COUNTED_OPEN_SEAL}) sealed
    )
    UPDATE usage_events e SET seal = n.seal
      FROM numbered n WHERE e.source = n.source AND e.id = n.id AND e.day = n.day
    RETURNING e.total_id, e.seal, e.source, e.id, e.timestamp
""")  # noqa: S608  a constant

# When each total's latest event was. `new`: it is of the open seal, and no other reference of the customer has a later
# one within the same second, which Stripe could not tell from it.
FIND_LATEST = text("""
    SELECT t.id, t.last_at, EXISTS (
           SELECT FROM usage_events e
            WHERE e.total_id = t.id AND e.seal = r.seal AND e.timestamp = t.last_at
              AND to_char(e.received_at AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS')
                  || chr(1) || e.source || chr(1) || e.id = t.last_key
              AND e.day BETWEEN CAST(:first_day AS date) AND CAST(:last_day AS date))
       AND NOT EXISTS (
           SELECT FROM usage_totals o
            WHERE o.customer_ref = ANY(r.refs) AND o.meter = t.meter AND o.bucket_start = t.bucket_start
              AND o.aggregation = 'last' AND o.id <> t.id
              AND date_trunc('second', o.last_at) = date_trunc('second', t.last_at)
              AND (o.last_at, o.last_key COLLATE "C", o.id) > (t.last_at, t.last_key COLLATE "C", t.id)) AS new
      FROM json_to_recordset(CAST(:rows AS json)) AS r(total_id bigint, seal integer, refs text[])
      JOIN usage_totals t ON t.id = r.total_id
     ORDER BY t.last_at
""")

FIND_REFS = text("""
    SELECT customer, array_agg(ref) AS refs FROM customer_references WHERE customer = ANY(:customers) GROUP BY customer
""")

TAKE_TURN = text("SELECT pg_advisory_xact_lock(:lock, hashtext(:name))")

# What was sealed for another customer, before the reference meant this one, stays that one's.
OWN = """
    (t.events <> t.sealed_events
     OR EXISTS (SELECT FROM usage_deliveries d WHERE d.total_id = t.id AND d.customer = r.customer))
"""

# The value of a period as it is known now, the last second at which something was said of it, and what that was.
FIND_RUNNING = text(f"""
    SELECT CASE r.aggregation
           WHEN 'max' THEN (
               SELECT max(t.quantity) FROM usage_totals t
                WHERE t.customer_ref = ANY(r.refs) AND t.meter = r.meter AND t.aggregation = 'max' AND t.events > 0
                  AND t.bucket_start >= r.period_start AND t.bucket_start < r.period_end AND {OWN})
           ELSE (
               SELECT count(*) FROM (
                   SELECT DISTINCT u.digest FROM usage_totals t JOIN usage_uniques u ON u.total_id = t.id
                    WHERE t.customer_ref = ANY(r.refs) AND t.meter = r.meter
                      AND t.bucket_start >= r.period_start AND t.bucket_start < r.period_end AND {OWN}) seen)
           END AS value,
           (SELECT max(d.timestamp) FROM usage_deliveries d
             WHERE d.customer = r.customer AND d.event_name = r.meter
               AND d.timestamp >= extract(epoch FROM r.period_start)
               AND d.timestamp < extract(epoch FROM r.period_end)) AS last_second,
           (SELECT d.value FROM usage_deliveries d
             WHERE d.customer = r.customer AND d.event_name = r.meter AND d.aggregation = r.aggregation
               AND d.timestamp >= extract(epoch FROM r.period_start)
               AND d.timestamp < extract(epoch FROM r.period_end)
               AND d.state IN ('pending', 'sending', 'sent', 'confirmed')
             ORDER BY d.timestamp DESC, d.id DESC LIMIT 1) AS said
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(number integer, customer text, meter text, aggregation text, refs text[], period_start timestamptz,
             period_end timestamptz)
     ORDER BY r.number
""")  # noqa: S608  a constant


class Total(NamedTuple):
    """A locked total with something to seal. `seal` is the number of its open part."""

    id: int
    customer_ref: str
    meter: str
    bucket_start: datetime
    bucket_end: datetime
    aggregation: str
    quantity: Decimal
    unsealed: Decimal
    unsealed_events: int
    seal: int
    customer: str


class Part(NamedTuple):
    """One delivery to be. `opened_seal`: the seal of the events that it carries. `of_event`: the one event's key.

    `parked`: the reason, where Stripe cannot be told.
    """

    total: Total
    opened_seal: int
    seal: int
    value: Decimal
    at: datetime
    events: int
    says_something: bool = True
    of_event: tuple[str, str] | None = None
    parked: str | None = None


async def list_parts(connection: AsyncConnection, totals: Sequence[Total], now: datetime) -> list[Part]:
    """What is to be told of each total's open part, in the order in which it is to be said.

    The events of `count` totals are numbered on the way; of a total, or of all, with very many some stay open for the
    next time, and a total may have no part at all.
    """
    by_aggregation: dict[str, list[Total]] = {}
    for total in totals:
        told = "sum" if _is_too_old(total, now) else total.aggregation
        by_aggregation.setdefault(told, []).append(total)
    parts = [part for total in by_aggregation.get("sum", []) for part in _list_added(total, now)]
    if counted := by_aggregation.get("count"):
        parts += await _list_counted(connection, counted, now)
    if latest := by_aggregation.get("last"):
        parts += await _list_latest(connection, latest, now)
    if running := by_aggregation.get("max", []) + by_aggregation.get("unique_count", []):
        parts += await _list_running(connection, running, now)
    return parts


def _is_too_old(total: Total, now: datetime) -> bool:
    """Whether Stripe takes no timestamp within the bucket any more: nothing is told, and one row says so."""
    return delivery_timestamp(total.bucket_start, total.bucket_end, now) < now - METER_EVENT_MAX_AGE


def _list_added(total: Total, now: datetime) -> list[Part]:
    at = delivery_timestamp(total.bucket_start, total.bucket_end, now)
    additive = total.aggregation in ("sum", "count")
    values = split_value(total.unsealed) if additive else [total.quantity]
    return [
        Part(total, total.seal, total.seal + number, value, at, total.unsealed_events if number == 0 else 0)
        for number, value in enumerate(values)
    ]


async def _list_counted(connection: AsyncConnection, totals: Sequence[Total], now: datetime) -> list[Part]:
    chosen: dict[int, Total] = {}
    events = 0
    for total in totals:
        if events < COUNTED_PER_TRANSACTION:
            chosen[total.id] = total
            events += min(total.unsealed_events, COUNTED_PER_SEAL)
    rows = json.dumps([{"total_id": total.id, "seal": total.seal} for total in chosen.values()])
    numbered = await connection.execute(
        NUMBER_EVENTS, {"rows": rows, "most": COUNTED_PER_SEAL, **_days(list(chosen.values()))}
    )
    parts = []
    for total_id, seal, source, id, timestamp in sorted(numbered):
        total = chosen[total_id]
        at = delivery_timestamp(timestamp.replace(microsecond=0), total.bucket_end, now)
        parts.append(Part(total, seal, seal, Decimal(1), at, 1, of_event=(source, id)))
    return parts


async def _list_latest(connection: AsyncConnection, totals: Sequence[Total], now: datetime) -> list[Part]:
    refs = await _find_refs(connection, totals)
    rows = [{"total_id": total.id, "seal": total.seal, "refs": refs[total.customer]} for total in totals]
    found = await connection.execute(FIND_LATEST, {"rows": json.dumps(rows), **_days(totals)})
    by_id = {total.id: total for total in totals}
    parts = []
    for total_id, last_at, new in found:
        total = by_id[total_id]
        at = delivery_timestamp(last_at.replace(microsecond=0), total.bucket_end, now)
        events = total.unsealed_events
        parts.append(Part(total, total.seal, total.seal, total.quantity, at, events, says_something=new))
    return parts


async def _list_running(connection: AsyncConnection, totals: Sequence[Total], now: datetime) -> list[Part]:
    # Last of all locks, and in one order: whoever waits here holds none that the one before it still needs.
    for customer, meter in sorted({(total.customer, total.meter) for total in totals}):
        await connection.execute(TAKE_TURN, {"lock": RUNNING_LOCK, "name": f"{customer} {meter}"})
    refs = await _find_refs(connection, totals)
    periods = await find_periods(
        connection, [UsageMoment(total.customer, total.meter, total.bucket_start) for total in totals]
    )
    keys = [
        (total.customer, total.meter, total.aggregation, period) for total, period in zip(totals, periods, strict=True)
    ]
    streams = await _find_streams(connection, dict.fromkeys(keys), refs)
    parts = []
    for total, key in sorted(zip(totals, keys, strict=True), key=lambda pair: pair[0].bucket_start):
        stream, period = streams[key], key[3]
        at = delivery_timestamp(total.bucket_start, total.bucket_end, now)
        new, parked = stream.value != stream.said, None
        if new:
            # Stripe takes nothing that lies further ahead than 5 minutes, and what is outside bills another period.
            at = max(at, stream.last + SECOND) if stream.last else at
            at = min(at, period.end - SECOND, max(now + METER_EVENT_MAX_AHEAD / 2, total.bucket_start))
            if stream.last and at <= stream.last:
                # Of two values at one second nobody knows which one Stripe bills.
                if at < period.end - SECOND:
                    continue  # later there will be room: it stays open
                parked = "no_second_left"
            stream.said, stream.last = stream.value, at
        parts.append(Part(total, total.seal, total.seal, stream.value, at, total.unsealed_events, new, parked=parked))
    return parts


@dataclass
class _Stream:
    """The running value of a period: as it is known now, as it was said last, and the second at which that was."""

    value: Decimal
    said: Decimal | None
    last: datetime | None


async def _find_streams(
    connection: AsyncConnection, keys: Iterable[tuple[str, str, str, Period]], refs: Mapping[str, list[str]]
) -> dict[tuple[str, str, str, Period], _Stream]:
    wanted = list(keys)
    rows = [
        {
            "number": number,
            "customer": customer,
            "meter": meter,
            "aggregation": aggregation,
            "refs": refs[customer],
            "period_start": period.start.isoformat(),
            "period_end": period.end.isoformat(),
        }
        for number, (customer, meter, aggregation, period) in enumerate(wanted)
    ]
    found = await connection.execute(FIND_RUNNING, {"rows": json.dumps(rows)})
    return {
        key: _Stream(value, said, None if second is None else datetime.fromtimestamp(second, UTC))
        for key, (value, second, said) in zip(wanted, found, strict=True)
    }


async def _find_refs(connection: AsyncConnection, totals: Sequence[Total]) -> dict[str, list[str]]:
    """All references of the customers of these totals."""
    found = await connection.execute(FIND_REFS, {"customers": sorted({total.customer for total in totals})})
    return {row.customer: row.refs for row in found}


def _days(totals: Sequence[Total]) -> dict[str, date]:
    """The days of the ledger in which the events of these totals lie."""
    return {
        "first_day": min(total.bucket_start for total in totals).date(),
        "last_day": max(total.bucket_end for total in totals).date(),
    }


def delivery_timestamp(earliest: datetime, bucket_end: datetime, now: datetime) -> datetime:
    """The second that is wanted, or as much later within the bucket as Stripe's 35 days ask for; whole seconds.

    Period boundaries are whole seconds, so every whole second of a bucket lies in the same period as the bucket.
    """
    still_taken = now - OLDEST_TO_SEAL
    if earliest >= still_taken:
        return earliest
    return max(earliest, min(still_taken.replace(microsecond=0), bucket_end - SECOND))


def split_value(value: Decimal) -> list[Decimal]:
    """Cut a quantity into parts that Stripe takes, of at most 15 digits each as written, with the same exact sum.

    Whole parts are cut off by the largest that fits, so there are never more parts than events of which they are the
    sum. A sum of 0 is one part: its events are told like any others.
    """
    digits, exponent = value.as_tuple()[1:]
    if value and isinstance(exponent, int) and exponent <= 0 and len(digits) <= METER_EVENT_DIGITS:
        return [value]
    parts: list[Decimal] = []
    with localcontext(prec=MAX_SUM_DIGITS):  # the default context would round at 28
        sign = Decimal(-1 if value < 0 else 1)
        rest = abs(value)
        while rest > LARGEST_PART:
            parts.append(sign * LARGEST_PART)
            rest -= LARGEST_PART
        if len(plain(rest).replace(".", "").lstrip("0")) > METER_EVENT_DIGITS:
            parts.append(sign * rest.to_integral_value(ROUND_DOWN))
            rest -= rest.to_integral_value(ROUND_DOWN)
        if rest:
            parts.append(sign * rest)
    return parts or [Decimal(0)]


def make_identifier(installation: str, part: Part) -> str:
    """The name under which Stripe takes this part once (docs/decisions/0005-identifiers.md).

    It is made of what the total is and not of its row's number, so that a restored database cannot give one name to two
    different things. What carries one event of its own is named after it, whatever number it got.
    """
    total = part.total
    named = f"{total.customer_ref}\0{total.meter}\0{total.bucket_start.isoformat()}"
    end = str(part.seal)
    if part.of_event is not None:
        named += "\0" + "\0".join(part.of_event)
        end = "e"
    return f"tally-{installation}-{hashlib.blake2b(named.encode(), digest_size=12).hexdigest()}-{end}"
