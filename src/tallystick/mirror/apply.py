"""Apply changes to the mirror: set-based statements inside the caller's transaction, safe to repeat.

    1. fold       of several changes of one object only the greatest mark is written
    2. lock       the customers touched, in sorted order; unknown ones become stubs to be fetched. Two transactions that
                  touch different objects of one customer thereby decide its access one after the other.
    3. write      kind by kind, each row guarded by its mark, in the order of ids, so that no two transactions can wait
                  for each other
    4. children   the items of the subscriptions that were written, and of no others

No order between objects is assumed: an invoice may come before its customer and a subscription before its prices.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.mirror.changes import (
    AnyChange,
    CustomerChange,
    InvoiceChange,
    PriceChange,
    ProductChange,
    SubscriptionChange,
)
from tallystick.mirror.marks import NEVER, ties_with, wins_over

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
        },
    ),
}

MARK_COLUMNS = {
    "deleted": "boolean",
    "mark_created": "timestamptz",
    "mark_rank": "smallint",
    "mark_event": "text",
    "needs_refresh": "boolean",
}

# `DO UPDATE … WHERE false` changes nothing and locks the row all the same, in the order of the SELECT.
LOCK_CUSTOMERS = text("""
    INSERT INTO customers AS t (id, needs_refresh)
    SELECT id, true FROM json_to_recordset(CAST(:rows AS json)) AS r(id text) ORDER BY id
    ON CONFLICT (id) DO UPDATE SET updated_at = t.updated_at WHERE false
""")

FIND_PRICES = text("SELECT id FROM prices WHERE id = ANY(:ids)")

WRITE_ITEMS = text("""
    INSERT INTO subscription_items AS t (id, subscription, price, current_period_start, current_period_end)
    SELECT * FROM json_to_recordset(CAST(:rows AS json))
               AS r(id text, subscription text, price text, current_period_start timestamptz,
                    current_period_end timestamptz)
     ORDER BY id
    ON CONFLICT (id) DO UPDATE SET
        subscription = excluded.subscription, price = excluded.price, deleted = false, updated_at = now(),
        current_period_start = excluded.current_period_start, current_period_end = excluded.current_period_end
""")

DELETE_OTHER_ITEMS = text("""
    UPDATE subscription_items SET deleted = true, updated_at = now()
     WHERE subscription = ANY(:subscriptions) AND NOT deleted AND NOT id = ANY(:listed)
""")

ADD_BOUNDARIES = text("""
    INSERT INTO period_boundaries (customer, at)
    SELECT * FROM json_to_recordset(CAST(:rows AS json)) AS r(customer text, at timestamptz) ORDER BY customer, at
    ON CONFLICT DO NOTHING
""")

RAISE_PAYMENT_FAILED_AT = text("""
    UPDATE invoices t SET payment_failed_at = w.payment_failed_at, updated_at = now()
      FROM json_to_recordset(CAST(:rows AS json)) AS w(id text, payment_failed_at timestamptz)
     WHERE t.id = w.id AND (t.payment_failed_at IS NULL OR t.payment_failed_at < w.payment_failed_at)
    RETURNING t.id
