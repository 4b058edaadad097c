"""The trace of an event: from the product's id to Stripe's invoice, each step as it is written down.

    event        the ledger's row; several, if an id was used with timestamps of different days
    total        the customer's total that it was added to, and whether its part of it is sealed
    deliveries   what was told to Stripe under that seal, with every try and Stripe's answer
    summary      what Stripe's own summary said of that hour: confirmed, or a drift with both numbers
    invoice      the invoice that covers the delivery's timestamp

Nothing is inferred from how things usually go: each state has a word, and "not known" is one of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.buffer import is_remembered
from tallystick.usage.events import plain
from tallystick.usage.sealing import HOUR_SETTLES_IN

OpenBecause = Literal[
    "reference_not_linked",
    "meter_not_known",
    "meter_changed",
    "no_subscription",
    "hour_not_ended",
    "sealed_at_next_run",
]
# Where a delivery's quantity lies: `draft` and `final` invoices have it on them.
Place = Literal["final", "draft", "not_drafted_yet", "not_sent_yet", "not_known", "none"]

FIND_EVENTS = text("""
    SELECT e.day, e.customer_ref, e.meter, e.value, e.timestamp, e.stamped, e.received_at, e.properties, e.seal,
           t.id AS total_id, t.bucket_start, t.bucket_end, t.aggregation, t.quantity, t.events, t.seal AS open_seal,
           t.opened_at, r.customer,
           ARRAY(SELECT m.formula FROM meters m WHERE m.event_name = t.meter AND m.status = 'active') AS formulas,
           CASE WHEN t.aggregation IN ('max', 'unique_count') THEN 'last' ELSE t.aggregation END AS formula,
           EXISTS (SELECT FROM subscriptions s WHERE s.customer = r.customer) AS subscribed
      FROM usage_events e
      JOIN usage_totals t ON t.id = e.total_id
      LEFT JOIN customer_references r ON r.ref = e.customer_ref
     WHERE e.source = :source AND e.id = :id
     ORDER BY e.day
""")

FIND_DELIVERIES = text("""
    SELECT d.id, d.customer, d.event_name, d.identifier, d.sender, d.value, d.events, d.payload, d.timestamp, d.state,
           d.reason, d.attempts, d.next_attempt_at, d.unknown_since, d.created_at, d.settled_at, d.confirmed_at,
           d.carried_from, d.taken_late, drift.ours, drift.stripes, drift.first_seen_at, drift.resolved_at,
           checks.checked_at
      FROM usage_deliveries d
      LEFT JOIN usage_drifts drift ON drift.customer = d.customer AND drift.event_name = d.event_name
                                  AND drift.hour = date_trunc('hour', to_timestamp(d.timestamp), 'UTC')
      LEFT JOIN usage_checks checks ON checks.customer = d.customer AND checks.event_name = d.event_name
     WHERE d.total_id = :total AND d.opened_seal = :seal
     ORDER BY d.seal
""")

FIND_ATTEMPTS = text("""
    SELECT delivery_id, attempt, at, outcome, reason, http_status, request_id
      FROM usage_delivery_attempts WHERE delivery_id = ANY(:deliveries) ORDER BY delivery_id, attempt
""")

# A draft before a final one: usage that comes while both cover it goes onto the draft.
FIND_INVOICE = text("""
    SELECT invoice, status, period_start, period_end, finalized_at
      FROM metered_invoices
     WHERE customer = :customer AND (event_name = :event_name OR event_name IS NULL AND price = :price)
       AND period_start <= :at AND period_end > :at
     ORDER BY status <> 'draft', finalized_at DESC NULLS LAST, invoice
     LIMIT 1
""")

FIND_PERIOD = text("""
    SELECT period_start, period_end
      FROM metered_periods
     WHERE customer = :customer AND (event_name = :event_name OR event_name IS NULL AND price = :price)
       AND period_start <= :at AND period_end > :at
     ORDER BY period_start DESC LIMIT 1
""")

FIND_CONFLICTS = text("""
    SELECT customer_ref, meter, value, timestamp, received_at, found_at
      FROM usage_conflicts WHERE source = :source AND id = :id ORDER BY found_at, received_at
""")

FIND_CORRECTIONS = text("""
    SELECT id, action, value, delta, reason, method, why, state, invoice, requested_at, settled_at, note
      FROM usage_corrections WHERE source = :source AND event_id = :id ORDER BY requested_at, id
