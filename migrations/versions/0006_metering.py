"""Metering to the invoice's line: formulas, properties, every try, reconciliation, corrections, thresholds.

Also the billing periods of each metered subscription item, and two views that say which period and which invoice a
customer's usage of a meter belongs to.
"""

from alembic import op

revision = "0006"
down_revision = "0005"

TABLES = """
-- The periods of a subscription item as Stripe has told of them, under the price that it had then. Never deleted.
CREATE TABLE billing_periods (
    item          text        NOT NULL,
    price         text        NOT NULL,
    period_start  timestamptz NOT NULL,
    period_end    timestamptz NOT NULL,
    subscription  text        NOT NULL,
    customer      text        NOT NULL,
    PRIMARY KEY (item, price, period_start)
);
CREATE INDEX billing_periods_customer ON billing_periods (customer, period_start);
CREATE INDEX billing_periods_subscription ON billing_periods (subscription);
INSERT INTO billing_periods (item, price, period_start, period_end, subscription, customer)
SELECT i.id, i.price, i.current_period_start, i.current_period_end, s.id, s.customer
  FROM subscription_items i JOIN subscriptions s ON s.id = i.subscription
 WHERE i.price IS NOT NULL AND i.current_period_start < i.current_period_end;

-- A period ends where it was said to end, where the item's next one begins, or with the subscription.
CREATE VIEW metered_periods AS
    SELECT p.customer, m.event_name, m.id AS meter, p.price, p.item, p.subscription, p.period_start,
           least(p.period_end, s.ended_at,
                 (SELECT min(n.period_start) FROM billing_periods n
                   WHERE n.item = p.item AND n.period_start > p.period_start)) AS period_end
      FROM billing_periods p
      JOIN subscriptions s ON s.id = p.subscription AND s.account = ''
      JOIN prices r ON r.id = p.price
      LEFT JOIN meters m ON m.id = r.meter;

-- The invoices that bill metered usage of their own period: those at a period's end, and those of an ended
-- subscription. An invoice in mid-period (a proration, an amount that was reached) closes nothing.
CREATE VIEW metered_invoices AS
    SELECT i.customer, m.event_name, m.id AS meter, u.price, u.item, i.subscription, i.id AS invoice, i.status,
           i.period_start, i.period_end, i.created, i.finalized_at
      FROM invoices i
      JOIN subscriptions s ON s.id = i.subscription
      JOIN (SELECT subscription, id AS item, price FROM subscription_items
            UNION SELECT subscription, item, price FROM billing_periods) u ON u.subscription = i.subscription
      JOIN prices r ON r.id = u.price
      LEFT JOIN meters m ON m.id = r.meter
     WHERE NOT i.deleted AND i.account = '' AND i.period_start < i.period_end
       AND (i.billing_reason = 'subscription_cycle' OR s.ended_at <= i.period_end);
CREATE INDEX invoices_subscription ON invoices (subscription) WHERE subscription IS NOT NULL;

-- Only properties that the meter declares are kept.
ALTER TABLE usage_events ADD COLUMN properties jsonb;

-- `aggregation` is that of the meter when the total was opened. `sum` and `count` add up; of the others `quantity` is
-- the bucket's own value. `last_*` order the values of a `last` total.
ALTER TABLE usage_totals
    ADD COLUMN aggregation    text   NOT NULL DEFAULT 'sum'
                              CHECK (aggregation IN ('sum', 'count', 'last', 'max', 'unique_count')),
    ADD COLUMN sealed_events  bigint NOT NULL DEFAULT 0,
    ADD COLUMN last_at        timestamptz,
    ADD COLUMN last_key       text;
UPDATE usage_totals SET sealed_events = events WHERE quantity = sealed;
DROP INDEX usage_totals_unsealed;
CREATE INDEX usage_totals_unsealed ON usage_totals (bucket_end) WHERE events <> sealed_events;

-- A total's parts by each value of a declared property. Written with the total.
CREATE TABLE usage_group_totals (
    total_id  bigint  NOT NULL REFERENCES usage_totals (id) ON DELETE CASCADE,
    property  text    NOT NULL,
    value     text    NOT NULL,
    quantity  numeric NOT NULL DEFAULT 0,
    events    bigint  NOT NULL DEFAULT 0,
    PRIMARY KEY (total_id, property, value)
);

-- What a `unique_count` total has seen: 16 bytes of a hash of each value.
CREATE TABLE usage_uniques (
    total_id  bigint NOT NULL REFERENCES usage_totals (id) ON DELETE CASCADE,
    digest    bytea  NOT NULL,
    PRIMARY KEY (total_id, digest)
);

-- `opened_seal`: the seal under which the events that a delivery carries are recorded; a seal may need several
-- deliveries, of which the first counts the events. `carried_from`: the bucket of usage that came too late for its
-- invoice and was moved into the open period. `taken_late`: Stripe took it after the invoice was final.
ALTER TABLE usage_deliveries
    ADD COLUMN opened_seal   integer,
    ADD COLUMN events        bigint      NOT NULL DEFAULT 0,
    ADD COLUMN aggregation   text        NOT NULL DEFAULT 'sum',
    ADD COLUMN sender        text        NOT NULL DEFAULT 'meter_events'
                             CHECK (sender IN ('meter_events', 'meter_event_stream', 'usage_records')),
    ADD COLUMN carried_from  timestamptz,
    ADD COLUMN taken_late    boolean     NOT NULL DEFAULT false,
    ADD COLUMN confirmed_at  timestamptz;
UPDATE usage_deliveries SET opened_seal = seal;
UPDATE usage_deliveries d SET events = e.events
  FROM (SELECT total_id, seal, count(*) AS events FROM usage_events GROUP BY total_id, seal) e
 WHERE e.total_id = d.total_id AND e.seal = d.seal;
ALTER TABLE usage_deliveries ALTER COLUMN opened_seal SET NOT NULL;
CREATE INDEX usage_deliveries_sent ON usage_deliveries (customer, event_name, settled_at) WHERE state = 'sent';
CREATE INDEX usage_deliveries_customer ON usage_deliveries (customer, event_name, timestamp);

-- Every try of a delivery and its answer, written when it is settled.
CREATE TABLE usage_delivery_attempts (
    delivery_id      bigint      NOT NULL REFERENCES usage_deliveries (id) ON DELETE CASCADE,
    attempt          integer     NOT NULL,
    at               timestamptz NOT NULL,
    outcome          text        NOT NULL CHECK (outcome IN ('sent', 'retry', 'parked')),
    reason           text,
    http_status      integer,
    request_id       text,
    PRIMARY KEY (delivery_id, attempt)
);

-- Stripe's thin events about meter events that it could not bill: to be fetched, then settled on the deliveries named.
CREATE TABLE meter_error_reports (
    event            text PRIMARY KEY,
    type             text        NOT NULL,
    received_at      timestamptz NOT NULL,
    next_attempt_at  timestamptz NOT NULL,
    failures         integer     NOT NULL DEFAULT 0,
    meter            text,
    errors           bigint,     -- how many Stripe counted; its samples may be fewer
    found            bigint,     -- how many deliveries the samples named
    fetched_at       timestamptz
);
CREATE INDEX meter_error_reports_due ON meter_error_reports (next_attempt_at) WHERE fetched_at IS NULL;

-- Hours in which Stripe's summary says something else than what was sent. `resolved_at`: it agrees again.
CREATE TABLE usage_drifts (
    customer       text        NOT NULL,
    event_name     text        NOT NULL,
    hour           timestamptz NOT NULL,
    ours           numeric     NOT NULL,
    stripes        numeric     NOT NULL,
    first_seen_at  timestamptz NOT NULL,
    checked_at     timestamptz NOT NULL,
    resolved_at    timestamptz,
    PRIMARY KEY (customer, event_name, hour)
);
CREATE INDEX usage_drifts_open ON usage_drifts (first_seen_at) WHERE resolved_at IS NULL;

-- What the product took back or changed afterwards, and what became of it.
CREATE TABLE usage_corrections (
    source        text        NOT NULL,
    id            text        NOT NULL,   -- the caller's, so that a repeat is recognised
    event_id      text        NOT NULL,
    event_day     date        NOT NULL,
    action        text        NOT NULL CHECK (action IN ('void', 'adjust')),
    value         numeric,                -- the new value of an adjusted event
    delta         numeric     NOT NULL,   -- what it changes
    reason        text        NOT NULL,
    method        text        NOT NULL CHECK (method IN ('compensate', 'cancel', 'propose')),
    state         text        NOT NULL CHECK (state IN ('pending', 'done', 'proposed', 'settled', 'refused')),
    delivery_id   bigint      REFERENCES usage_deliveries (id),   -- the one to be cancelled
    invoice       text,                   -- the final invoice that a proposal is about
    requested_at  timestamptz NOT NULL,
    settled_at    timestamptz,
    note          text,
    PRIMARY KEY (source, id)
);
CREATE INDEX usage_corrections_event ON usage_corrections (source, event_id);
CREATE INDEX usage_corrections_open ON usage_corrections (requested_at) WHERE state IN ('pending', 'proposed');

-- Thresholds that were announced: once each a period.
CREATE TABLE usage_thresholds (
    customer      text        NOT NULL,
    meter         text        NOT NULL,
    period_start  timestamptz NOT NULL,
    threshold     numeric     NOT NULL,
    quantity      numeric     NOT NULL,
    reached_at    timestamptz NOT NULL,
    PRIMARY KEY (customer, meter, period_start, threshold)
);
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
