"""The mirror's tables, and the statements that write them: each takes any number of rows as one JSON parameter.

`w` are the rows to be written, `t` is the table.
"""

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from sqlalchemy import TextClause, text

from tallystick.mirror.changes import (
    AnyChange,
    CheckoutSessionChange,
    CustomerChange,
    EntitlementsChange,
    InvoiceChange,
    MeterChange,
    PaymentMethodChange,
    PriceChange,
    ProductChange,
    SubscriptionChange,
)
from tallystick.mirror.marks import ties_with, wins_over

# Each kind's table and the columns that an event fills, beside the id and the mark.
TABLES: Mapping[type[AnyChange], tuple[str, Mapping[str, str]]] = {
    CustomerChange: ("customers", {"ref": "text", "delinquent": "boolean", "default_payment_method": "text"}),
    ProductChange: ("products", {"active": "boolean"}),
    PriceChange: (
        "prices",
        {
            "product": "text",
            "active": "boolean",
            "type": "text",
            "usage_type": "text",
            "meter": "text",
            "lookup_key": "text",
        },
    ),
    SubscriptionChange: (
        "subscriptions",
        {
            "customer": "text",
            "status": "text",
            "cancel_at_period_end": "boolean",
            "cancel_at": "timestamptz",
            "canceled_at": "timestamptz",
            "ended_at": "timestamptz",
            "start_date": "timestamptz",
            "trial_end": "timestamptz",
            "pending_update_expires_at": "timestamptz",
            "pause_collection": "text",
            "collection_method": "text",
            "latest_invoice": "text",
        },
    ),
    InvoiceChange: (
        "invoices",
        {
            "customer": "text",
            "subscription": "text",
            "status": "text",
            "billing_reason": "text",
            "collection_method": "text",
            "attempted": "boolean",
            "period_start": "timestamptz",
            "period_end": "timestamptz",
            "created": "timestamptz",
            "finalized_at": "timestamptz",
            "next_payment_attempt": "timestamptz",
            "due_date": "timestamptz",
            "payment_failed_at": "timestamptz",
            "payment_failing_since": "timestamptz",
        },
    ),
    PaymentMethodChange: ("payment_methods", {"customer": "text", "type": "text"}),
    CheckoutSessionChange: ("checkout_sessions", {"customer": "text", "client_reference_id": "text"}),
    EntitlementsChange: ("entitlement_summaries", {}),
    MeterChange: (
        "meters",
        {
            "event_name": "text",
            "formula": "text",
            "customer_key": "text",
            "value_key": "text",
            "event_time_window": "text",
            "status": "text",
        },
    ),
}

MARK_COLUMNS = {
    "account": "text",
    "deleted": "boolean",
    "mark_created": "timestamptz",
    "mark_rank": "smallint",
    "mark_event": "text",
    "needs_refresh": "boolean",
}

# `DO UPDATE … WHERE false` changes nothing and locks the row all the same, in the order of the SELECT.
LOCK_CUSTOMERS = text("""
    INSERT INTO customers AS t (id, account, needs_refresh)
    SELECT id, account, true FROM json_to_recordset(CAST(:customers AS json)) AS r(id text, account text) ORDER BY id
    ON CONFLICT (id) DO UPDATE SET updated_at = t.updated_at WHERE false
""")

WRITE_ENTITLEMENTS = text("""
    INSERT INTO active_entitlements AS t (id, customer, feature, lookup_key)
    SELECT * FROM json_to_recordset(CAST(:rows AS json)) AS r(id text, customer text, feature text, lookup_key text)
     ORDER BY id
    ON CONFLICT (id) DO UPDATE SET
        customer = excluded.customer, feature = excluded.feature, lookup_key = excluded.lookup_key, deleted = false,
        updated_at = now()
""")

DELETE_OTHER_ENTITLEMENTS = text("""
    UPDATE active_entitlements SET deleted = true, updated_at = now()
     WHERE customer = ANY(:customers) AND NOT deleted AND NOT id = ANY(:listed)
""")

# Of the prices that are known as parts of items only, those that the mirror does not have yet. Looked up without a
# lock: a popular price is in every subscription, and all transactions would wait for its row. (One by one: for a NOT
# EXISTS all prices may be read. The boundaries below likewise.)
NO_KNOWN_STUB = "(w.mark_created > '-infinity' OR (SELECT p.id FROM prices p WHERE p.id = w.id) IS NULL)"

