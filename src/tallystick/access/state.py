"""The customers' access: one row each, decided anew in the transaction that changed the mirror."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec
from sqlalchemy import text

from tallystick import db
from tallystick.access.policy import Decision, Invoice, Subscription, decide_access, fingerprint
from tallystick.access.timeline import Cause, Line, write_timeline
from tallystick.notifications.outbox import announce_changes
from tallystick.rules import AccessRules

# A row for each subscription, with its latest invoice. Of the customer's invoices otherwise (a customer of many years
# has many that were simply paid) only those on which something is owed: seldom any, and then as JSON. They are in the
# customer's first row only: hundreds of failing subscriptions would each repeat hundreds of invoices. (OFFSET 0: looked
# up customer by customer, whatever statistics say.)
FIND_STATES = text("""
    SELECT c.id AS customer, c.deleted,
           c.id = ANY(:named) AND (SELECT n.refs FROM customer_names n WHERE n.customer = c.id)
                                   IS DISTINCT FROM a.announced_refs AS renamed,
           a.access, a.reason, a.prices AS granted, a.until, a.decide_again_at, a.rules, a.decided_by,
           s.id, s.status, s.pause_collection, s.latest_invoice, i.prices, i.current_period_start,
           l.id AS invoice, l.status AS invoice_status, l.created, l.payment_failing_since, l.due_date, l.finalized_at,
           CASE WHEN row_number() OVER (PARTITION BY c.id ORDER BY s.id) = 1 THEN
           (SELECT CAST(json_agg(json_build_object(
                       'id', o.id, 'subscription', o.subscription, 'status', o.status, 'created', o.created,
                       'payment_failing_since', o.payment_failing_since, 'due_date', o.due_date,
                       'finalized_at', o.finalized_at)) AS text)
              FROM invoices o
             WHERE o.customer = c.id AND NOT o.deleted
               AND (o.payment_failing_since IS NOT NULL AND o.status IN ('open', 'uncollectible')
                    OR o.status = 'open' AND o.due_date <= :now)) END AS owing
      FROM customers c
      LEFT JOIN LATERAL (SELECT * FROM customer_access a WHERE a.customer = c.id OFFSET 0) a ON true
      LEFT JOIN LATERAL (SELECT * FROM subscriptions s WHERE s.customer = c.id AND NOT s.deleted OFFSET 0) s ON true
      LEFT JOIN LATERAL (
          SELECT array_agg(i.price) FILTER (WHERE i.price IS NOT NULL) AS prices,
                 max(i.current_period_start) AS current_period_start
            FROM subscription_items i WHERE i.subscription = s.id AND NOT i.deleted) i ON true
      LEFT JOIN LATERAL (SELECT * FROM invoices l WHERE l.id = s.latest_invoice OFFSET 0) l
             ON l.subscription = s.id AND l.customer = c.id AND NOT l.deleted
     WHERE c.id = ANY(:customers)
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

read_invoices = msgspec.json.Decoder(list[Invoice]).decode


@dataclass(frozen=True)
class _Known:
    """A customer's row as it was before: the decision, the rules that made it, and the event."""

    decision: Decision
    rules: str
    decided_by: str | None


async def recompute_access(
    connection: db.Connection,
    decided_by: Mapping[str, str | None],
    rules: AccessRules,
    now: datetime,
    *,
    cause: Cause = "refresh",
    other_lines: Sequence[Line] = (),
    named: Collection[str] | None = None,
) -> set[str]:
    """Decide the access of customers from the mirror and write what changed; returns the customers that it changed for.

    `decided_by` maps each customer to the id of the event that may have changed it, or None where it was no event but
    `cause`. When it is only that grace has run out, the event that began it goes on being the one that decided. The
    caller has locked the customers' rows: otherwise the last of two transactions that each see only their own half of
    the mirror would write an access that the whole does not justify. `other_lines` go into the timeline before those
    about access.

    What is new is announced, too. To look for it costs more than all else here, so a caller who knows whose names may
    have changed says so by `named`, be it nobody: then it is looked for only where a name has changed, or where there
    is a line or a new decision. Without `named` (None) it is looked for with all of these customers.
    """
    if not decided_by:
        return set()
    customers = sorted(decided_by)
    known, decisions, renamed = await _decide(connection, customers, () if named is None else named, rules, now)
    current = fingerprint(rules)
    rows: dict[str, dict[str, object]] = {}
    changed = set()
    lines = list(other_lines)
    for customer in customers:
        before, decision = known.get(customer), decisions[customer]
        if before is not None and (before.decision, before.rules) == (decision, current):
            continue
        event = decided_by[customer]
        if event is None and cause == "grace" and before is not None:
            event = before.decided_by
        rows[customer] = _row(customer, decision, event)
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
        await connection.execute(WRITE_ACCESS, {"rows": json.dumps(list(rows.values())), "rules": current, "now": now})
    await write_timeline(connection, lines, now)
    if named is None:
        await announce_changes(connection, customers)
    else:
        await announce_changes(connection, renamed | {line.customer for line in lines} | rows.keys())
    return changed


async def _decide(
    connection: db.Connection, customers: list[str], named: Collection[str], rules: AccessRules, now: datetime
) -> tuple[dict[str, _Known], dict[str, Decision], set[str]]:
    """What was known of the customers, what is decided now, and who of `named` has another name than was announced."""
    known: dict[str, _Known] = {}
    deleted: set[str] = set()
    renamed: set[str] = set()
    subscriptions: dict[str, list[Subscription]] = {customer: [] for customer in customers}
    invoices: dict[str, list[Invoice]] = {customer: [] for customer in customers}
    parameters = {"customers": customers, "named": list(named), "now": now}
    for row in await connection.execute(FIND_STATES, parameters):
        customer = row.customer
        if row.access is not None:
            before = Decision(row.access, row.reason, tuple(row.granted), row.until, row.decide_again_at)
            known[customer] = _Known(before, row.rules, row.decided_by)
        if row.deleted:
            deleted.add(customer)
        if row.renamed:
            renamed.add(customer)
        if row.id is not None:
            subscriptions[customer].append(
                Subscription(
                    row.id,
                    row.status,
                    row.pause_collection,
                    row.latest_invoice,
                    tuple(row.prices or ()),
                    row.current_period_start,
                )
            )
        if row.invoice is not None:
            invoices[customer].append(
                Invoice(
                    row.invoice,
                    row.id,
                    row.invoice_status,
                    row.created,
                    row.payment_failing_since,
                    row.due_date,
                    row.finalized_at,
                )
            )
        if row.owing is not None:
            # The first row of each customer has all its owed invoices, the latest of its subscriptions among them: once
            # or twice, they count the same.
            invoices[customer] += read_invoices(row.owing)
    decisions = {
        customer: decide_access(
            subscriptions[customer], invoices[customer], rules, now, customer_deleted=customer in deleted
        )
        for customer in customers
    }
    return known, decisions, renamed


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
