"""Reconciliation: Stripe's own summaries, hour by hour, against what was sent.

    1. claim    customers and meters with deliveries that Stripe took some minutes ago, those with a draft invoice
                first; a lease keeps other workers off
    2. ask      Stripe's event summaries of the hours in question, of each meter that has had the name; with the calls
                that deliveries leave (usage/rates.py)
    3. judge    each hour by itself (usage/agreement.py): agrees, waits for the summaries to catch up, or differs
    4. write    `confirmed`, or a drift with both numbers; what nobody knew the outcome of is settled

Stripe names no bound for how far its summaries lag behind, so a difference counts as one only a day after the last
delivery of its hour was settled. Nothing here is lost by dying: the same question is asked again after the lease.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.loops import all_ended
from tallystick.resources import Resources
from tallystick.stripe_gateway import STRIPE_ERRORS
from tallystick.stripe_limits import OBJECTS_PER_PAGE
from tallystick.usage.agreement import Hour, Judgement, Verdict, judge
from tallystick.usage.meters import Meter, read_namesakes
from tallystick.usage.rates import wait_to_ask

log = structlog.get_logger()

# A summary is asked for this long after a delivery was taken: sooner, it would mostly have to be asked again. A draft
# invoice cannot wait for that.
ASK_AFTER = timedelta(minutes=5)
ASK_AFTER_WITH_DRAFT = timedelta(minutes=2)

# When not everything agrees yet: again soon in the first hour, later each hour.
SOON = timedelta(hours=1)
AGAIN_SOON = timedelta(minutes=5)
AGAIN_LATER = timedelta(hours=1)

PAIRS_PER_RUN = 200
# Reading takes the connections of the worker's other calls.
CONCURRENCY = 8

# As long as a whole run may take while every call of it times out, and some.
LEASE = timedelta(minutes=15)

SUMMARIES_PER_PAGE = OBJECTS_PER_PAGE

# Those whose turn was longest ago, so that hours which do not agree leave room for others. One that was never answered
# has only the time when it is to be asked again.
CLAIM = text("""
    WITH unsettled AS (
        SELECT customer, event_name, min(settled_at) AS since
          FROM usage_deliveries
         WHERE state = 'sent' AND sender <> 'usage_records'
         GROUP BY 1, 2
        UNION ALL
        SELECT customer, event_name, min(settled_at)
          FROM usage_deliveries
         WHERE state = 'parked' AND reason = 'outcome_unknown' AND sender <> 'usage_records'
         GROUP BY 1, 2
    ), drafts AS (
        SELECT DISTINCT customer, event_name FROM metered_invoices WHERE status = 'draft'
    ), pairs AS (
        SELECT customer, event_name, min(u.since) AS since, d.customer IS NOT NULL AS draft
          FROM unsettled u LEFT JOIN drafts d USING (customer, event_name)
         GROUP BY 1, 2, 4
    ), due AS (
        SELECT customer, event_name, since, draft
          FROM pairs LEFT JOIN usage_checks c USING (customer, event_name)
         WHERE coalesce(c.leased_until, '-infinity') <= :now
           AND CASE WHEN draft THEN since <= :settled_with_draft
                                    AND coalesce(c.checked_at, '-infinity') <= :settled_with_draft
                    ELSE since <= :settled AND coalesce(c.next_check_at, '-infinity') <= :now END
         ORDER BY draft DESC, coalesce(c.checked_at, c.next_check_at) NULLS FIRST, since LIMIT :limit
    )
    INSERT INTO usage_checks AS c (customer, event_name, leased_until)
    SELECT customer, event_name, :leased_until FROM due ORDER BY customer, event_name
    ON CONFLICT (customer, event_name) DO UPDATE SET leased_until = excluded.leased_until
     WHERE c.leased_until <= :now
    RETURNING customer, event_name