# The items of the subscriptions that were written, and of no others. What else those with a complete list had is gone.
# Most events change none of them: what is there already is passed over, as with the boundaries below, which costs a
# fifth of writing it again.
ITEMS = """
    SELECT * FROM json_to_recordset(CAST(:items AS json))
               AS r(id text, subscription text, price text, current_period_start timestamptz,
                    current_period_end timestamptz)
     WHERE r.subscription IN (SELECT id FROM subscriptions_written)
"""
ITEMS_GONE = """
    UPDATE subscription_items SET deleted = true, updated_at = now()
     WHERE subscription = ANY(:complete) AND subscription IN (SELECT id FROM subscriptions_written)
       AND NOT deleted AND id NOT IN (SELECT id FROM items)
"""
ITEMS_WRITTEN = """
    INSERT INTO subscription_items AS t (id, subscription, price, current_period_start, current_period_end)
    SELECT * FROM items ORDER BY id
    ON CONFLICT (id) DO UPDATE SET
        subscription = excluded.subscription, price = excluded.price, deleted = false, updated_at = now(),
        current_period_start = excluded.current_period_start, current_period_end = excluded.current_period_end
     WHERE t.deleted OR (t.subscription, t.price, t.current_period_start, t.current_period_end) IS DISTINCT FROM
           (excluded.subscription, excluded.price, excluded.current_period_start, excluded.current_period_end)
"""

# Of a period the furthest end that was told: in whatever order events come, the same row. An anchor that moves begins a
# new period, and that one's start ends this one (see the view `metered_periods`).
PERIODS = """
    INSERT INTO billing_periods AS t (item, price, period_start, period_end, subscription, customer)
    SELECT item, price, period_start, period_end, subscription, customer
      FROM json_to_recordset(CAST(:periods AS json))
        AS r(item text, price text, period_start timestamptz, period_end timestamptz, subscription text, customer text)
     ORDER BY item, price, period_start
    ON CONFLICT (item, price, period_start) DO UPDATE SET period_end = greatest(t.period_end, excluded.period_end)
     WHERE t.period_end < excluded.period_end
"""
BOUNDARIES = """
    INSERT INTO period_boundaries (customer, at)
    SELECT * FROM json_to_recordset(CAST(:boundaries AS json)) AS r(customer text, at timestamptz)
     WHERE (SELECT b.at FROM period_boundaries b WHERE b.customer = r.customer AND b.at = r.at) IS NULL
     ORDER BY customer, at
    ON CONFLICT DO NOTHING
"""

# The names that these rows give or take away, or may have moved, for whoever else goes by them (access/names.py). Two
# batches do not see each other's rows, so it is the name that is noted, and not who has it. Most events of customers
# change no name, and note none. There is no unique key, so that nobody waits for another who notes the same name.
# (OFFSET 0: looked up row by row, whatever statistics say.)
NOTE_REFS = """
    INSERT INTO changed_refs (ref)
    SELECT DISTINCT n.ref FROM ({names}) n WHERE n.ref IS NOT NULL AND NOT starts_with(n.ref, 'cus_')
"""
# A customer that is gone, or turns out to be another account's, loses the names of its checkouts and links, too. Of
# several customers with one name the newest has it, so there any event may move it.
REFS_OF_CUSTOMERS = """
    SELECT r.ref
      FROM customers_written t
     CROSS JOIN LATERAL (SELECT * FROM customers b WHERE b.id = t.id OFFSET 0) b
     CROSS JOIN LATERAL (
        SELECT unnest(ARRAY[b.ref, t.ref]) AS ref
         WHERE (b.ref, b.deleted, b.account) IS DISTINCT FROM (t.ref, t.deleted, t.account)
               OR t.ref IS NOT NULL
                  AND (SELECT o.id FROM customers o
                        WHERE o.ref = t.ref AND o.id <> t.id AND NOT o.deleted AND o.account = ''
                        ORDER BY o.mark_created DESC, o.id DESC LIMIT 1) IS NOT NULL
        UNION ALL
        SELECT s.client_reference_id FROM checkout_sessions s
         WHERE s.customer = t.id AND (b.deleted, b.account) IS DISTINCT FROM (t.deleted, t.account)
        UNION ALL
        SELECT l.ref FROM customer_links l
         WHERE l.customer = t.id AND (b.deleted, b.account) IS DISTINCT FROM (t.deleted, t.account)) r
"""
REFS_OF_CHECKOUTS = """
    SELECT unnest(ARRAY[(SELECT b.client_reference_id FROM checkout_sessions b WHERE b.id = t.id),
                        t.client_reference_id]) AS ref
      FROM checkout_sessions_written t WHERE t.account = ''
"""
REFS: Mapping[type[AnyChange], str] = {CustomerChange: REFS_OF_CUSTOMERS, CheckoutSessionChange: REFS_OF_CHECKOUTS}
# What of a written row they ask for.
NAMING_COLUMNS: Mapping[type[AnyChange], str] = {
    CustomerChange: ", t.ref, t.deleted, t.account",
    CheckoutSessionChange: ", t.client_reference_id, t.account",
}

