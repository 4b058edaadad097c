"""The first schema: event ledger, mirror, access, keys, meters, usage ledger, totals and deliveries.

Plain SQL, because what matters here (partitions, partial indexes, row comparison) is SQL's own.
"""

from alembic import op

revision = "0001"
down_revision = None

# The mark of a mirrored row: which event wrote it. Rows are compared as (deleted, mark_created, mark_rank, mark_event);
# the greatest wins in whatever order events arrive, so every order ends in the same row.
MIRRORED = """
    account        text        NOT NULL DEFAULT '',
    deleted        boolean     NOT NULL DEFAULT false,
    mark_created   timestamptz NOT NULL DEFAULT '-infinity',
    mark_rank      smallint    NOT NULL DEFAULT 0,
    mark_event     text        NOT NULL DEFAULT '',
    needs_refresh  boolean     NOT NULL DEFAULT false,
    refresh_after  timestamptz NOT NULL DEFAULT '-infinity',   -- a fetch is under way, or has failed, until then
    updated_at     timestamptz NOT NULL DEFAULT now()
"""

TABLES = f"""
-- One row: what tells this database's deliveries from those of another one, or of an earlier one, on the same account.
CREATE TABLE installation (
    only_row  boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    id        text NOT NULL
);
INSERT INTO installation (id) VALUES (substr(replace(gen_random_uuid()::text, '-', ''), 1, 12));

-- Stripe's events: the id and what became of it. No payload is kept.
CREATE TABLE stripe_events (
    id           text PRIMARY KEY,
    type         text        NOT NULL,
    account      text        NOT NULL DEFAULT '',
    livemode     boolean     NOT NULL,
    api_version  text,
    object_id    text,
    created      timestamptz NOT NULL,
    received_at  timestamptz NOT NULL DEFAULT now(),
    verdict      text        NOT NULL CHECK (verdict IN ('applied', 'stale', 'ignored', 'quarantined')),
    error        text
);
CREATE INDEX stripe_events_received ON stripe_events (received_at);
CREATE INDEX stripe_events_quarantined ON stripe_events (received_at) WHERE verdict = 'quarantined';

-- Events that our own handling failed on, counted until they are handled or quarantined.
CREATE TABLE stripe_event_failures (
    id         text PRIMARY KEY,
    type       text        NOT NULL,
    failures   integer     NOT NULL,
    error      text        NOT NULL,
    first_at   timestamptz NOT NULL DEFAULT now(),
    last_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE customers (
    id             text PRIMARY KEY,
    ref            text,
    delinquent     boolean,
    default_payment_method text,
    {MIRRORED}
);
CREATE INDEX customers_needs_refresh ON customers (refresh_after) WHERE needs_refresh;
CREATE INDEX customers_ref ON customers (ref) WHERE ref IS NOT NULL;

CREATE TABLE products (
    id       text PRIMARY KEY,
    active   boolean NOT NULL DEFAULT true,
    {MIRRORED}
);
CREATE INDEX products_needs_refresh ON products (refresh_after) WHERE needs_refresh;

CREATE TABLE prices (
    id          text PRIMARY KEY,
    product     text,
    active      boolean NOT NULL DEFAULT true,
    type        text,
    usage_type  text,
    meter       text,
    lookup_key  text,
    {MIRRORED}
);
CREATE INDEX prices_needs_refresh ON prices (refresh_after) WHERE needs_refresh;

CREATE TABLE subscriptions (
    id                    text PRIMARY KEY,
    customer              text        NOT NULL,
    status                text        NOT NULL,
    cancel_at_period_end  boolean     NOT NULL DEFAULT false,
    cancel_at             timestamptz,
    canceled_at           timestamptz,
    ended_at              timestamptz,
    start_date            timestamptz,
    trial_end             timestamptz,
    pause_collection      text,
    collection_method     text,
    latest_invoice        text,
    {MIRRORED}
);
CREATE INDEX subscriptions_needs_refresh ON subscriptions (refresh_after) WHERE needs_refresh;
CREATE INDEX subscriptions_customer ON subscriptions (customer);

-- Children of a subscription: written only together with it, so its mark guards them.
CREATE TABLE subscription_items (
    id                    text PRIMARY KEY,
    subscription          text        NOT NULL,
    price                 text,
    current_period_start  timestamptz,
    current_period_end    timestamptz,
    deleted               boolean     NOT NULL DEFAULT false,
    updated_at            timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX subscription_items_subscription ON subscription_items (subscription);

CREATE TABLE invoices (
    id                    text PRIMARY KEY,
    customer              text        NOT NULL,
    subscription          text,
    status                text,
    billing_reason        text,
    collection_method     text,
    attempted             boolean     NOT NULL DEFAULT false,
    period_start          timestamptz,
    period_end            timestamptz,
    created               timestamptz,
    finalized_at          timestamptz,
    next_payment_attempt  timestamptz,
    due_date              timestamptz,
    payment_failed_at     timestamptz,   -- the latest invoice.payment_failed; merged by max, whatever the mark says
    {MIRRORED}
);
CREATE INDEX invoices_needs_refresh ON invoices (refresh_after) WHERE needs_refresh;
CREATE INDEX invoices_customer ON invoices (customer);

-- Every instant at which a billing period of a customer begins or ends. Usage buckets are cut here.
CREATE TABLE period_boundaries (
    customer  text        NOT NULL,
    at        timestamptz NOT NULL,
    PRIMARY KEY (customer, at)
);

-- References that the product linked itself; they win over what a customer's metadata says.
CREATE TABLE customer_links (
    ref        text PRIMARY KEY CHECK (NOT starts_with(ref, 'cus_')),
    customer   text        NOT NULL,
    linked_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX customer_links_customer ON customer_links (customer);

-- Every name that a customer goes by: linked by the product, learnt from metadata (the newest customer has it), its
-- own id. One name never means two customers: names in the form of Stripe's ids mean themselves only.
CREATE VIEW customer_references AS
    SELECT ref, customer FROM customer_links
    UNION ALL
    SELECT ref, customer FROM (
        SELECT DISTINCT ON (ref) ref, id AS customer FROM customers
        WHERE ref IS NOT NULL AND NOT deleted AND NOT starts_with(ref, 'cus_')
        ORDER BY ref, mark_created DESC, id DESC
    ) learnt
    WHERE NOT EXISTS (SELECT FROM customer_links l WHERE l.ref = learnt.ref)
    UNION ALL
    SELECT id, id FROM customers;

CREATE TABLE customer_access (
    customer     text PRIMARY KEY,
    access       text        NOT NULL CHECK (access IN ('active', 'grace', 'restricted', 'none')),
    reason       text        NOT NULL,
    since        timestamptz NOT NULL,
    decided_by   text,
    prices       text[]      NOT NULL DEFAULT '{{}}',
    updated_at   timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_keys (
    id            text PRIMARY KEY,
    name          text        NOT NULL,
    source        text        NOT NULL,
    secret_sha256 bytea       NOT NULL,
    scopes        text[]      NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    last_used_at  timestamptz,
    expires_at    timestamptz,
    revoked_at    timestamptz
);

-- Stripe's meters, as last listed.
CREATE TABLE meters (
    id                 text PRIMARY KEY,
    event_name         text        NOT NULL,
    formula            text        NOT NULL,
    customer_key       text        NOT NULL,
    value_key          text        NOT NULL,
    event_time_window  text,
    status             text        NOT NULL,
    refreshed_at       timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX meters_event_name ON meters (event_name);

-- The running sum of a customer's usage of one meter in one bucket. `seal` numbers the part that is still open.
CREATE TABLE usage_totals (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer_ref  text        NOT NULL,
    meter         text        NOT NULL,
    bucket_start  timestamptz NOT NULL,
    bucket_end    timestamptz NOT NULL,
    quantity      numeric     NOT NULL DEFAULT 0,
    events        bigint      NOT NULL DEFAULT 0,
    sealed        numeric     NOT NULL DEFAULT 0,
    seal          integer     NOT NULL DEFAULT 1,
    sealed_at     timestamptz,
    opened_at     timestamptz NOT NULL DEFAULT now(),
    UNIQUE (customer_ref, meter, bucket_start)
);
CREATE INDEX usage_totals_unsealed ON usage_totals (bucket_end) WHERE quantity <> sealed;
CREATE INDEX usage_totals_bucket ON usage_totals (customer_ref, bucket_start);

-- The ledger of accepted usage events, one partition a day of their timestamps.
CREATE TABLE usage_events (
    source        text        NOT NULL,
    id            text        NOT NULL,
    day           date        NOT NULL,
    customer_ref  text        NOT NULL,
    meter         text        NOT NULL,
    value         numeric     NOT NULL,
    timestamp     timestamptz NOT NULL,
    stamped       boolean     NOT NULL,   -- true: it came without a timestamp and got its time of receipt
    received_at   timestamptz NOT NULL,
    total_id      bigint      NOT NULL,
    seal          integer     NOT NULL,
    PRIMARY KEY (source, id, day)
) PARTITION BY RANGE (day);

-- Ids of events that came without a timestamp: their repeat may be stamped on another day, which the key above
-- cannot see.
CREATE TABLE usage_stamps (
    source  text NOT NULL,
    id      text NOT NULL,
    day     date NOT NULL,
    PRIMARY KEY (source, id)
);
CREATE INDEX usage_stamps_day ON usage_stamps (day);

-- Events that were answered 202 but whose id the ledger already held with another body. Nothing is dropped silently.
CREATE TABLE usage_conflicts (
    source        text        NOT NULL,
    id            text        NOT NULL,
    customer_ref  text        NOT NULL,
    meter         text        NOT NULL,
    value         numeric     NOT NULL,
    timestamp     timestamptz NOT NULL,
    received_at   timestamptz NOT NULL,
    found_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (source, id, customer_ref, meter, value, timestamp)
);

-- What the ledger held on days whose partitions are past the retention and dropped, so that the sums still add up.
CREATE TABLE usage_retired (
    day       date PRIMARY KEY,
    events    bigint  NOT NULL,
    quantity  numeric NOT NULL
);

-- What is to be told to Stripe: written before the first call, repeated unchanged by every retry.
CREATE TABLE usage_deliveries (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    total_id         bigint      NOT NULL REFERENCES usage_totals (id),
    seal             integer     NOT NULL,
    customer         text        NOT NULL,
    event_name       text        NOT NULL,
    identifier       text        NOT NULL UNIQUE,
    payload          jsonb       NOT NULL,   -- the strings sent, as they are sent
    value            numeric     NOT NULL,   -- the same value, to add up
    timestamp        bigint      NOT NULL,   -- unix seconds, as sent
    state            text        NOT NULL DEFAULT 'pending'
                     CHECK (state IN ('pending', 'sending', 'sent', 'confirmed', 'parked', 'voided')),
    attempts         integer     NOT NULL DEFAULT 0,
    next_attempt_at  timestamptz NOT NULL DEFAULT now(),
    lease_until      timestamptz,
    unknown_since    timestamptz,   -- since when an earlier try may have reached Stripe without our knowing
    settled_at       timestamptz,
    reason           text,
    created_at       timestamptz NOT NULL DEFAULT now(),
    UNIQUE (total_id, seal)
);
CREATE INDEX usage_deliveries_due ON usage_deliveries (next_attempt_at) WHERE state IN ('pending', 'sending');
CREATE UNIQUE INDEX usage_deliveries_one_in_flight ON usage_deliveries (customer, event_name) WHERE state = 'sending';
CREATE INDEX usage_deliveries_parked ON usage_deliveries (created_at) WHERE state = 'parked';

-- A customer whose usage is to be sealed at once, because Stripe drafted an invoice. Written with the webhook's effect.
CREATE TABLE seal_requests (
    customer      text PRIMARY KEY,
    invoice       text        NOT NULL,
    requested_at  timestamptz NOT NULL DEFAULT now()
);

-- Token buckets shared by all workers.
CREATE TABLE rate_limits (
    name         text PRIMARY KEY,
    tokens       numeric     NOT NULL,
    refilled_at  timestamptz NOT NULL
);
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
