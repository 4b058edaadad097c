"""The customers' access: one row each, decided anew in the transaction that changed the mirror."""

import json
from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.access.policy import Decision, Invoice, Subscription, decide_access

FIND_SUBSCRIPTIONS = text("""
    SELECT c.id AS customer, c.deleted, a.access, a.reason, a.prices AS granted,
           s.id, s.status, s.pause_collection, s.latest_invoice,
           ARRAY(SELECT i.price FROM subscription_items i
                  WHERE i.subscription = s.id AND NOT i.deleted AND i.price IS NOT NULL) AS prices
      FROM customers c
      LEFT JOIN customer_access a ON a.customer = c.id
      LEFT JOIN subscriptions s ON s.customer = c.id AND NOT s.deleted
     WHERE c.id = ANY(:customers)
""")

# Only the invoices that can matter: a customer of many years has many that were simply paid.
FIND_INVOICES = text("""
    SELECT i.customer, i.id, i.subscription, i.status, i.created, i.payment_failed_at
      FROM invoices i
     WHERE i.customer = ANY(:customers) AND NOT i.deleted
       AND (i.payment_failed_at IS NOT NULL AND i.status IN ('open', 'uncollectible')
            OR EXISTS (SELECT FROM subscriptions s WHERE s.id = i.subscription AND s.latest_invoice = i.id))
""")

# `since` is when the access changed, which a new reason or another price does not make anew.
WRITE_ACCESS = text("""
    INSERT INTO customer_access AS t (customer, access, reason, since, decided_by, prices)
    SELECT customer, access, reason, :now, decided_by, prices
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(customer text, access text, reason text, decided_by text, prices text[])
     ORDER BY customer
    ON CONFLICT (customer) DO UPDATE SET
        access = excluded.access, reason = excluded.reason, prices = excluded.prices, updated_at = now(),
        decided_by = excluded.decided_by,
        since = CASE WHEN t.access = excluded.access THEN t.since ELSE excluded.since END
""")


async def recompute_access(
    connection: AsyncConnection, decided_by: Mapping[str, str | None], now: datetime
) -> set[str]:
    """Decide the access of customers from the mirror and write what changed; returns the customers that it changed for.

    `decided_by` maps each customer to the id of the event that may have changed it, or None where it was no event. The
    caller has locked the customers' rows: otherwise the last of two transactions that each see only their own half of
    the mirror would write an access that the whole does not justify.
    """
    if not decided_by:
        return set()
    customers = sorted(decided_by)
    known: dict[str, Decision | None] = {}
    deleted: set[str] = set()
    subscriptions: dict[str, list[Subscription]] = {customer: [] for customer in customers}
    for row in await connection.execute(FIND_SUBSCRIPTIONS, {"customers": customers}):
        known[row.customer] = Decision(row.access, row.reason, tuple(row.granted)) if row.access is not None else None
        if row.deleted:
            deleted.add(row.customer)
        if row.id is not None:
            subscriptions[row.customer].append(
                Subscription(row.id, row.status, row.pause_collection, row.latest_invoice, tuple(row.prices))
            )
    invoices: dict[str, list[Invoice]] = {customer: [] for customer in customers}
    for row in await connection.execute(FIND_INVOICES, {"customers": customers}):
        invoices[row.customer].append(Invoice(row.id, row.subscription, row.status, row.created, row.payment_failed_at))
    decisions = {
        customer: decide_access(subscriptions[customer], invoices[customer], customer_deleted=customer in deleted)
        for customer in customers
    }
    changed = [customer for customer in customers if decisions[customer] != known.get(customer)]
    if changed:
        rows = [
            {
                "customer": customer,
                "access": decisions[customer].access,
                "reason": decisions[customer].reason,
                "decided_by": decided_by[customer],
                "prices": decisions[customer].prices,
            }
            for customer in changed
        ]
        await connection.execute(WRITE_ACCESS, {"rows": json.dumps(rows), "now": now})
    return set(changed)
