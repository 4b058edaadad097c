"""The customers' access: one row each, decided anew in the transaction that changed the mirror."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.access.policy import Decision, Invoice, Subscription, decide_access, fingerprint
from tallystick.access.timeline import Cause, Line, write_timeline
from tallystick.notifications.outbox import announce_changes
from tallystick.rules import AccessRules

FIND_SUBSCRIPTIONS = text("""
    SELECT c.id AS customer, c.deleted,
           a.access, a.reason, a.prices AS granted, a.until, a.decide_again_at, a.rules, a.decided_by,
           s.id, s.status, s.pause_collection, s.latest_invoice, i.prices, i.current_period_start
      FROM customers c
      LEFT JOIN customer_access a ON a.customer = c.id
      LEFT JOIN subscriptions s ON s.customer = c.id AND NOT s.deleted
      LEFT JOIN LATERAL (
          SELECT array_agg(i.price) FILTER (WHERE i.price IS NOT NULL) AS prices,
                 max(i.current_period_start) AS current_period_start
            FROM subscription_items i WHERE i.subscription = s.id AND NOT i.deleted) i ON true
     WHERE c.id = ANY(:customers)
""")

# Only the invoices that can matter: a customer of many years has many that were simply paid.
FIND_INVOICES = text("""
    SELECT i.customer, i.id, i.subscription, i.status, i.created, i.payment_failing_since, i.due_date, i.finalized_at
      FROM invoices i
     WHERE i.customer = ANY(:customers) AND NOT i.deleted
       AND (i.payment_failing_since IS NOT NULL AND i.status IN ('open', 'uncollectible')
            OR i.status = 'open' AND i.due_date <= :now
            OR EXISTS (SELECT FROM subscriptions s WHERE s.id = i.subscription AND s.latest_invoice = i.id))
""")

# `since` is when the access changed, which a new reason or another price does not make anew. Nor is an event the cause
# of an answer that it did not change.
WRITE_ACCESS = text("""
    INSERT INTO customer_access AS t
           (customer, access, reason, since, decided_by, prices, until, decide_again_at, rules)
    SELECT customer, access, reason, :now, decided_by, prices, until, decide_again_at, :rules
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(customer text, access text, reason text, decided_by text, prices text[], until timestamptz,
             decide_again_at timestamptz)
     ORDER BY customer
    ON CONFLICT (customer) DO UPDATE SET
        access = excluded.access, reason = excluded.reason, prices = excluded.prices, until = excluded.until,
        decide_again_at = excluded.decide_again_at, rules = excluded.rules, updated_at = now(),
        decided_by = CASE WHEN (t.access, t.reason, t.prices, t.until)
                               IS DISTINCT FROM (excluded.access, excluded.reason, excluded.prices, excluded.until)
                          THEN excluded.decided_by ELSE t.decided_by END,
        since = CASE WHEN t.access = excluded.access THEN t.since ELSE excluded.since END
""")


@dataclass(frozen=True)
class _Known:
    """A customer's row as it was before: the decision, the rules that made it, and the event."""

    decision: Decision
    rules: str
    decided_by: str | None


async def recompute_access(
    connection: AsyncConnection,
    decided_by: Mapping[str, str | None],
    rules: AccessRules,
    now: datetime,
    *,
    cause: Cause = "refresh",
    other_lines: Sequence[Line] = (),
) -> set[str]:
    """Decide the access of customers from the mirror and write what changed; returns the customers that it changed for.

    `decided_by` maps each customer to the id of the event that may have changed it, or None where it was no event but
    `cause`. When it is only that grace has run out, the event that began it goes on being the one that decided. The
    caller has locked the customers' rows: otherwise the last of two transactions that each see only their own half of
    the mirror would write an access that the whole does not justify. `other_lines` go into the timeline before those
    about access.
    """
    if not decided_by:
        return set()
    customers = sorted(decided_by)
    known, decisions = await _decide(connection, customers, rules, now)
    current = fingerprint(rules)
    rows, changed = [], set()
    lines = list(other_lines)
    for customer in customers:
        before, decision = known.get(customer), decisions[customer]
        if before is not None and (before.decision, before.rules) == (decision, current):
            continue
        event = decided_by[customer]
        if event is None and cause == "grace" and before is not None:
            event = before.decided_by
        rows.append(_row(customer, decision, event))
        if before is None or _answer(before.decision) != _answer(decision):
            changed.add(customer)
        old = before.decision if before is not None else None
        if old is None or (old.access, old.reason) != (decision.access, decision.reason):
            lines.append(
                Line(
                    customer,
                    "access",
                    "event" if decided_by[customer] is not None else cause,
                    old=old.access if old is not None else None,
                    new=decision.access,
                    reason=decision.reason,
                    event=event,
                )
            )
    if rows:
        await connection.execute(WRITE_ACCESS, {"rows": json.dumps(rows), "rules": current, "now": now})
    await write_timeline(connection, lines, now)
    await announce_changes(connection, customers)
    return changed


async def _decide(
    connection: AsyncConnection, customers: list[str], rules: AccessRules, now: datetime
) -> tuple[dict[str, _Known], dict[str, Decision]]:
    known: dict[str, _Known] = {}
    deleted: set[str] = set()
    subscriptions: dict[str, list[Subscription]] = {customer: [] for customer in customers}
    for row in await connection.execute(FIND_SUBSCRIPTIONS, {"customers": customers}):
        if row.access is not None:
            before = Decision(row.access, row.reason, tuple(row.granted), row.until, row.decide_again_at)
            known[row.customer] = _Known(before, row.rules, row.decided_by)
        if row.deleted:
            deleted.add(row.customer)
        if row.id is not None:
            subscriptions[row.customer].append(
                Subscription(
                    row.id,
                    row.status,
                    row.pause_collection,
                    row.latest_invoice,
                    tuple(row.prices or ()),
                    row.current_period_start,
                )
            )
    invoices: dict[str, list[Invoice]] = {customer: [] for customer in customers}
    for row in await connection.execute(FIND_INVOICES, {"customers": customers, "now": now}):
        invoices[row.customer].append(
            Invoice(
                row.id,
                row.subscription,
                row.status,
                row.created,
                row.payment_failing_since,
                row.due_date,
                row.finalized_at,
            )
        )
    return known, {
        customer: decide_access(
            subscriptions[customer], invoices[customer], rules, now, customer_deleted=customer in deleted
        )
        for customer in customers
    }


def _answer(decision: Decision) -> tuple[object, ...]:
    return decision.access, decision.reason, decision.prices, decision.until


def _row(customer: str, decision: Decision, event: str | None) -> dict[str, object]:
    return {
        "customer": customer,
        "access": decision.access,
        "reason": decision.reason,
        "decided_by": event,
        "prices": decision.prices,
        "until": decision.until.isoformat() if decision.until is not None else None,
        "decide_again_at": decision.decide_again_at.isoformat() if decision.decide_again_at is not None else None,
    }
