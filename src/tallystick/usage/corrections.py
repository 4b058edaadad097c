"""Corrections: an event is never edited. What takes it back or changes it is written down with its effect.

Which way is open is decided in one transaction, with the event's total locked:

    cancel       the event went to Stripe by itself, less than a day ago: Stripe is asked to cancel the meter event
                 (usage/cancellations.py), and the delivery becomes `voided`. Where a meter has no negative usage, an
                 event that Stripe was not told of becomes a voided delivery at once.
    compensate   the meter is a sum, no final invoice covers the event, and its reference means the same customer as
                 when it was sealed: a second event outweighs it
    propose      anything else: an operator is told, and settles or refuses it (usage/correction_commands.py)

A correction has its own id, so a repeat is recognised, and two corrections of one event come one after the other.
"""

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.errors import Conflict, NotFound
from tallystick.notifications.outbox import Notification, queue_notifications
from tallystick.rules import Rules
from tallystick.stripe_limits import METER_EVENT_CANCELLABLE_FOR
from tallystick.usage.aggregations import ADDITIVE, compute_totals
from tallystick.usage.events import MAX_AGE, UsageEvent, plain
from tallystick.usage.ledger import record_events
from tallystick.usage.parts import RUNNING_LOCK, TAKE_TURN
from tallystick.usage.periods import find_period
from tallystick.usage.trace import FIND_INVOICE

Action = Literal["void", "adjust"]
Method = Literal["cancel", "compensate", "propose"]
State = Literal["pending", "done", "proposed", "settled", "refused"]
Why = Literal[
    "invoice_final", "too_old", "not_sent", "moved", "does_not_add_up", "cancellation_refused", "cancellation_not_known"
]

# Counted from when its delivery was written down, before which Stripe cannot have received it. The hour in between is
# for asking again.
CANCEL_WITHIN = METER_EVENT_CANCELLABLE_FOR - timedelta(hours=1)

# No client can post an id with a control character.
CONTROL_CHARACTER = "\x1f"

LOCK_ID = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")

FIND_CORRECTION = text("SELECT * FROM usage_corrections WHERE source = :source AND id = :id")

# `billed`: who was told of the event's part at Stripe, whoever the reference means since.
FIND_EVENTS = text("""
    SELECT e.source, e.id, e.day, e.customer_ref, e.meter, e.value, e.timestamp, e.seal, e.properties, e.total_id,
           t.bucket_start, t.aggregation, t.seal AS open_seal, t.sealed_events, r.customer,
           coalesce((SELECT d.customer FROM usage_deliveries d
                      WHERE d.total_id = e.total_id AND d.opened_seal = e.seal LIMIT 1), r.customer) AS billed
      FROM usage_events e
      JOIN usage_totals t ON t.id = e.total_id
      LEFT JOIN customer_references r ON r.ref = e.customer_ref
     WHERE e.source = :source AND e.id = :id AND (CAST(:day AS date) IS NULL OR e.day = :day)
     ORDER BY e.day LIMIT 2
""")

LOCK_TOTAL = text("SELECT id FROM usage_totals WHERE id = :total FOR UPDATE")

# Differences add up in any order; those that asked at the same time were written in another order than they asked.
ADD_UP_EARLIER = text("""
    SELECT coalesce(sum(delta), 0) AS delta, count(*) > 0 AS corrected,
           coalesce(bool_or(action = 'void'), false) AS voided,
           coalesce(bool_or(state IN ('pending', 'proposed')), false) AS open
      FROM usage_corrections
     WHERE source = :source AND event_id = :id AND event_day = :day AND state <> 'refused'
""")

FIND_DELIVERIES = text("""
    SELECT id, state, events, sender, created_at FROM usage_deliveries
     WHERE total_id = :total AND opened_seal = :seal ORDER BY seal
""")

INSERT_CORRECTION = text("""
    INSERT INTO usage_corrections
           (source, id, event_id, event_day, action, value, delta, reason, method, state, why, delivery_id, invoice,
            requested_at, settled_at)
    VALUES (:source, :id, :event_id, :event_day, :action, :value, :delta, :reason, :method, :state, :why, :delivery,
            :invoice, :now, CASE WHEN :state = 'done' THEN CAST(:now AS timestamptz) END)
    RETURNING *
""")

