"""The outbox: what is to be told, written in the transaction that brought it about.

Two ways in. `announce_changes` compares the state of customers with what was last announced of them and queues the
differences: access, the statuses of subscriptions, failed payments. A change is thus told once, whatever path it came
by (an event, a fetched object, a link, a repair), and not at all when a late event changed nothing.
`queue_notifications` takes what is no difference of states.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.rules import NotificationType

# Every notification says who it is about: the customer's id, the connected account if it is of one, and `refs`, the
# product's own names of it.
QUEUE = text("""
    INSERT INTO notifications (type, customer, data)
    SELECT r.type, r.customer,
           jsonb_build_object('customer', r.customer, 'account', nullif(n.account, ''),
                              'refs', coalesce(n.refs, '{}')) || r.data
      FROM ROWS FROM (json_to_recordset(CAST(:rows AS json)) AS (type text, customer text, data jsonb))
           WITH ORDINALITY AS r(type, customer, data, position)
      LEFT JOIN customer_names n ON n.customer = r.customer
     ORDER BY r.position
""")

# The parts of one statement all see the tables as they were before it, so `b` is what was announced until now. Causes
# are numbered before their effect on access. A payment that failed on an invoice that is paid by now is no news.
# (OFFSET 0: names are looked up customer by customer, whatever statistics say.)
ANNOUNCE = text("""
    WITH subscriptions_changed AS (
        UPDATE subscriptions s SET announced_status = status
         WHERE customer = ANY(:customers) AND status IS DISTINCT FROM announced_status
        RETURNING 1 AS position, 'subscription.changed' AS type, customer, id AS subject,
                  jsonb_build_object('subscription', id, 'status', status, 'previous_status',
                                     (SELECT b.announced_status FROM subscriptions b WHERE b.id = s.id)) AS data
    ), payments_failed AS (
        UPDATE invoices i SET announced_failure_at = payment_failed_at
         WHERE customer = ANY(:customers) AND payment_failed_at IS DISTINCT FROM announced_failure_at
           AND payment_failed_at IS NOT NULL AND status IN ('open', 'uncollectible')
        RETURNING 2 AS position, 'invoice.payment_failed' AS type, customer, CAST(NULL AS text) AS subject,
                  jsonb_build_object('invoice', id, 'subscription', subscription, 'status', status,
                                     'payment_failed_at', payment_failed_at,
                                     'next_payment_attempt', next_payment_attempt) AS data
    ), access_changed AS (
        UPDATE customer_access a
           SET announced_access = a.access, announced_reason = a.reason, announced_prices = a.prices,
               announced_until = a.until, announced_refs = n.refs
          FROM unnest(CAST(:customers AS text[])) AS k(customer)
         CROSS JOIN LATERAL (SELECT refs FROM customer_names WHERE customer = k.customer OFFSET 0) n
         WHERE a.customer = ANY(:customers) AND a.customer = k.customer
           AND (a.access, a.reason, a.prices, a.until, n.refs) IS DISTINCT FROM
               (a.announced_access, a.announced_reason, a.announced_prices, a.announced_until, a.announced_refs)
        RETURNING 3 AS position, 'access.changed' AS type, a.customer, a.customer AS subject,
                  (SELECT jsonb_build_object('access', a.access, 'reason', a.reason, 'since', a.since, 'until', a.until,
                                             'decided_by', a.decided_by, 'prices', a.prices,
                                             'previous_access', b.announced_access,
                                             'previous_reason', b.announced_reason)
                     FROM customer_access b WHERE b.customer = a.customer) AS data
    )
    INSERT INTO notifications (type, customer, subject, data)
    SELECT c.type, c.customer, c.subject,
           jsonb_build_object('customer', c.customer, 'account', nullif(n.account, ''), 'refs', n.refs) || c.data
      FROM (SELECT * FROM subscriptions_changed UNION ALL
            SELECT * FROM payments_failed UNION ALL
            SELECT * FROM access_changed) c
     CROSS JOIN LATERAL (SELECT account, refs FROM customer_names WHERE customer = c.customer OFFSET 0) n
     ORDER BY c.customer, c.position, c.subject
""")


@dataclass(frozen=True)
class Notification:
    """Something that happened to a customer. `data`: ids, statuses, reasons and times in RFC 3339, no amounts."""

    type: NotificationType
    customer: str
    data: Mapping[str, str | None]


async def queue_notifications(connection: AsyncConnection, notifications: Sequence[Notification]) -> None:
    """Write notifications in the caller's transaction; they are sent after its commit, or never if it fails."""
    if notifications:
        await connection.execute(QUEUE, {"rows": json.dumps([asdict(notification) for notification in notifications])})


async def announce_changes(connection: db.Connection, customers: Collection[str]) -> None:
    """Queue what is new about these customers, whose rows the caller has locked: that lock keeps their order."""
    if customers:
        await connection.execute(ANNOUNCE, {"customers": sorted(customers)})