MERGE_PAYMENT_FAILURES = text("""
    UPDATE invoices t SET updated_at = now(),
           payment_failed_at = greatest(t.payment_failed_at, w.payment_failed_at),
           payment_failing_since = least(t.payment_failing_since, w.payment_failing_since)
      FROM json_to_recordset(CAST(:rows AS json))
        AS w(id text, payment_failed_at timestamptz, payment_failing_since timestamptz)
     WHERE t.id = ANY(:ids) AND t.id = w.id
       AND (coalesce(t.payment_failed_at < w.payment_failed_at, true)
            OR coalesce(t.payment_failing_since > w.payment_failing_since, true))
    RETURNING t.id
""")


COLUMNS = {kind: {"id": "text", **own, **MARK_COLUMNS} for kind, (_, own) in TABLES.items()}


def _may_overwrite(new: str, old: str) -> str:
    """SQL: whether the row `new` takes the place of `old`.

    Ids that people choose, as of products, may be alike in two accounts: then the lesser account has the row, and the
    own one, '', is the least. But a stub of ours that Stripe has not confirmed is only a guess at its account.
    """
    return f"""(
        {new}.account = {old}.account AND {wins_over(new, old)}
        OR {new}.account COLLATE "C" < {old}.account COLLATE "C"
        OR {new}.account <> {old}.account AND {old}.mark_event = '' AND ({old}.needs_refresh OR {old}.deleted)
    )"""


@lru_cache
def write_statement(kinds: tuple[type[AnyChange], ...]) -> TextClause:
    """Insert rows of these kinds, or write over those with a smaller mark, and what belongs to them.

    Kind by kind in the given order, each in the order of ids; each kind's rows are a parameter named as its table.
    Returns table and id of each row that was written, with its status before and now if the kind tells one.
    """
    return _with_children(kinds, {f"{TABLES[kind][0]}_written": _write_part(kind) for kind in kinds})


def _with_children(kinds: Collection[type[AnyChange]], parts: dict[str, str]) -> TextClause:
    children: dict[str, str] = {}
    if SubscriptionChange in kinds:
        children |= {"items": ITEMS, "items_gone": ITEMS_GONE, "items_written": ITEMS_WRITTEN, "periods": PERIODS}
    if SubscriptionChange in kinds or InvoiceChange in kinds:
        children |= {"boundaries": BOUNDARIES}
    return text(_with(parts | children | _noting_refs(kinds)) + _union(parts))


def _noting_refs(kinds: Collection[type[AnyChange]]) -> dict[str, str]:
    names = [refs for kind, refs in REFS.items() if kind in kinds]
    return {"refs_noted": NOTE_REFS.format(names=" UNION ALL ".join(names))} if names else {}


def _with(parts: Mapping[str, str]) -> str:
    return f"WITH {', '.join(f'{name} AS ({part})' for name, part in parts.items())} "


def _union(names: Iterable[str]) -> str:
    return " UNION ALL ".join(f"SELECT of, id, old, new FROM {name}" for name in names)  # noqa: S608  names from the tables above


def _write_part(kind: type[AnyChange]) -> str:
    table, columns = TABLES[kind][0], COLUMNS[kind]
    assignments = {name: f"excluded.{name}" for name in columns if name != "id"}
    # Another account's object of the same id is another object, and no rival.
    assignments["needs_refresh"] = (
        f"excluded.needs_refresh OR excluded.account = t.account AND {ties_with('excluded', 't')}"
    )
    assignments["refresh_after"] = "'-infinity'"
    if "payment_failed_at" in assignments:
        assignments["payment_failed_at"] = "greatest(t.payment_failed_at, excluded.payment_failed_at)"
        assignments["payment_failing_since"] = "least(t.payment_failing_since, excluded.payment_failing_since)"
    return f"""
        INSERT INTO {table} AS t ({", ".join(columns)})
        SELECT * FROM json_to_recordset(CAST(:{table} AS json)) AS w({_recordset(columns)})
         WHERE {NO_KNOWN_STUB if kind is PriceChange else "true"} ORDER BY id
        ON CONFLICT (id) DO UPDATE SET updated_at = now(), {_assign(assignments)}
         WHERE {_may_overwrite("excluded", "t")}
        RETURNING {_returning(kind)}
    """  # noqa: S608  names from the tables above


