"""Delivery: what waits by sender and customer, invoices whose late usage was looked for, and a quicker view."""

from alembic import op

revision = "0010"
down_revision = "0009"

TABLES = """
-- From one customer and meter with something to be sent to the next one, however much each has waiting.
CREATE INDEX usage_deliveries_queue ON usage_deliveries (sender, customer, event_name, next_attempt_at, id)
    WHERE state = 'pending';

-- Since when it is known which of its usage Stripe took too late for it.
ALTER TABLE invoices ADD COLUMN usage_checked_at timestamptz;
-- Most usage is younger than the customer's last final invoice, and that is to be seen without reading any.
CREATE INDEX invoices_final ON invoices (customer, period_end) WHERE status <> 'draft';
CREATE INDEX invoices_usage_unchecked ON invoices (finalized_at)
    WHERE finalized_at IS NOT NULL AND usage_checked_at IS NULL;

-- As before, but the items are looked up invoice by invoice: a UNION that is not lateral would be built of all
-- subscriptions each time.
CREATE OR REPLACE VIEW metered_invoices AS
    SELECT i.customer, m.event_name, m.id AS meter, u.price, u.item, i.subscription, i.id AS invoice, i.status,
           i.period_start, i.period_end, i.created, i.finalized_at
      FROM invoices i
      JOIN subscriptions s ON s.id = i.subscription
      JOIN LATERAL (SELECT id AS item, price FROM subscription_items WHERE subscription = i.subscription
                    UNION SELECT item, price FROM billing_periods WHERE subscription = i.subscription) u ON true
      JOIN prices r ON r.id = u.price
      LEFT JOIN meters m ON m.id = r.meter
     WHERE NOT i.deleted AND i.account = '' AND i.period_start < i.period_end
       AND (i.billing_reason = 'subscription_cycle' OR s.ended_at <= i.period_end);
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