CHANGE_CORRECTION = text("""
    UPDATE usage_corrections
       SET method = :method, state = :state, why = :why, invoice = :invoice,
           settled_at = CASE WHEN :state = 'done' THEN CAST(:now AS timestamptz) END
     WHERE source = :source AND id = :id
""")

# What is voided gets a number below 1, where no seal's number ever is: such events are not their total's any more.
VOIDED_NUMBER = """
    numbered AS (
        SELECT least(coalesce(min(opened_seal), 0), 0) - 1 AS seal FROM usage_deliveries WHERE total_id = :total
    ), moved AS (
        UPDATE usage_events e SET seal = n.seal FROM numbered n
         WHERE e.source = :source AND e.id = :id AND e.day = :day
    )
"""

WITHDRAW = text(f"""
    WITH {VOIDED_NUMBER}
    INSERT INTO usage_deliveries
           (total_id, opened_seal, seal, events, customer, event_name, identifier, payload, value, timestamp, state,
            reason, aggregation, settled_at)
    SELECT :total, n.seal, n.seal, 1, :customer, :meter, concat('never-sent-', CAST(:total AS bigint), n.seal), '{{}}',
           :value, floor(extract(epoch FROM CAST(:bucket_start AS timestamptz))), 'voided', 'correction',
           :aggregation, :now
      FROM numbered n
    RETURNING id
""")  # noqa: S608  a constant

VOID_DELIVERY = text(f"""
    WITH {VOIDED_NUMBER}
    UPDATE usage_deliveries d
       SET state = 'voided', reason = 'correction', lease_until = NULL, settled_at = :now, opened_seal = n.seal
      FROM numbered n WHERE d.id = :delivery
""")  # noqa: S608  a constant

# `was_sealed`: the event was in the sealed part.
TAKE_OUT = text("""
    WITH grouped AS (
        UPDATE usage_group_totals g SET quantity = g.quantity - :value, events = g.events - 1
          FROM jsonb_each_text(CAST(:properties AS jsonb)) p
         WHERE g.total_id = :total AND g.property = p.key AND g.value = p.value
    )
    UPDATE usage_totals t
       SET quantity = CASE WHEN t.aggregation IN ('sum', 'count') THEN t.quantity - :value ELSE t.quantity END,
           events = t.events - 1,
           sealed = t.sealed - CASE WHEN :was_sealed THEN :value ELSE 0 END,
           sealed_events = t.sealed_events - CASE WHEN :was_sealed THEN 1 ELSE 0 END
     WHERE t.id = :total
""")

# Whether Stripe may have been told a running value of the event's period.
WAS_TOLD = text("""
    SELECT EXISTS (SELECT FROM usage_deliveries
                    WHERE customer = :customer AND event_name = :meter AND state <> 'voided'
                      AND timestamp >= extract(epoch FROM CAST(:start AS timestamptz))
                      AND timestamp < extract(epoch FROM CAST(:end AS timestamptz)))
""")


@dataclass(frozen=True)
class Wanted:
    """What the product asked for. `value` is the new one of an event that is adjusted; `day` is that of the event."""

    source: str
    id: str
    event_id: str
    day: date | None
    action: Action
    value: Decimal | None
    reason: str


@dataclass(frozen=True)
class Way:
    """How a correction is made, and why not otherwise; the delivery to be cancelled; the final invoice, if any."""

    method: Method
    state: State
    why: Why | None = None
    delivery: int | None = None
    invoice: str | None = None


