"""Reading what was billed: when each customer's usage of a meter was last compared with Stripe, and indexes."""

from alembic import op

revision = "0008"
down_revision = "0007"

TABLES = """
-- One row for each customer and meter whose deliveries were compared with Stripe's summaries. `leased_until`: a worker
-- is at it.
CREATE TABLE usage_checks (
    customer       text        NOT NULL,
    event_name     text        NOT NULL,
    checked_at     timestamptz,
    next_check_at  timestamptz NOT NULL DEFAULT '-infinity',
    leased_until   timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (customer, event_name)
);

-- From a total to its events: to prove one customer's slice without reading everybody's ledger. New totals have the
-- greatest numbers, so it grows at its end only.
CREATE INDEX usage_events_total ON usage_events (total_id);
-- Of the deliveries few have an outcome that is unknown or came too late, and of the invoices few are drafts.
CREATE INDEX usage_deliveries_unknown ON usage_deliveries (customer, event_name)
    WHERE state = 'parked' AND reason = 'outcome_unknown';
CREATE INDEX usage_deliveries_late ON usage_deliveries (id) WHERE carried_from IS NOT NULL OR taken_late;
CREATE INDEX invoices_draft ON invoices (subscription) WHERE status = 'draft';
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