""")

FIND_SPAN = text("""
    SELECT min(timestamp) AS first, max(timestamp) AS last
      FROM usage_deliveries
     WHERE customer = :customer AND event_name = :event_name
       AND (state = 'sent' OR state = 'parked' AND reason = 'outcome_unknown')
""")

# Hours are whole on both sides, and so a slice of deliveries is one of hours.
FIND_PAIRS = text("""
    SELECT customer, event_name, min(timestamp), max(timestamp)
      FROM usage_deliveries
     WHERE (state IN ('sent', 'confirmed') OR state = 'parked' AND reason = 'outcome_unknown')
       AND sender <> 'usage_records'
       AND (CAST(:customer AS text) IS NULL OR customer = :customer)
       AND (CAST(:meter AS text) IS NULL OR event_name = :meter)
       AND (CAST(:from AS timestamptz) IS NULL
            OR to_timestamp(timestamp) >= date_trunc('hour', CAST(:from AS timestamptz)))
       AND (CAST(:to AS timestamptz) IS NULL OR to_timestamp(timestamp) < CAST(:to AS timestamptz))
     GROUP BY 1, 2 ORDER BY 1, 2
""")

FIND_DRIFTS = text("""
    SELECT customer, event_name AS meter, hour, ours, stripes, first_seen_at, checked_at
      FROM usage_drifts
     WHERE resolved_at IS NULL
       AND (CAST(:customer AS text) IS NULL OR customer = :customer)
       AND (CAST(:meter AS text) IS NULL OR event_name = :meter)
       AND (CAST(:from AS timestamptz) IS NULL OR hour >= date_trunc('hour', CAST(:from AS timestamptz)))
       AND (CAST(:to AS timestamptz) IS NULL OR hour < CAST(:to AS timestamptz))
     ORDER BY 1, 2, 3
""")

# One row an hour and formula. Of an hour everything counts that Stripe may have taken, settled long ago or not.
READ_HOURS = text("""
    SELECT timestamp / 3600 AS number,
           CASE WHEN aggregation IN ('max', 'unique_count') THEN 'last' ELSE aggregation END AS formula,
           coalesce(sum(value) FILTER (WHERE state IN ('sent', 'confirmed')), 0) AS total,
           count(*) FILTER (WHERE state IN ('sent', 'confirmed')) AS taken,
           (array_agg(value ORDER BY timestamp DESC, id DESC)
               FILTER (WHERE state IN ('sent', 'confirmed')))[1] AS latest,
           (array_agg(ARRAY[timestamp, id] ORDER BY timestamp DESC, id DESC)
               FILTER (WHERE state IN ('sent', 'confirmed')))[1:1] AS latest_key,
           array_remove(array_agg(id) FILTER (WHERE state = 'sent'), NULL) AS sent,
           coalesce(bool_or(value < 0) FILTER (WHERE state = 'sent'), false) AS takes_back,
           array_agg(id ORDER BY timestamp, id) FILTER (WHERE unknown) AS unknown_ids,
           array_agg(value ORDER BY timestamp, id) FILTER (WHERE unknown) AS unknown_values,
           array_agg(timestamp ORDER BY timestamp, id) FILTER (WHERE unknown) AS unknown_at,
           bool_or(state = 'sending' OR state = 'pending' AND unknown_since IS NOT NULL) AS on_its_way,
           max(settled_at) AS settled_at
      FROM (SELECT *, state = 'parked' AND reason = 'outcome_unknown' AS unknown
              FROM usage_deliveries
             WHERE customer = :customer AND event_name = :event_name AND timestamp >= :start AND timestamp < :end
               AND sender <> 'usage_records') d
     GROUP BY 1, 2
""")

# Only what still is what was judged: a report of Stripe's may have parked it meanwhile.
CONFIRM = text("""
    UPDATE usage_deliveries SET state = 'confirmed', confirmed_at = :now
     WHERE id = ANY(:ids) AND state = 'sent'