async def record_correction(connection: AsyncConnection, wanted: Wanted, rules: Rules, now: datetime) -> Any:
    """Write a correction with its effect, in the caller's transaction; its row, or that of its first copy.

    Raises `NotFound` when the ledger has no such event, and `Conflict` when it cannot be corrected (again).
    """
    await connection.execute(LOCK_ID, {"name": f"{wanted.source}{CONTROL_CHARACTER}{wanted.id}"})
    known = (await connection.execute(FIND_CORRECTION, {"source": wanted.source, "id": wanted.id})).one_or_none()
    if known is not None:
        if not _is_same(wanted, known):
            raise Conflict("This id was used for another correction; the first one counts.", type="conflict")
        return known
    event = await lock_event(connection, wanted.source, wanted.event_id, wanted.day)
    effective, corrected = await _find_effective_value(connection, event)
    if wanted.action == "adjust" and event.aggregation in ("count", "unique_count"):
        raise Conflict("Events of this meter have no value of their own; void it instead.", type="cannot-be-adjusted")
    if event.customer is None and event.aggregation != "sum":
        raise Conflict("The event's reference is not linked to a customer; link it first.", type="not-linked")
    delta = (wanted.value if wanted.value is not None else Decimal(0)) - effective
    if delta == 0 and wanted.action == "adjust":
        raise Conflict(f"The event's value is {plain(effective)} already.", type="nothing-to-correct")
    way = await choose_way(connection, event, rules, now, alone=wanted.action == "void" and not corrected)
    if way.state == "done" and way.method == "cancel":
        way = Way("cancel", "done", delivery=await _withdraw(connection, event, rules, now))
    row = {
        "source": wanted.source,
        "id": wanted.id,
        "event_id": event.id,
        "event_day": event.day,
        "action": wanted.action,
        "value": wanted.value,
        "delta": delta,
        "reason": wanted.reason,
        "now": now,
        **vars(way),
    }
    inserted = (await connection.execute(INSERT_CORRECTION, row)).one()
    await carry_out(connection, event, way, inserted, rules, now)
    return inserted


async def lock_event(connection: AsyncConnection, source: str, id: str, day: date | None) -> Any:
    """The event with its total, which stays locked: corrections of one event come one after the other.

    Raises `NotFound`, and `Conflict` when the id means several events.
    """
    selected = {"source": source, "id": id, "day": day}
    event = await _find_event(connection, selected)
    while True:
        await connection.execute(LOCK_TOTAL, {"total": event.total_id})
        # Read again: a seal or a cut may have moved it while its total was waited for.
        locked, event = event.total_id, await _find_event(connection, selected)
        if event.total_id == locked:
            return event


async def _find_event(connection: AsyncConnection, selected: dict[str, Any]) -> Any:
    found = (await connection.execute(FIND_EVENTS, selected)).all()
    if not found:
        raise NotFound(
            f"There is no event {selected['id']!a} of the source {selected['source']!a}. A key corrects the events of"
            " its own source, and for as long as single events are kept.",
            type="unknown-usage-event",
        )
    if len(found) > 1:
        raise Conflict("This id was used on several days; name the event's day (UTC), too.", type="several-events")
    return found[0]


async def _find_effective_value(connection: AsyncConnection, event: Any) -> tuple[Decimal, bool]:
    """What the event counts after its corrections so far, and whether there are any."""
    key = {"source": event.source, "id": event.id, "day": event.day}
    earlier = (await connection.execute(ADD_UP_EARLIER, key)).one()
    if earlier.open:
        raise Conflict("An earlier correction of this event is not decided yet.", type="correction-open")
    if earlier.voided:
        raise Conflict("The event was voided already.", type="already-voided")
    return event.value + earlier.delta, earlier.corrected


async def choose_way(connection: AsyncConnection, event: Any, rules: Rules, now: datetime, *, alone: bool) -> Way:
    """The best way that is still open. `alone`: the event is to be taken out as a whole, with nothing beside it."""
    invoice = await find_final_invoice(connection, event, rules)
    if invoice is not None:
        return Way("propose", "proposed", "invoice_final", invoice=invoice)
    if event.timestamp < now - MAX_AGE:
        return Way("propose", "proposed", "too_old")
    sealed = event.seal < event.open_seal
    deliveries = (
        (await connection.execute(FIND_DELIVERIES, {"total": event.total_id, "seal": event.seal})).all()
        if sealed
        else []
    )
    if any(delivery.state in ("parked", "voided") for delivery in deliveries):
        return Way("propose", "proposed", "not_sent")
    if (
        alone
        and event.aggregation in ADDITIVE
        and [delivery.events for delivery in deliveries] == [1]
        and deliveries[0].sender != "usage_records"
        and deliveries[0].created_at > now - CANCEL_WITHIN
    ):
        return Way("cancel", "pending", delivery=deliveries[0].id)
    if event.billed != event.customer:
        return Way("propose", "proposed", "moved")  # a second event would be the present customer's
    if event.aggregation == "sum":
        return Way("compensate", "done")
    # Nothing of the others can be negative; while nobody was told, the event is left out.
    if alone and not sealed and not await _was_told(connection, event):
        return Way("cancel", "done")
    return Way("propose", "proposed", "does_not_add_up")


