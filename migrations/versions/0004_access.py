"""Access by rules: grace that ends by itself, which rules decided, the timeline, and what made an event stale."""

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = """
-- Stripe tries a failed payment again for weeks; grace runs from the first failure, merged by min.
ALTER TABLE invoices ADD COLUMN payment_failing_since timestamptz;
UPDATE invoices SET payment_failing_since = payment_failed_at WHERE payment_failed_at IS NOT NULL;

-- `until`: when grace ends, if nothing else changes. `decide_again_at`: when some part of the answer ends by itself.
-- `rules`: the fingerprint of the rules that decided.
ALTER TABLE customer_access
    ADD COLUMN until           timestamptz,
    ADD COLUMN decide_again_at timestamptz,
    ADD COLUMN rules           text NOT NULL DEFAULT '';
CREATE INDEX customer_access_decide_again ON customer_access (decide_again_at) WHERE decide_again_at IS NOT NULL;
CREATE INDEX customer_access_rules ON customer_access (rules, customer);

-- The event whose state of the object was newer already.
ALTER TABLE stripe_events ADD COLUMN superseded_by text;

-- What changed for a customer, and why. Written in the transaction that changed it, never updated, dropped by age.
CREATE TABLE customer_timeline (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer   text        NOT NULL,
    at         timestamptz NOT NULL,
    what       text        NOT NULL CHECK (what IN ('subscription', 'invoice', 'payment_failed', 'access', 'link')),
    object_id  text,       -- the subscription or invoice, or the reference of a link
    old        text,
    new        text,
    reason     text,       -- of the new access
    cause      text        NOT NULL CHECK (cause IN ('event', 'refresh', 'grace', 'rules', 'link')),
    event      text
);
CREATE INDEX customer_timeline_customer ON customer_timeline (customer, id);
CREATE INDEX customer_timeline_event ON customer_timeline (event) WHERE event IS NOT NULL;
CREATE INDEX customer_timeline_at ON customer_timeline (at);
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
