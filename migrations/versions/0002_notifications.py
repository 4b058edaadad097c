"""Notifications: what was announced of each row, what is to be told, and to which endpoints it got.

The announced state stands beside the state itself, so that a notification is the difference between the two: whatever
path changed a row, the change is told, and told once.
"""

from alembic import op

revision = "0002"
down_revision = "0001"

TABLES = """
ALTER TABLE subscriptions ADD COLUMN announced_status text;
ALTER TABLE invoices ADD COLUMN announced_failure_at timestamptz;
ALTER TABLE customer_access
    ADD COLUMN announced_access text,
    ADD COLUMN announced_reason text,
    ADD COLUMN announced_prices text[],
    ADD COLUMN announced_until  timestamptz,
    ADD COLUMN announced_refs   text[];

-- The product's own names of each customer, from the customer's side (see customer_references for the other side). A
-- deleted customer keeps its name until another one takes it.
CREATE VIEW customer_names AS
    SELECT c.id AS customer, c.account,
           ARRAY(SELECT l.ref FROM customer_links l WHERE l.customer = c.id
                 UNION
                 SELECT c.ref
                  WHERE c.ref IS NOT NULL AND NOT starts_with(c.ref, 'cus_')
                    AND NOT EXISTS (SELECT FROM customer_links l WHERE l.ref = c.ref)
                    AND NOT EXISTS (SELECT FROM customers o
                                     WHERE o.ref = c.ref AND o.id <> c.id AND NOT o.deleted
                                       AND (c.deleted OR (o.mark_created, o.id) > (c.mark_created, c.id)))
                 ORDER BY 1) AS refs
      FROM customers c;

-- What an upgraded database holds is old news.
UPDATE subscriptions SET announced_status = status;
UPDATE invoices SET announced_failure_at = payment_failed_at;
UPDATE customer_access a
   SET announced_access = access, announced_reason = reason, announced_prices = prices, announced_refs = n.refs
  FROM customer_names n WHERE n.customer = a.customer;

-- What is to be told, written in the transaction that brought it about. `data` holds ids, statuses and times.
CREATE TABLE notifications (
    id             text PRIMARY KEY DEFAULT 'msg_' || replace(gen_random_uuid()::text, '-', ''),
    number         bigint GENERATED ALWAYS AS IDENTITY UNIQUE,   -- the order in which a customer's are told
    type           text        NOT NULL,
    customer       text        NOT NULL,
    subject        text,       -- whose state it tells, until a later one does; none: a fact that lasts
    data           jsonb       NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT now(),
    fanned_out_at  timestamptz
);
CREATE INDEX notifications_new ON notifications (number) WHERE fanned_out_at IS NULL;
CREATE INDEX notifications_customer ON notifications (customer, number);
CREATE INDEX notifications_created ON notifications (created_at);

-- One notification on its way to one endpoint. Of one customer at one endpoint a single one is `pending` or `sending`;
-- the later ones are `queued` behind it.
CREATE TABLE notification_deliveries (
    notification     text        NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
    endpoint         text        NOT NULL,
    number           bigint      NOT NULL,
    customer         text        NOT NULL,
    state            text        NOT NULL DEFAULT 'queued'
                     CHECK (state IN ('queued', 'pending', 'sending', 'delivered', 'dead', 'superseded')),
    attempts         integer     NOT NULL DEFAULT 0,
    next_attempt_at  timestamptz,   -- while it is sending: the end of the lease
    outcome          text,          -- of the last try: a status code, or what failed
    settled_at       timestamptz,
    created_at       timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (notification, endpoint)
);
CREATE UNIQUE INDEX notification_deliveries_first ON notification_deliveries (endpoint, customer)
    WHERE state IN ('pending', 'sending');
CREATE INDEX notification_deliveries_due ON notification_deliveries (endpoint, next_attempt_at, number)
    WHERE state IN ('pending', 'sending');
CREATE INDEX notification_deliveries_queued ON notification_deliveries (endpoint, customer, number)
    WHERE state = 'queued';
CREATE INDEX notification_deliveries_dead ON notification_deliveries (number) WHERE state = 'dead';
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