""")


COLUMNS = {kind: {"id": "text", **own, **MARK_COLUMNS} for kind, (_, own) in TABLES.items()}


def _write_statement(kind: type[AnyChange]) -> TextClause:
    """Insert rows, or write over those with a smaller mark; returns the ids written."""
    table, columns = TABLES[kind][0], COLUMNS[kind]
    assignments = {name: f"excluded.{name}" for name in columns if name != "id"}
    assignments["needs_refresh"] = f"excluded.needs_refresh OR {ties_with('excluded', 't')}"
    assignments["refresh_after"] = "'-infinity'"
    if "payment_failed_at" in assignments:
        assignments["payment_failed_at"] = "greatest(t.payment_failed_at, excluded.payment_failed_at)"
    return text(f"""
        INSERT INTO {table} AS t ({", ".join(columns)})
        SELECT * FROM json_to_recordset(CAST(:rows AS json)) AS r({_recordset(columns)}) ORDER BY id
        ON CONFLICT (id) DO UPDATE SET updated_at = now(), {_assign(assignments)}
         WHERE {wins_over("excluded", "t")}
        RETURNING id
    """)  # noqa: S608  names from the tables above


def _overwrite_statement(kind: type[AnyChange]) -> TextClause:
    """Write a fetched object over the row that was read before the fetch, if it is still the same row."""
    table, columns = TABLES[kind][0], COLUMNS[kind]
    assignments = {name: f"w.{name}" for name in columns if name not in ("id", "mark_created", "mark_event")}
    # Nothing leaves a final status, so a late event must not either.
    assignments["mark_rank"] = "greatest(t.mark_rank, w.mark_rank)"
    assignments.pop("payment_failed_at", None)
    return text(f"""
        UPDATE {table} t SET updated_at = now(), {_assign(assignments)}
          FROM json_to_recordset(CAST(:rows AS json)) AS w({_recordset(columns)})
         WHERE t.id = w.id AND CAST(t.xmin AS text) = :version
        RETURNING t.id
    """)  # noqa: S608  names from the tables above


def _tie_statement(kind: type[AnyChange]) -> TextClause:
    """The loser of a tie came second: the row keeps the winner, and is to be fetched."""
    table, columns = TABLES[kind][0], COLUMNS[kind]
    return text(f"""
        UPDATE {table} t SET needs_refresh = true, refresh_after = '-infinity', updated_at = now()
          FROM json_to_recordset(CAST(:rows AS json)) AS w({_recordset(columns)})
         WHERE t.id = w.id AND {ties_with("w", "t")}
    """)  # noqa: S608  names from the tables above


def _recordset(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {type_}" for name, type_ in columns.items())


def _assign(assignments: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in assignments.items())


WRITE = {kind: _write_statement(kind) for kind in TABLES}
OVERWRITE = {kind: _overwrite_statement(kind) for kind in TABLES}
NOTE_TIES = {kind: _tie_statement(kind) for kind in TABLES}
ENTOMB = {
    kind: text(f"""
        UPDATE {table} SET deleted = true, needs_refresh = false, updated_at = now()
         WHERE id = :id AND CAST(xmin AS text) = :version
        RETURNING id
    """)  # noqa: S608  names from the tables above
    for kind, (table, _) in TABLES.items()
}


@dataclass
class Applied:
    """What was written: the events whose change is in a row now, and the latest of them for each customer."""

    events: set[str] = field(default_factory=set)
    customers: dict[str, str] = field(default_factory=dict)


async def apply_changes(connection: AsyncConnection, changes: Sequence[AnyChange]) -> Applied:
    """Write the changes that win over what the mirror holds. The caller decides the customers' access, and commits.

    A change that loses leaves nothing but its payment failure, its period boundaries and stubs of what it links to:
    these are true whatever came later.
    """
    folded = fold(changes)
    await lock_customers(connection, {customer for change in changes for customer in _customers_of(change)})
    applied = Applied()
    for kind in TABLES:
        of_kind = [change for change in folded if type(change) is kind]
        if kind is PriceChange:
            of_kind += await _find_price_stubs(connection, changes, known={change.id for change in of_kind})
        if not of_kind:
            continue
        rows = _rows(of_kind)
        written = set((await connection.execute(WRITE[kind], {"rows": rows})).scalars())
        if len(written) < len(of_kind):
            await connection.execute(NOTE_TIES[kind], {"rows": rows})
        if kind is SubscriptionChange:
            await _write_items(connection, [change for change in of_kind if change.id in written])
        if kind is InvoiceChange:
            losers = [change for change in of_kind if change.id not in written]
            written_failures = written | await _raise_payment_failures(connection, losers)
            _note_payment_failures(applied, changes, of_kind, written_failures)
        _note_written(applied, [change for change in of_kind if change.id in written])
    await _add_boundaries(connection, changes)
    return applied


async def lock_customers(connection: AsyncConnection, customers: Iterable[str]) -> None:
    """Lock the customers' rows until the transaction ends, in one order for everybody; unknown ones become stubs."""
    rows = [{"id": customer} for customer in sorted(set(customers))]
    if rows:
        await connection.execute(LOCK_CUSTOMERS, {"rows": json.dumps(rows)})


async def overwrite(connection: AsyncConnection, change: AnyChange, version: str) -> bool:
    """Write a fetched object over its row, whatever the marks; whether it was written.

    It is written only over the `version` of the row (its xmin) that was read before the fetch, so that a slow fetch
    never undoes what came meanwhile. The row keeps the mark of its last event. The caller has locked the customer.
    """
    kind = type(change)
    if isinstance(change, SubscriptionChange):
        stubs = await _find_price_stubs(connection, [change], known=set())
        if stubs:
            await connection.execute(WRITE[PriceChange], {"rows": _rows(stubs)})
    result = await connection.execute(OVERWRITE[kind], {"rows": _rows([change]), "version": version})
    written = result.scalar() is not None
    if written and isinstance(change, SubscriptionChange):
        await _write_items(connection, [change])
    await _add_boundaries(connection, [change])
    return written


async def entomb(connection: AsyncConnection, kind: type[AnyChange], object_id: str, version: str) -> bool:
    """Mark a row as deleted because Stripe no longer has the object; whether it still had the `version` (see above)."""
    result = await connection.execute(ENTOMB[kind], {"id": object_id, "version": version})
    return result.scalar() is not None


def fold(changes: Sequence[AnyChange]) -> list[AnyChange]:
    """The greatest change of each object, with the latest payment failure of all; to be fetched if it won by a tie."""
    folded: dict[tuple[type[AnyChange], str], AnyChange] = {}
    for change in sorted(changes, key=lambda change: change.mark.order):
        key = (type(change), change.id)
        beaten = folded.get(key)
        if beaten is None:
            folded[key] = change
            continue
        winner = change
        if winner.mark.ties_with(beaten.mark):
            winner = replace(winner, needs_refresh=True)
        if isinstance(winner, InvoiceChange) and isinstance(beaten, InvoiceChange):
            winner = replace(winner, payment_failed_at=_latest(winner.payment_failed_at, beaten.payment_failed_at))
        folded[key] = winner
    return list(folded.values())


