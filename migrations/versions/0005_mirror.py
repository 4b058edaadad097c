"""The rest of the mirror: payment methods, checkout sessions, entitlements, meters; and connected accounts kept apart.

`account` is '' for the account of the API key, and `acct_…` for an account that is connected to it.
"""

from alembic import op

revision = "0005"
down_revision = "0004"

# As in the first migration: which event wrote a row, and whether it is to be fetched.
MARK = {
    "account": "text NOT NULL DEFAULT ''",
    "deleted": "boolean NOT NULL DEFAULT false",
    "mark_created": "timestamptz NOT NULL DEFAULT '-infinity'",
    "mark_rank": "smallint NOT NULL DEFAULT 0",
    "mark_event": "text NOT NULL DEFAULT ''",
    "needs_refresh": "boolean NOT NULL DEFAULT false",
    "refresh_after": "timestamptz NOT NULL DEFAULT '-infinity'",
    "updated_at": "timestamptz NOT NULL DEFAULT now()",
}
MIRRORED = ", ".join(f"{name} {type_}" for name, type_ in MARK.items())
ADD_MARK = ", ".join(f"ADD COLUMN {name} {type_}" for name, type_ in MARK.items())

TABLES = f"""
-- Which of them is the default, the customer itself says.
CREATE TABLE payment_methods (
    id        text PRIMARY KEY,
    customer  text,
    type      text,
    {MIRRORED}
);
CREATE INDEX payment_methods_needs_refresh ON payment_methods (refresh_after) WHERE needs_refresh;
CREATE INDEX payment_methods_customer ON payment_methods (customer) WHERE customer IS NOT NULL;

-- Completed checkouts that carried a reference of the product's.
CREATE TABLE checkout_sessions (
    id                   text PRIMARY KEY,
    customer             text NOT NULL,
    client_reference_id  text NOT NULL,
    {MIRRORED}
);
CREATE INDEX checkout_sessions_needs_refresh ON checkout_sessions (refresh_after) WHERE needs_refresh;
CREATE INDEX checkout_sessions_reference ON checkout_sessions (client_reference_id);
CREATE INDEX checkout_sessions_customer ON checkout_sessions (customer);

-- One row a customer, whose mark guards the entitlements: a summary has no id of its own.
CREATE TABLE entitlement_summaries (
    id  text PRIMARY KEY,   -- the customer's
    {MIRRORED}
);
CREATE INDEX entitlement_summaries_needs_refresh ON entitlement_summaries (refresh_after) WHERE needs_refresh;

CREATE TABLE active_entitlements (
    id          text PRIMARY KEY,
    customer    text        NOT NULL,
    feature     text,
    lookup_key  text,
    deleted     boolean     NOT NULL DEFAULT false,
    updated_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX active_entitlements_customer ON active_entitlements (customer) WHERE NOT deleted;

ALTER TABLE meters {ADD_MARK};
CREATE INDEX meters_needs_refresh ON meters (refresh_after) WHERE needs_refresh;

ALTER TABLE subscriptions ADD COLUMN pending_update_expires_at timestamptz;

-- Every name that a customer of the own account goes by. A name is looked for in this order: linked by the product, in
-- a customer's metadata (the newest customer has it), given to a checkout as `client_reference_id` (the latest one
-- completed has it), its own id. One name never means two customers, and none means a connected account's.
CREATE OR REPLACE VIEW customer_references AS
    SELECT l.ref, l.customer FROM customer_links l
     WHERE NOT EXISTS (SELECT FROM customers c WHERE c.id = l.customer AND c.account <> '')
    UNION ALL
    SELECT ref, customer FROM (
        SELECT DISTINCT ON (ref) ref, customer FROM (
            SELECT ref, id AS customer, 1 AS place, mark_created, id
              FROM customers
             WHERE ref IS NOT NULL AND NOT deleted AND account = ''
            UNION ALL
            SELECT s.client_reference_id, s.customer, 2, s.mark_created, s.id
              FROM checkout_sessions s JOIN customers c ON c.id = s.customer AND NOT c.deleted AND c.account = ''
             WHERE NOT s.deleted AND s.account = ''
        ) named
        WHERE NOT starts_with(ref, 'cus_')
        ORDER BY ref, place, mark_created DESC, id DESC
    ) learnt
    WHERE NOT EXISTS (SELECT FROM customer_links l WHERE l.ref = learnt.ref)
    UNION ALL
    SELECT id, id FROM customers WHERE account = '';

-- The same, and the customers of connected accounts by their ids: whose access can be asked for.
CREATE VIEW all_customer_references AS
    SELECT ref, customer FROM customer_references
    UNION ALL
    SELECT id, id FROM customers WHERE account <> '';

-- The product's own names of each customer, from the customer's side (see customer_references for the other side). A
-- deleted customer keeps its name until another one takes it.
CREATE OR REPLACE VIEW customer_names AS
    SELECT c.id AS customer, c.account,
           ARRAY(SELECT l.ref FROM customer_links l WHERE l.customer = c.id AND c.account = ''
                 UNION
                 SELECT c.ref
                  WHERE c.ref IS NOT NULL AND c.account = '' AND NOT starts_with(c.ref, 'cus_')
                    AND NOT EXISTS (SELECT FROM customer_links l WHERE l.ref = c.ref)
                    AND NOT EXISTS (SELECT FROM customers o
                                     WHERE o.ref = c.ref AND o.id <> c.id AND NOT o.deleted AND o.account = ''
                                       AND (c.deleted OR (o.mark_created, o.id) > (c.mark_created, c.id)))
                 UNION
                 SELECT s.client_reference_id
                   FROM checkout_sessions s
                  WHERE s.customer = c.id AND NOT s.deleted AND s.account = '' AND c.account = ''
                    AND NOT starts_with(s.client_reference_id, 'cus_')
                    AND NOT EXISTS (SELECT FROM customer_links l WHERE l.ref = s.client_reference_id)
                    AND NOT EXISTS (SELECT FROM customers o
                                     WHERE o.ref = s.client_reference_id AND o.id <> c.id AND NOT o.deleted
                                       AND o.account = '')
                    AND NOT EXISTS (SELECT FROM checkout_sessions n JOIN customers o ON o.id = n.customer
                                     WHERE n.client_reference_id = s.client_reference_id AND n.customer <> c.id
                                       AND NOT n.deleted AND n.account = '' AND NOT o.deleted AND o.account = ''
                                       AND (c.deleted OR (n.mark_created, n.id) > (s.mark_created, s.id)))
                 ORDER BY 1) AS refs
      FROM customers c;
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
