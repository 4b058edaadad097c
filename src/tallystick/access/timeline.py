"""The timeline: what changed for a customer, when, and by which event. Written in the transaction that changed it.

Statuses of subscriptions and invoices, failed payments, access, and what a reference means. An event that changed
nothing, because it was a repeat or late, leaves no line. Lines are never changed, and dropped when they are older than
`TALLYSTICK_TIMELINE_RETENTION_DAYS`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import text

from tallystick import db
from tallystick.mirror.apply import Applied
from tallystick.mirror.changes import AnyChange, InvoiceChange
from tallystick.resources import Resources

What = Literal["subscription", "invoice", "payment_failed", "access", "link"]
Cause = Literal["event", "refresh", "grace", "rules", "link"]

# The ids of a customer's lines rise with time, because whoever writes one holds the customer's lock.
WRITE_LINES = text("""
    INSERT INTO customer_timeline (customer, at, what, object_id, old, new, reason, cause, event)
    SELECT customer, :now, what, object_id, old, new, reason, cause, event
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(number integer, customer text, what text, object_id text, old text, new text, reason text, cause text,
             event text)
     ORDER BY number
""")

COLUMNS = """
    t.id, t.customer, t.at, t.what, t.object_id, t.old, t.new, t.reason, t.cause, t.event,
    e.type AS event_type, e.created AS event_created
"""

READ_LINES = text(f"""
    SELECT {COLUMNS} FROM customer_timeline t LEFT JOIN stripe_events e ON e.id = t.event
     WHERE t.customer = :customer AND t.id < :before
     ORDER BY t.id DESC LIMIT :limit
""")  # noqa: S608  a constant

READ_LINES_OF_EVENT = text(f"""
    SELECT {COLUMNS} FROM customer_timeline t LEFT JOIN stripe_events e ON e.id = t.event
     WHERE t.event = :event ORDER BY t.id
""")  # noqa: S608  a constant

DELETE_OLD_LINES = text("""
    DELETE FROM customer_timeline
     WHERE id = ANY(ARRAY(
        SELECT id FROM customer_timeline WHERE at < :oldest ORDER BY at LIMIT :limit FOR UPDATE SKIP LOCKED))
""")


@dataclass(frozen=True)
class Line:
    """One change. `object_id`: the subscription, the invoice, or the reference that was linked."""

    customer: str
    what: What
    cause: Cause
    object_id: str | None = None
    old: str | None = None
    new: str | None = None
    reason: str | None = None
    event: str | None = None


def lines_of(applied: Applied, changes: Iterable[AnyChange] = ()) -> list[Line]:
    """The lines that tell of statuses, and of the failed payments of which these changes told."""
    statuses = [
        Line(
            transition.customer,
            transition.kind,
            "event" if transition.event is not None else "refresh",
            object_id=transition.id,
            old=transition.old,
            new=transition.new,
            event=transition.event,
        )
        for transition in applied.transitions
    ]
    failures = [
        Line(change.customer, "payment_failed", "event", object_id=change.id, event=change.mark.event)
        for change in changes
        if isinstance(change, InvoiceChange)
        and change.payment_failed_at is not None
        and change.mark.event in applied.events
    ]
    return statuses + failures


async def write_timeline(connection: db.Connection, lines: Sequence[Line], now: datetime) -> None:
    """Write lines in the caller's transaction, which holds the customers' locks."""
    if lines:
        rows = [asdict(line) | {"number": number} for number, line in enumerate(lines)]
        await connection.execute(WRITE_LINES, {"rows": json.dumps(rows), "now": now})


async def forget_timeline(resources: Resources, now: datetime) -> int:
    """Drop the lines that are past the retention, some thousand a transaction; how many."""
    oldest = now - timedelta(days=resources.settings.timeline_retention_days)
    return await db.delete_old(resources.engine, DELETE_OLD_LINES, oldest)