async def find_final_invoice(connection: AsyncConnection, event: Any, rules: Rules) -> str | None:
    """The final invoice that covers the event's bucket, unless a draft covers it too."""
    meter = rules.meters.get(event.meter)
    asked = {
        "customer": event.billed,
        "event_name": event.meter,
        "price": meter.price if meter else None,
        "at": event.bucket_start,
    }
    invoice = (await connection.execute(FIND_INVOICE, asked)).one_or_none()
    return None if invoice is None or invoice.status == "draft" else str(invoice.invoice)


async def carry_out(
    connection: AsyncConnection, event: Any, way: Way, correction: Any, rules: Rules, now: datetime
) -> None:
    """The effect of a correction in the caller's transaction: the compensating event, or the notification."""
    if way.method == "compensate":
        compensation = UsageEvent(
            source=event.source,
            id=f"correction{CONTROL_CHARACTER}{correction.id}",
            customer_ref=event.customer_ref,
            meter=event.meter,
            value=correction.delta,
            timestamp=event.timestamp.astimezone(UTC),
            stamped=False,
            received_at=now,
            properties=tuple(sorted((event.properties or {}).items())),
        )
        recorded = await record_events(connection, [compensation], accepted_already=False, rules=rules.meters)
        assert recorded == ["recorded"], recorded
    if way.state == "proposed":
        await queue_notifications(
            connection,
            [
                Notification(
                    "usage.correction_proposed",
                    event.billed or event.customer_ref,
                    {
                        "correction": correction.id,
                        "source": event.source,
                        "event": event.id,
                        "meter": event.meter,
                        "timestamp": event.timestamp.astimezone(UTC).isoformat(),
                        "delta": plain(correction.delta),
                        "invoice": way.invoice,
                        "why": way.why,
                    },
                )
            ],
        )


async def _was_told(connection: AsyncConnection, event: Any) -> bool:
    if event.aggregation == "count":
        return False  # each of its events is told by itself, and this one was not
    if event.sealed_events or event.aggregation == "last":
        return bool(event.sealed_events)
    # A running value is that of the whole period, and tells of totals that are not sealed, too.
    await connection.execute(TAKE_TURN, {"lock": RUNNING_LOCK, "name": f"{event.customer} {event.meter}"})
    period = await find_period(connection, event.customer, event.meter, event.bucket_start)
    asked = {"customer": event.customer, "meter": event.meter, "start": period.start, "end": period.end}
    return bool(await connection.scalar(WAS_TOLD, asked))


async def _withdraw(connection: AsyncConnection, event: Any, rules: Rules, now: datetime) -> int:
    """Take an event that is not sealed out of its total: it becomes a delivery that was never sent."""
    delivery: int = await connection.scalar(
        WITHDRAW,
        {
            "total": event.total_id,
            "source": event.source,
            "id": event.id,
            "day": event.day,
            "customer": event.customer,
            "meter": event.meter,
            "value": event.value,
            "bucket_start": event.bucket_start,
            "aggregation": event.aggregation,
            "now": now,
        },
    )
    await _take_out(connection, event, was_sealed=False)
    if event.aggregation not in ADDITIVE:
        await compute_totals(connection, {event.total_id: event.meter}, rules.meters)
    return delivery


async def void_delivery(connection: AsyncConnection, event: Any, delivery: int, now: datetime) -> None:
    """The delivery that carried only this event counts nothing any more, and neither does the event in its total."""
    key = {"source": event.source, "id": event.id, "day": event.day}
    await connection.execute(VOID_DELIVERY, {**key, "total": event.total_id, "delivery": delivery, "now": now})
    await _take_out(connection, event, was_sealed=True)


async def _take_out(connection: AsyncConnection, event: Any, *, was_sealed: bool) -> None:
    properties = json.dumps(event.properties or {})
    await connection.execute(
        TAKE_OUT,
        {"total": event.total_id, "value": event.value, "properties": properties, "was_sealed": was_sealed},
    )


def _is_same(wanted: Wanted, known: Any) -> bool:
    return (wanted.event_id, wanted.action, wanted.value, wanted.reason) == (
        known.event_id,
        known.action,
        known.value,
        known.reason,
    ) and wanted.day in (None, known.event_day)