def _latest(one: datetime | None, other: datetime | None) -> datetime | None:
    return max((at for at in (one, other) if at is not None), default=None)


def _customers_of(change: AnyChange) -> tuple[str, ...]:
    match change:
        case CustomerChange():
            return (change.id,)
        case SubscriptionChange() | InvoiceChange():
            return (change.customer,)
        case _:
            return ()


async def _find_price_stubs(
    connection: AsyncConnection, changes: Sequence[AnyChange], *, known: set[str]
) -> list[AnyChange]:
    """Prices embedded in items that the mirror does not have yet.

    Looked up without a lock: a popular price is in every subscription, and all transactions would wait for its row.
    """
    embedded = {
        price.id: price for change in changes if isinstance(change, SubscriptionChange) for price in change.prices
    }
    wanted = sorted(embedded.keys() - known)
    if not wanted:
        return []
    present = set((await connection.execute(FIND_PRICES, {"ids": wanted})).scalars())
    return [embedded[price] for price in wanted if price not in present]


async def _write_items(connection: AsyncConnection, subscriptions: Iterable[AnyChange]) -> None:
    written = [change for change in subscriptions if isinstance(change, SubscriptionChange)]
    items = {
        item.id: {
            "id": item.id,
            "subscription": change.id,
            "price": item.price,
            "current_period_start": item.current_period_start,
            "current_period_end": item.current_period_end,
        }
        for change in written
        for item in change.items
    }
    if items:
        await connection.execute(WRITE_ITEMS, {"rows": _dump(items.values())})
    complete = sorted(change.id for change in written if change.complete)
    if complete:
        await connection.execute(DELETE_OTHER_ITEMS, {"subscriptions": complete, "listed": sorted(items)})


async def _raise_payment_failures(connection: AsyncConnection, invoices: Iterable[AnyChange]) -> set[str]:
    rows = [
        {"id": change.id, "payment_failed_at": change.payment_failed_at}
        for change in invoices
        if isinstance(change, InvoiceChange) and change.payment_failed_at is not None
    ]
    if not rows:
        return set()
    return set((await connection.execute(RAISE_PAYMENT_FAILED_AT, {"rows": _dump(rows)})).scalars())


async def _add_boundaries(connection: AsyncConnection, changes: Iterable[AnyChange]) -> None:
    """Every instant at which a period begins or ends, of late and stale events too: each was a boundary once.

    One too many cuts an hour of usage in two, which changes no sum; one too few may put usage on the wrong invoice.
    """
    boundaries = {(customer, at) for change in changes for customer, at in _boundaries_of(change) if at is not None}
    if boundaries:
        rows = [{"customer": customer, "at": at} for customer, at in sorted(boundaries)]
        await connection.execute(ADD_BOUNDARIES, {"rows": _dump(rows)})


def _boundaries_of(change: AnyChange) -> Iterable[tuple[str, datetime | None]]:
    match change:
        case SubscriptionChange():
            for item in change.items:
                yield change.customer, item.current_period_start
                yield change.customer, item.current_period_end
            # A trial's end begins the first paid period; a cancellation may end the last one anywhere.
            for at in (change.start_date, change.trial_end, change.cancel_at, change.ended_at):
                yield change.customer, at
        case InvoiceChange() if change.subscription is not None:
            # Also cuts within a period, as when an invoice is made because an amount was reached.
            yield change.customer, change.period_start
            yield change.customer, change.period_end


def _note_written(applied: Applied, changes: Iterable[AnyChange]) -> None:
    for change in sorted(changes, key=lambda change: change.mark.order):
        if change.mark.event:
            applied.events.add(change.mark.event)
            for customer in _customers_of(change):
                applied.customers[customer] = change.mark.event


def _note_payment_failures(
    applied: Applied, changes: Sequence[AnyChange], folded: Sequence[AnyChange], written: set[str]
) -> None:
    """An event that lost to a later one has still left the payment failure that it told of."""
    latest = {change.id: change.payment_failed_at for change in folded if isinstance(change, InvoiceChange)}
    for change in changes:
        if (
            isinstance(change, InvoiceChange)
            and change.id in written
            and change.payment_failed_at is not None
            and change.payment_failed_at == latest[change.id]
        ):
            applied.events.add(change.mark.event)
            applied.customers[change.customer] = change.mark.event


def _rows(changes: Iterable[AnyChange]) -> str:
    return _dump(
        {name: getattr(change, name) for name in ("id", *TABLES[type(change)][1], "needs_refresh")}
        | {
            "deleted": change.mark.deleted,
            "mark_created": change.mark.created,
            "mark_rank": change.mark.rank,
            "mark_event": change.mark.event,
        }
        for change in changes
    )


def _dump(rows: Iterable[Mapping[str, object]]) -> str:
    return json.dumps(list(rows), default=_instant)


def _instant(value: object) -> str:
    assert isinstance(value, datetime)
    return "-infinity" if value == NEVER else value.isoformat()
