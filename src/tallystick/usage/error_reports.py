"""Error reports: what Stripe took with a 2xx and could not bill.

Stripe tells of it by thin events (https://docs.stripe.com/billing/subscriptions/usage-based/recording-usage-api):

    1. note     the event's id, in the webhook's own transaction; thin events carry no data
    2. fetch    the event itself; tried again while Stripe cannot be asked
    3. settle   each sample names a call by its Idempotency-Key, and the call its delivery (`Message.idempotency_key`):
                that one is parked with Stripe's code, whatever state it was in

A report holds samples and not every failure. What it does not name shows up in the summaries as a drift.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.resources import Resources
from tallystick.stripe_gateway import STRIPE_ERRORS
from tallystick.stripe_limits import EVENTS_LISTED_FOR, WEBHOOKS_TRIED_FOR
from tallystick.usage.parking import announce_parked
from tallystick.usage.senders.outcomes import DUPLICATE

log = structlog.get_logger()

REPORTS_PER_RUN = 20

# As long as a run may take while every call of it times out, and some.
LEASE = timedelta(minutes=30)
LONGEST_PAUSE = timedelta(hours=1)
# A delivery that is on its way has to arrive before it can be parked.
WAIT_FOR_SENDING = timedelta(minutes=1)

LISTED_TYPES = ["v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found"]

# `identifier.attempt.four hexadecimal digits`; Stripe may also name the meter event's identifier itself.
KEY = re.compile(r"(?P<identifier>.+)\.\d+\.[0-9a-f]{4}")

NOTE = text("""
    INSERT INTO meter_error_reports (event, type, meter, received_at, next_attempt_at)
    SELECT event, type, meter, :now, :now
      FROM json_to_recordset(CAST(:rows AS json)) AS r(event text, type text, meter text)
     ORDER BY event
    ON CONFLICT (event) DO NOTHING
""")

CLAIM = text("""
    UPDATE meter_error_reports SET next_attempt_at = :leased_until
     WHERE event = ANY(ARRAY(SELECT event FROM meter_error_reports
                              WHERE fetched_at IS NULL AND next_attempt_at <= :now
                              ORDER BY next_attempt_at LIMIT :limit FOR UPDATE SKIP LOCKED))
    RETURNING event, failures
""")

POSTPONE = text("""
    UPDATE meter_error_reports SET next_attempt_at = :next_attempt_at, failures = failures + :failures
     WHERE event = :event AND fetched_at IS NULL
""")

# Voided ones were written off knowingly. One that is on its way is looked at again when it has arrived.
FIND_NAMED = text("""
    SELECT d.id, d.identifier, d.state, d.reason FROM usage_deliveries d
     WHERE d.identifier = ANY(:identifiers) AND d.state <> 'voided' ORDER BY d.id FOR UPDATE
""")

# The report is one of the delivery's tries, and names Stripe's event.
PARK = text("""
    WITH parked AS (
        UPDATE usage_deliveries d
           SET state = 'parked', reason = r.reason, settled_at = :now, confirmed_at = NULL, unknown_since = NULL,
               attempts = d.attempts + 1
          FROM json_to_recordset(CAST(:rows AS json)) AS r(id bigint, reason text)
         WHERE d.id = r.id
        RETURNING d.id, d.attempts, d.customer, d.identifier, d.event_name, d.timestamp, d.reason
    ), noted AS (
        INSERT INTO usage_delivery_attempts (delivery_id, attempt, at, outcome, reason, request_id)
        SELECT id, attempts, CAST(:now AS timestamptz), 'parked', reason, :event FROM parked
    )
    SELECT customer, identifier, event_name, timestamp, reason FROM parked
""")

# Counted only: the report is done with.
FETCHED = text("""
    UPDATE meter_error_reports SET fetched_at = :now, errors = :errors, found = :found
     WHERE event = :event AND fetched_at IS NULL
    RETURNING true
""")

FIND_LAST = text("SELECT max(received_at) FROM meter_error_reports")


class ErrorReport(NamedTuple):
    """A thin event about meter events that could not be billed: its id and type, and the meter, if it names one."""

    event: str
    type: str
    meter: str | None


@dataclass(frozen=True)
class Sample:
    """One failure that a report names: the delivery's identifier, as far as it can be read, and Stripe's reason."""

    identifier: str
    reason: str


async def note_error_reports(connection: db.Connection, reports: Sequence[ErrorReport], now: datetime) -> None:
    """Have reports fetched soon; those that are noted already stay as they are. The caller commits."""
    if reports:
        rows = json.dumps([report._asdict() for report in reports])
        await connection.execute(NOTE, {"rows": rows, "now": now})


async def fetch_error_reports(resources: Resources, now: datetime) -> int:
    """The worker's loop: fetch the reports that are due and park what they name; how many were fetched."""
    async with db.transaction(resources.engine) as connection:
        claimed = (
            await connection.execute(CLAIM, {"now": now, "leased_until": now + LEASE, "limit": REPORTS_PER_RUN})
        ).all()
    # Died here, or anywhere below: the lease ends, and the same report is fetched again.
    return sum([await _fetch(resources, report.event, report.failures, now) for report in claimed])