def _overwrite_statement(kind: type[AnyChange]) -> TextClause:
    """Write a fetched object over the row that was read before the fetch, if it is still the same row."""
    table, columns = TABLES[kind][0], COLUMNS[kind]
    assignments = {name: f"w.{name}" for name in columns if name not in ("id", "account", "mark_created", "mark_event")}
    # Nothing leaves a final status, so a late event must not either.
    assignments["mark_rank"] = "greatest(t.mark_rank, w.mark_rank)"
    for fact in ("payment_failed_at", "payment_failing_since"):
        assignments.pop(fact, None)
    update = f"""
        UPDATE {table} t SET updated_at = now(), {_assign(assignments)}
          FROM json_to_recordset(CAST(:{table} AS json)) AS w({_recordset(columns)})
         WHERE t.id = w.id AND t.account = w.account AND CAST(t.xmin AS text) = :version
        RETURNING {_returning(kind)}
    """  # noqa: S608  names from the tables above
    prices = {"prices_written": _write_part(PriceChange)} if kind is SubscriptionChange else {}
    return _with_children([kind], prices | {f"{table}_written": update})


def _tie_statement(kind: type[AnyChange]) -> TextClause:
    """The loser of a tie came second: the row keeps the winner, and is to be fetched."""
    table, columns = TABLES[kind][0], COLUMNS[kind]
    return text(f"""
        UPDATE {table} t SET needs_refresh = true, refresh_after = '-infinity', updated_at = now()
          FROM json_to_recordset(CAST(:rows AS json)) AS w({_recordset(columns)})
         WHERE t.id = ANY(:ids) AND t.id = w.id AND t.account = w.account AND {ties_with("w", "t")}
    """)  # noqa: S608  names from the tables above


def _tomb_statement(kind: type[AnyChange]) -> TextClause:
    """Mark a row as deleted, if it is still the row that was read before Stripe was asked."""
    table = TABLES[kind][0]
    update = f"""
        UPDATE {table} t SET deleted = true, needs_refresh = false, updated_at = now()
         WHERE id = :id AND CAST(xmin AS text) = :version
        RETURNING id, {"t.customer, t.status" if tells_status(kind) else "NULL AS customer, NULL"} AS old
                  {NAMING_COLUMNS.get(kind, "")}
    """  # noqa: S608  names from the tables above
    parts = {f"{table}_written": update} | _noting_refs([kind])
    return text(f"{_with(parts)} SELECT * FROM {table}_written")  # noqa: S608  names from the tables above


def tells_status(kind: type[AnyChange]) -> bool:
    """Whether changes of its status are news to a customer."""
    return kind in (SubscriptionChange, InvoiceChange)


def _returning(kind: type[AnyChange]) -> str:
    table = TABLES[kind][0]
    if not tells_status(kind):
        return (
            f"'{table}' AS of, t.id, CAST(NULL AS text) AS old, CAST(NULL AS text) AS new{NAMING_COLUMNS.get(kind, '')}"
        )
    # A statement sees the rows as they were before it; the customers' lock keeps others from changing them.
    old = f"(SELECT {_status('b')} FROM {table} b WHERE b.id = t.id)"  # noqa: S608  names from the tables above
    return f"'{table}' AS of, t.id, {old} AS old, {_status('t')} AS new"


def _status(row: str) -> str:
    """SQL: the status as the timeline and the notifications tell it.

    A draft invoice can be deleted, which Stripe has no status for.
    """
    return f"CASE WHEN {row}.deleted THEN 'deleted' ELSE {row}.status END"


def _recordset(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {type_}" for name, type_ in columns.items())


def _assign(assignments: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in assignments.items())


OVERWRITE = {kind: _overwrite_statement(kind) for kind in TABLES}
NOTE_TIES = {kind: _tie_statement(kind) for kind in TABLES}
ENTOMB = {kind: _tomb_statement(kind) for kind in TABLES}
FIND_ACCOUNTS = {
    kind: text(f"SELECT id, account FROM {table} WHERE id = ANY(:ids)")  # noqa: S608  names from the tables above
    for kind, (table, _) in TABLES.items()
}