""")


@dataclass(frozen=True)
class Trace:
    """What is known of an id: its events, and what came under the same id but said something else."""

    events: list[dict[str, Any]]
    conflicts: list[dict[str, Any]]
    corrections: list[dict[str, Any]]


async def trace_event(resources: Resources, source: str, id: str, now: datetime) -> Trace:
    """Everything that is written down about an event. `events` is empty when the ledger has none with this id."""
    rules = resources.rules.current(now)
    async with db.transaction(resources.engine) as connection:
        key = {"source": source, "id": id}
        found = (await connection.execute(FIND_EVENTS, key)).mappings().all()
        events = []
        for event in found:
            meter = rules.meters.get(event["meter"])
            held = timedelta(hours=resources.settings.hold_without_subscription_hours)
            events.append(await _trace(connection, event, meter.price if meter else None, held, now))
        conflicts = [_texts(row, "found_at") for row in (await connection.execute(FIND_CONFLICTS, key)).mappings()]
        corrections = [_plain(row) for row in (await connection.execute(FIND_CORRECTIONS, key)).mappings()]
    return Trace(events, conflicts, corrections)


async def waits_in_buffer(resources: Resources, source: str, id: str, now: datetime) -> bool:
    """Whether Redis remembers the id, for an event that the ledger did not have: it was accepted, and is on its way."""
    return await is_remembered(resources.redis, source, id, now, dedupe_hours=resources.settings.usage_dedupe_hours)


async def _trace(
    connection: AsyncConnection, event: Mapping[Any, Any], price: str | None, held: timedelta, now: datetime
) -> dict[str, Any]:
    sealed = event["seal"] < event["open_seal"]
    traced = _texts(event) | {"stamped": event["stamped"], "properties": event["properties"]}
    traced["total"] = {
        "bucket_start": event["bucket_start"],
        "bucket_end": event["bucket_end"],
        "aggregation": event["aggregation"],
        "quantity": plain(event["quantity"]),
        "events": event["events"],
        "seal": event["seal"] if sealed else None,
        "state": "sealed" if sealed else "open",
        "open_because": None if sealed else _why_open(event, price, held, now),
    }
    deliveries = []
    if sealed:
        selected = {"total": event["total_id"], "seal": event["seal"]}
        rows = (await connection.execute(FIND_DELIVERIES, selected)).mappings().all()
        tries = await connection.execute(FIND_ATTEMPTS, {"deliveries": [row["id"] for row in rows]})
        attempts = [dict(row) for row in tries.mappings()]
        for row in rows:
            own = [attempt for attempt in attempts if attempt["delivery_id"] == row["id"]]
            first_try = own[0]["at"] if own else row["settled_at"]
            invoice = await _invoice_of(connection, {**row, "first_try": first_try}, price)
            deliveries.append(_delivery(row, own) | {"invoice": invoice})
    else:
        # Sealed now, it would carry the bucket's start.
        at = {"customer": event["customer"], "event_name": event["meter"], "timestamp": event["bucket_start"]}
        traced["invoice"] = await _invoice_of(connection, at | {"state": "open"}, price)
    traced["deliveries"] = deliveries
    return traced


def _why_open(event: Mapping[Any, Any], price: str | None, held: timedelta, now: datetime) -> OpenBecause:
    if event["customer"] is None:
        return "reference_not_linked"
    if price is None and event["formula"] not in event["formulas"]:
        return "meter_changed" if event["formulas"] else "meter_not_known"
    if not event["subscribed"] and event["opened_at"] > now - held:
        return "no_subscription"
    return "hour_not_ended" if event["bucket_end"] > now - HOUR_SETTLES_IN else "sealed_at_next_run"


def _delivery(row: Mapping[Any, Any], attempts: list[dict[str, Any]]) -> dict[str, Any]:
    drift = None
    if row["first_seen_at"] is not None:
        drift = {
            "ours": plain(row["ours"]),
            "stripes": plain(row["stripes"]),
            "first_seen_at": row["first_seen_at"],
            "resolved_at": row["resolved_at"],
        }
    names = ("identifier", "customer", "event_name", "sender", "payload", "events", "state", "reason", "taken_late")
    times = ("created_at", "settled_at", "confirmed_at", "unknown_since", "carried_from")
    return {
        **{name: row[name] for name in names + times},
        "value": plain(row["value"]),
        "timestamp": datetime.fromtimestamp(row["timestamp"], UTC),
        "next_attempt_at": row["next_attempt_at"] if row["state"] == "pending" else None,
        "attempts": [{name: each[name] for name in each if name != "delivery_id"} for each in attempts],
        "summary_checked_at": row["checked_at"],
        "drift": drift,
    }


async def _invoice_of(connection: AsyncConnection, row: Mapping[Any, Any], price: str | None) -> dict[str, Any]:
    """Where a delivery's quantity lies, and the invoice and the period that cover its timestamp."""
    at = row["timestamp"]
    wanted = {
        "customer": row["customer"],
        "event_name": row["event_name"],
        "price": price,
        "at": at if isinstance(at, datetime) else datetime.fromtimestamp(at, UTC),
    }
    invoice = (await connection.execute(FIND_INVOICE, wanted)).one_or_none()
    period = invoice or (await connection.execute(FIND_PERIOD, wanted)).one_or_none()
    place, because = _place(row, invoice, period is not None)
    return {
        "place": place,
        "because": because,
        "invoice": invoice.invoice if invoice else None,
        "status": invoice.status if invoice else None,
        "period_start": period.period_start if period else None,
        "period_end": period.period_end if period else None,
    }


def _place(row: Mapping[Any, Any], invoice: Any, billed: bool) -> tuple[Place, str | None]:
    state = row["state"]
    if state in ("open", "pending", "sending"):
        return "not_sent_yet", None
    if state == "parked":
        unknown = row["reason"] == "outcome_unknown"
        return ("not_known", "outcome_unknown") if unknown else ("none", "parked")
    if state == "voided":
        return "none", "voided"
    if row["taken_late"]:
        return "none", "taken_after_finalization"
    if not billed:
        return "none", "no_subscription_bills_it"
    if invoice is None:
        return "not_drafted_yet", None
    if invoice.status == "draft":
        return "draft", None
    if invoice.finalized_at is None:
        return "not_known", "time_of_finalization_not_known"
    if row["settled_at"] <= invoice.finalized_at:
        return "final", None
    if row["first_try"] > invoice.finalized_at:
        return "none", "taken_after_finalization"
    return "not_known", "tried_before_and_after_finalization"


def _texts(row: Mapping[Any, Any], *more: str) -> dict[str, Any]:
    names = ("meter", "timestamp", "received_at", *more)
    return {"customer": row["customer_ref"], "value": plain(row["value"])} | {name: row[name] for name in names}


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    texts = {name: row[name] if row[name] is None else plain(row[name]) for name in ("value", "delta")}
    return {**row} | texts