""")

SETTLE_UNKNOWN = text("""
    UPDATE usage_deliveries
       SET state = :state, reason = :reason, unknown_since = NULL, next_attempt_at = :now,
           settled_at = CASE WHEN :state = 'pending' THEN NULL ELSE CAST(:now AS timestamptz) END,
           confirmed_at = CASE WHEN :state = 'confirmed' THEN CAST(:now AS timestamptz) END
     WHERE id = ANY(:ids) AND state = 'parked' AND reason = 'outcome_unknown'
""")

# A drift that comes back after it was resolved is a new one.
NOTE_DRIFTS = text("""
    INSERT INTO usage_drifts AS d (customer, event_name, hour, ours, stripes, first_seen_at, checked_at)
    SELECT :customer, :event_name, hour, ours, stripes, :now, :now
      FROM json_to_recordset(CAST(:rows AS json)) AS r(hour timestamptz, ours numeric, stripes numeric)
     ORDER BY hour
    ON CONFLICT (customer, event_name, hour) DO UPDATE SET
        ours = excluded.ours, stripes = excluded.stripes, checked_at = excluded.checked_at,
        first_seen_at = CASE WHEN d.resolved_at IS NULL THEN d.first_seen_at ELSE excluded.first_seen_at END,
        resolved_at = NULL
""")

RESOLVE_DRIFTS = text("""
    UPDATE usage_drifts SET resolved_at = :now, checked_at = :now
     WHERE customer = :customer AND event_name = :event_name AND hour = ANY(:hours) AND resolved_at IS NULL
""")

NOTE_CHECK = text("""
    INSERT INTO usage_checks (customer, event_name, checked_at, next_check_at)
    VALUES (:customer, :event_name, :now, :next_check_at)
    ON CONFLICT (customer, event_name) DO UPDATE SET
        checked_at = excluded.checked_at, next_check_at = excluded.next_check_at, leased_until = '-infinity'
""")

POSTPONE = text("""
    UPDATE usage_checks SET next_check_at = :next_check_at, leased_until = '-infinity'
     WHERE customer = :customer AND event_name = :event_name
""")


@dataclass(frozen=True)
class Compared:
    """What one comparison of a customer and meter came to: numbers of hours, and of deliveries that were confirmed."""

    agreeing: int = 0
    waiting: int = 0
    drifting: int = 0
    confirmed: int = 0


async def reconcile_sent(resources: Resources, now: datetime) -> int:
    """The worker's loop: compare what is due; how many customers and meters were compared."""
    async with db.transaction(resources.engine) as connection:
        rows = await connection.execute(
            CLAIM,
            {
                "now": now,
                "settled": now - ASK_AFTER,
                "settled_with_draft": now - ASK_AFTER_WITH_DRAFT,
                "leased_until": now + LEASE,
                "limit": PAIRS_PER_RUN,
            },
        )
        pairs = [(str(customer), str(event_name)) for customer, event_name in rows]
        namesakes = await read_namesakes(connection)
    # Died here, or anywhere below: the lease ends, and the same is asked again.
    lanes = asyncio.Semaphore(CONCURRENCY)

    async def reconcile(customer: str, event_name: str) -> bool:
        async with lanes:
            span = await _find_span(resources, customer, event_name)
            meters = namesakes.get(event_name)
            try:
                if meters and span is not None:
                    await compare(resources, meters, customer, *span, now)
                    return True
            except STRIPE_ERRORS as error:
                log.warning("summary_not_read", customer=customer, meter=event_name, error=type(error).__name__)
            async with db.transaction(resources.engine) as connection:
                pair = {"customer": customer, "event_name": event_name}
                await connection.execute(POSTPONE, pair | {"next_check_at": now + AGAIN_SOON})
            return False

    return sum(await all_ended(reconcile(*pair) for pair in pairs))


class FormulaHour(NamedTuple):
    """An hour of the meters of one name that have one formula; a meter that was made anew may have another."""

    at: datetime
    formula: str