async def find_error_reports(resources: Resources, now: datetime) -> int:
    """The worker's loop: note reports that no webhook brought, from Stripe's list; how many it listed.

    Stripe lists thin events for 30 days (https://docs.stripe.com/api/v2/core/events/list), whether or not they have a
    destination.
    """
    async with db.transaction(resources.engine) as connection:
        last = await connection.scalar(FIND_LAST)
    # What Stripe has listed for longer than it tries webhooks has come, if it comes at all.
    since = now - EVENTS_LISTED_FOR if last is None else max(now - EVENTS_LISTED_FOR, last - WEBHOOKS_TRIED_FOR)
    try:
        page = await resources.stripe.v2.core.events.list_async(
            {"types": LISTED_TYPES, "created": {"gte": since.astimezone(UTC).isoformat().replace("+00:00", "Z")}}
        )
        listed = [event.to_dict() async for event in page.auto_paging_iter()]
    except STRIPE_ERRORS as error:
        log.warning("error_reports_not_listed", error=type(error).__name__, status=error.http_status)
        return 0
    reports = [
        ErrorReport(event["id"], event["type"], (event.get("related_object") or {}).get("id"))
        for event in listed
        if not event.get("context")
    ]
    async with db.transaction(resources.engine) as connection:
        await note_error_reports(connection, reports, now)
    return len(reports)


async def _fetch(resources: Resources, event_id: str, failures: int, now: datetime) -> bool:
    try:
        event = await resources.stripe.v2.core.events.retrieve_async(event_id)
    except STRIPE_ERRORS as error:
        log.warning("error_report_not_fetched", event_id=event_id, error=type(error).__name__, status=error.http_status)
        pause = min(timedelta(seconds=2 ** min(failures, 16)), LONGEST_PAUSE)
        async with db.transaction(resources.engine) as connection:
            await connection.execute(POSTPONE, {"event": event_id, "next_attempt_at": now + pause, "failures": 1})
        return False
    reason = _object(_object(event.to_dict().get("data")).get("reason"))
    samples = list(_read_samples(reason))
    async with db.transaction(resources.engine) as connection:
        found = await _settle(connection, event_id, samples, reason.get("error_count"), now)
    if found is None:
        return False
    errors = reason.get("error_count")
    log.error("usage_not_billed", event_id=event_id, errors=errors, found=found, named=len(samples))
    return True


async def _settle(
    connection: AsyncConnection, event_id: str, samples: Sequence[Sample], errors: Any, now: datetime
) -> int | None:
    """Park what the samples name; how many there are, or None while one of them is still on its way."""
    reasons = {sample.identifier: sample.reason for sample in samples}
    rows = (await connection.execute(FIND_NAMED, {"identifiers": sorted(reasons)})).all()
    if any(row.state == "sending" for row in rows):
        next_attempt_at = now + WAIT_FOR_SENDING
        await connection.execute(POSTPONE, {"event": event_id, "next_attempt_at": next_attempt_at, "failures": 0})
        return None
    counted = {"event": event_id, "now": now, "errors": errors if isinstance(errors, int) else None}
    if not await connection.scalar(FETCHED, counted | {"found": len(rows)}):
        return None  # another worker, after the lease had ended
    # Already parked with an outcome that was unknown: now it is known. With another reason: it says enough.
    wanted = [row for row in rows if row.state != "parked" or row.reason == "outcome_unknown"]
    parking = json.dumps([{"id": row.id, "reason": reasons[row.identifier]} for row in wanted])
    parked = await connection.execute(PARK, {"rows": parking, "now": now, "event": event_id})
    await announce_parked(connection, parked.mappings().all())
    return len(rows)


def _read_samples(reason: Mapping[str, Any]) -> Iterator[Sample]:
    for kind in _list(reason.get("error_types")):
        code = _object(kind).get("code")
        for sample in _list(_object(kind).get("sample_errors")):
            request = _object(_object(sample).get("request"))
            # Stripe documents both names.
            key = request.get("identifier") or request.get("idempotency_key")
            # A repeat was taken the first time: parked, it could be resent, and then be billed twice.
            if not isinstance(code, str) or not isinstance(key, str) or code == DUPLICATE:
                continue
            named = KEY.fullmatch(key)
            message = _object(sample).get("error_message")
            yield Sample(named["identifier"] if named else key, f"{code}: {message}"[:200] if message else code)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else ()