async def compare(
    resources: Resources, meters: Sequence[Meter], customer: str, start: datetime, end: datetime, now: datetime
) -> Compared:
    """Ask Stripe for the hours from `start` to `end` (whole hours) and write down what comes of it.

    `meters`: all that have had one name, first the one that has it now. Raises Stripe's errors. Safe to repeat, and
    beside another one: each hour is judged from one snapshot of what was sent, and only what was judged is changed.
    """
    theirs: dict[FormulaHour, Decimal] = {}
    for meter in meters:
        for at, value in (await _read_summaries(resources, meter, customer, start, end)).items():
            hour = FormulaHour(at, meter.formula)
            # In the hour in which the name went to another meter, what this one was told last is the latest.
            theirs[hour] = theirs.get(hour, value) if meter.formula == "last" else theirs.get(hour, 0) + value
    # Deliveries that are taken while the answer is on its way make an hour differ, and so wait.
    async with db.transaction(resources.engine) as connection:
        return await _write(connection, meters[0].event_name, customer, theirs, start, end, now)


async def _write(
    connection: AsyncConnection,
    event_name: str,
    customer: str,
    theirs: Mapping[FormulaHour, Decimal],
    start: datetime,
    end: datetime,
    now: datetime,
) -> Compared:
    pair = {"customer": customer, "event_name": event_name}
    span = {"start": int(start.timestamp()), "end": int(end.timestamp())}
    rows = (await connection.execute(READ_HOURS, pair | span)).mappings()
    ours = {FormulaHour(datetime.fromtimestamp(row["number"] * 3600, UTC), row["formula"]): _hour(row) for row in rows}
    judged = {
        hour: judge(ours.get(hour, Hour()), theirs.get(hour), hour.formula, now) for hour in sorted({*ours, *theirs})
    }
    confirmed = [id for judgement in judged.values() for id in judgement.confirmed]
    await connection.execute(CONFIRM, {"ids": confirmed, "now": now})
    for state, reason, ids in _settled_unknowns(list(judged.values())):
        await connection.execute(SETTLE_UNKNOWN, {"state": state, "reason": reason, "ids": ids, "now": now})
    verdicts: dict[Verdict, list[FormulaHour]] = {"agrees": [], "waits": [], "differs": []}
    for hour, judgement in judged.items():
        verdicts[judgement.verdict].append(hour)
    # One row an hour, also where it differs in two formulas.
    drifts = {
        hour.at: {"hour": hour.at.isoformat(), "ours": str(judged[hour].ours), "stripes": str(theirs.get(hour, 0))}
        for hour in verdicts["differs"]
    }
    agreeing, waiting = verdicts["agrees"], [ours[hour] for hour in verdicts["waits"]]
    resolved = {hour.at for hour in agreeing} - {hour.at for hour in judged.keys() - agreeing}
    await connection.execute(NOTE_DRIFTS, pair | {"rows": json.dumps(list(drifts.values())), "now": now})
    await connection.execute(RESOLVE_DRIFTS, pair | {"hours": sorted(resolved), "now": now})
    fresh = any(hour.settled_at is None or hour.settled_at > now - SOON for hour in waiting)
    next_check_at = now + (AGAIN_SOON if fresh or len(agreeing) == len(judged) else AGAIN_LATER)
    await connection.execute(NOTE_CHECK, pair | {"now": now, "next_check_at": next_check_at})
    for drift in drifts.values():
        log.error("usage_drift", customer=customer, meter=event_name, **drift)
    return Compared(len(agreeing), len(waiting), len(drifts), len(confirmed))


def _settled_unknowns(judged: Sequence[Judgement]) -> list[tuple[str, str, list[int]]]:
    return [
        ("confirmed", "found_in_summary", [id for judgement in judged for id in judgement.taken]),
        ("pending", "not_in_summary", [id for judgement in judged for id in judgement.not_taken]),
        ("voided", "superseded", [id for judgement in judged for id in judgement.superseded]),
    ]


def _hour(row: Mapping[Any, Any]) -> Hour:
    unknown = zip(row["unknown_ids"] or (), row["unknown_values"] or (), row["unknown_at"] or (), strict=True)
    return Hour(
        total=row["total"],
        number=row["taken"],
        latest=row["latest"],
        latest_key=tuple(row["latest_key"][0]) if row["latest_key"] else None,
        sent=tuple(row["sent"] or ()),
        takes_back=row["takes_back"],
        unknown=tuple(unknown),
        on_its_way=row["on_its_way"],
        settled_at=row["settled_at"],
    )


async def _find_span(resources: Resources, customer: str, event_name: str) -> tuple[datetime, datetime] | None:
    async with db.transaction(resources.engine) as connection:
        row = (await connection.execute(FIND_SPAN, {"customer": customer, "event_name": event_name})).one()
    return None if row.first is None else _whole_hours(row.first, row.last)


def _whole_hours(first: int, last: int) -> tuple[datetime, datetime]:
    """From the hour of the first Unix second to the end of the hour of the last one."""
    hour = 3600
    return (
        datetime.fromtimestamp(first // hour * hour, UTC),
        datetime.fromtimestamp((last // hour + 1) * hour, UTC),
    )


async def _read_summaries(
    resources: Resources, meter: Meter, customer: str, start: datetime, end: datetime
) -> dict[datetime, Decimal]:
    """Stripe's value of each hour that has one (https://docs.stripe.com/api/billing/meter-event-summary/list).

    The SDK would read the value, a JSON number, into binary floating point; so its plain answer is read here.
    """
    parameters: dict[str, Any] = {
        "customer": customer,
        "start_time": int(start.timestamp()),
        "end_time": int(end.timestamp()),
        "value_grouping_window": "hour",
        "limit": SUMMARIES_PER_PAGE,
    }
    values: dict[datetime, Decimal] = {}
    while True:
        await wait_to_ask(resources)
        answer = await resources.stripe.raw_request_async(
            "get", f"/v1/billing/meters/{meter.id}/event_summaries", **parameters
        )
        page = json.loads(answer.body, parse_float=Decimal)
        for summary in page["data"]:
            at = datetime.fromtimestamp(summary["start_time"], UTC)
            # Whether `end_time` is included is said nowhere.
            if start <= at < end:
                values[at] = Decimal(summary["aggregated_value"])
        if not page["has_more"] or not page["data"]:
            return values
        parameters["starting_after"] = page["data"][-1]["id"]


@dataclass(frozen=True)
class Pair:
    """A customer and a meter with deliveries that Stripe has, or may have, from hour `start` to hour `end`."""

    customer: str
    event_name: str
    start: datetime
    end: datetime


async def find_pairs(connection: AsyncConnection, wanted: Mapping[str, Any]) -> list[Pair]:
    """What can be compared of a slice: `customer`, `meter`, `from` and `to`, each None for all; hours are whole."""
    rows = await connection.execute(FIND_PAIRS, dict(wanted))
    return [Pair(customer, event_name, *_whole_hours(first, last)) for customer, event_name, first, last in rows]


async def find_drifts(connection: AsyncConnection, wanted: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The open drifts of the same slice, with `ours`, `stripes` and when each was first seen."""
    return [dict(row) for row in (await connection.execute(FIND_DRIFTS, dict(wanted))).mappings()]


async def compare_now(resources: Resources, pair: Pair, now: datetime) -> Compared | None:
    """Ask Stripe about a pair, whenever that was done last; None when Stripe has no such meter. Raises its errors."""
    async with db.transaction(resources.engine) as connection:
        meters = (await read_namesakes(connection)).get(pair.event_name)
    return await compare(resources, meters, pair.customer, pair.start, pair.end, now) if meters else None
