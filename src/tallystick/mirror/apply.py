"""Apply changes to the mirror: set-based statements inside the caller's transaction, safe to repeat.

    1. lock       the customers touched, in sorted order; unknown ones become stubs to be fetched. Two transactions that
                  touch different objects of one customer thereby decide its access one after the other.
    2. fold       of several changes of one object only the greatest mark is written
    3. write      all kinds in one statement, each row guarded by its mark, kind by kind in the order of ids, so that no
                  two transactions can wait for each other; with them the items of the subscriptions that are written,
                  and of no others
    4. losers     their payment failures and ties

No order between objects is assumed: an invoice may come before its customer and a subscription before its prices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec
from msgspec.structs import replace
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.mirror.changes import (
    AnyChange,
    CheckoutSessionChange,
    CustomerChange,
    EntitlementsChange,
    InvoiceChange,
    PriceChange,
    SubscriptionChange,
)
from tallystick.mirror.marks import NEVER
from tallystick.mirror.statements import (
    DELETE_OTHER_ENTITLEMENTS,
    ENTOMB,
    FIND_ACCOUNTS,
    LOCK_CUSTOMERS,
    MERGE_PAYMENT_FAILURES,
    NOTE_TIES,
    OVERWRITE,
    TABLES,
    WRITE_ENTITLEMENTS,
    write_statement,
)


@dataclass(frozen=True)
class Transition:
    """A status of a subscription or an invoice that was written over another one.

    `old` is None when the object was not known before, and `new` is `deleted` when it is gone. `event` is None when the
    object was fetched from Stripe.
    """

    kind: Literal["subscription", "invoice"]
    id: str
    customer: str
    old: str | None
    new: str | None
    event: str | None


@dataclass
class Applied:
    """What was written.

    The events whose change is in a row now, the one of them for each customer that its access follows from (see
    `_note_written`), and the statuses that changed; and the events about an object whose id another account has
    already, of which nothing was written.
    """

    events: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    customers: dict[str, str] = field(default_factory=dict)
    transitions: list[Transition] = field(default_factory=list)


async def apply_changes(connection: db.Connection, changes: Sequence[AnyChange]) -> Applied:
    """Write the changes that win over what the mirror holds.

    The caller has locked their customers (`accounts_of`), decides these customers' access, and commits. A change that
    loses leaves nothing but its payment failure, its period boundaries and stubs of what it links to: these are true
    whatever came later.
    """
    applied = Applied()
    folded: dict[type[AnyChange], list[AnyChange]] = {kind: [] for kind in TABLES}
    for change in fold(changes):
        folded[type(change)].append(change)
    stubs = _price_stubs(changes, known={change.id for change in folded[PriceChange]})
    kinds = tuple(kind for kind in TABLES if folded[kind] or (kind is PriceChange and stubs))
    if not kinds:
        return applied
    parameters = {TABLES[kind][0]: _rows(folded[kind] + (stubs if kind is PriceChange else [])) for kind in kinds}
    parameters |= _children(folded[SubscriptionChange], changes)
    written: dict[str, dict[str, Row[Any]]] = {TABLES[kind][0]: {} for kind in kinds}
    for row in await connection.execute(write_statement(kinds), parameters):
        written[row.of][row.id] = row
    done: list[AnyChange] = []
    for kind in kinds:
        table = TABLES[kind][0]
        winners = [change for change in folded[kind] if change.id in written[table]]
        losers = [change for change in folded[kind] if change.id not in written[table]]
        applied.transitions += _transitions(winners, written[table])
        if losers:
            ids = [change.id for change in losers]
            await connection.execute(NOTE_TIES[kind], {"ids": ids, "rows": _rows(losers)})
        applied.foreign |= await _find_foreign(connection, kind, changes)
        if kind is EntitlementsChange:
            await _write_entitlements(connection, winners)
        if kind is InvoiceChange:
            own = [change for change in losers if change.mark.event not in applied.foreign]
            failures = written[table].keys() | await _merge_payment_failures(connection, own)
            done += _tellers_of_failures(changes, folded[kind], failures)
        done += winners
    _note_written(applied, done)
    return applied


def accounts_of(changes: Iterable[AnyChange]) -> dict[str, str]:
    """The customers that changes are about, each with the account that it belongs to."""
    return {customer: change.account for change in changes for customer in _customers_of(change)}


async def lock_customers(connection: db.Connection, customers: Iterable[str] | Mapping[str, str]) -> None:
    """Lock the customers' rows until the transaction ends, in one order for everybody; unknown ones become stubs.

    A mapping gives the customers' accounts too; without one they belong to the own account.
    """
    accounts = customers if isinstance(customers, Mapping) else dict.fromkeys(customers, "")
    if accounts:
        await connection.execute(LOCK_CUSTOMERS, {"customers": rows_to_lock(accounts)})


def rows_to_lock(accounts: Mapping[str, str]) -> str:
    """The parameter of `LOCK_CUSTOMERS`, for a statement that it is a part of."""
    return _dump({"id": customer, "account": account} for customer, account in accounts.items())


async def overwrite(connection: AsyncConnection, change: AnyChange, version: str) -> Applied | None:
    """Write a fetched object over its row, whatever the marks; None when it was not written.

    It is written only over the `version` of the row (its xmin) that was read before the fetch, so that a slow fetch
    never undoes what came meanwhile. The row keeps the mark of its last event. The caller has locked the customer.
    """
    kind = type(change)
    parameters = {TABLES[kind][0]: _rows([change]), "version": version}
    if isinstance(change, SubscriptionChange):
        parameters["prices"] = _rows(_price_stubs([change], known=set()))
    parameters |= _children([change], [change])
    result = await connection.execute(OVERWRITE[kind], parameters)
    written = {row.id: row for row in result if row.of == TABLES[kind][0]}
    if isinstance(change, EntitlementsChange) and written:
        await _write_entitlements(connection, [change])
    return Applied(transitions=_transitions([change], written)) if written else None


async def entomb(connection: AsyncConnection, kind: type[AnyChange], object_id: str, version: str) -> Applied | None:
    """Mark a row as deleted because Stripe no longer has the object; None when it is not the `version` (see above)."""
    row = (await connection.execute(ENTOMB[kind], {"id": object_id, "version": version})).one_or_none()
    if row is None:
        return None
    name = _status_kind(kind)
    return Applied(transitions=[Transition(name, row.id, row.customer, row.old, "deleted", None)] if name else [])


def _transitions(written: Iterable[AnyChange], rows: Mapping[str, Row[Any]]) -> list[Transition]:
    transitions = []
    for change in sorted(written, key=lambda change: change.id):
        row, name = rows[change.id], _status_kind(type(change))
        if name and isinstance(change, SubscriptionChange | InvoiceChange) and row.old != row.new:
            transitions.append(Transition(name, row.id, change.customer, row.old, row.new, change.mark.event or None))
    return transitions


def _status_kind(kind: type[AnyChange]) -> Literal["subscription", "invoice"] | None:
    return "subscription" if kind is SubscriptionChange else "invoice" if kind is InvoiceChange else None


async def _find_foreign(connection: db.Connection, kind: type[AnyChange], changes: Iterable[AnyChange]) -> set[str]:
    """The events of connected accounts that are about a row of another account."""
    connected = [change for change in changes if type(change) is kind and change.account]
    if not connected:
        return set()  # as in every installation without Connect: nothing beats the own account
    found = await connection.execute(FIND_ACCOUNTS[kind], {"ids": sorted({change.id for change in connected})})
    owners: dict[str, str] = {row.id: row.account for row in found}
    return {change.mark.event for change in connected if owners.get(change.id) != change.account}


def fold(changes: Sequence[AnyChange]) -> list[AnyChange]:
    """The greatest change of each object, with the payment failures of all; to be fetched if it won by a tie."""
    folded: dict[tuple[type[AnyChange], str], AnyChange] = {}
    for change in sorted(changes, key=lambda change: change.mark.order):
        key = (type(change), change.id)
        beaten = folded.get(key)
        if beaten is None or change.account < beaten.account:
            folded[key] = change
            continue
        if change.account > beaten.account:
            continue
        winner = change
        if winner.mark.ties_with(beaten.mark):
            winner = replace(winner, needs_refresh=True)
        if isinstance(winner, InvoiceChange) and isinstance(beaten, InvoiceChange):
            winner = replace(
                winner,
                payment_failed_at=max(_known(winner.payment_failed_at, beaten.payment_failed_at), default=None),
                payment_failing_since=min(
                    _known(winner.payment_failing_since, beaten.payment_failing_since), default=None
                ),
            )
        folded[key] = winner
    return list(folded.values())


def _known(*instants: datetime | None) -> list[datetime]:
    return [at for at in instants if at is not None]


def _customers_of(change: AnyChange) -> tuple[str, ...]:
    match change:
        case CustomerChange():
            return (change.id,)
        case EntitlementsChange():
            return (change.id,)
        case SubscriptionChange() | InvoiceChange() | CheckoutSessionChange():
            return (change.customer,)
        case _:
            return ()


def _price_stubs(changes: Iterable[AnyChange], *, known: set[str]) -> list[AnyChange]:
    """Prices as embedded in items, but for those of which more is `known`; the mirror keeps what it has already."""
    embedded = {
        price.id: price for change in changes if isinstance(change, SubscriptionChange) for price in change.prices
    }
    return [price for price in embedded.values() if price.id not in known]


def _children(folded: Iterable[AnyChange], changes: Iterable[AnyChange]) -> dict[str, Any]:
    """The parameters of what belongs to subscriptions and invoices (`write_statement`).

    Every instant at which a period begins or ends, and the period of each item, are told of late and stale events too:
    each was one once, and usage may still be on its way to that period's invoice. A boundary too many cuts an hour of
    usage in two, which changes no sum; one too few may put usage on the wrong invoice.
    """
    subscriptions = [change for change in folded if isinstance(change, SubscriptionChange)]
    items = {
        item.id: {
            "id": item.id,
            "subscription": change.id,
            "price": item.price,
            "current_period_start": item.current_period_start,
            "current_period_end": item.current_period_end,
        }
        for change in subscriptions
        for item in change.items
    }
    boundaries = {(customer, at) for change in changes for customer, at in _boundaries_of(change) if at is not None}
    return {
        "items": _dump(items.values()),
        "complete": [change.id for change in subscriptions if change.complete],
        "periods": _dump(_periods_of(changes)),
        "boundaries": _dump({"customer": customer, "at": at} for customer, at in boundaries),
    }


async def _write_entitlements(connection: db.Connection, winners: Iterable[AnyChange]) -> None:
    """Write the features of the customers whose summaries were written, and take away those that are not listed."""
    written = [change for change in winners if isinstance(change, EntitlementsChange)]
    rows = {
        entitlement.id: {
            "id": entitlement.id,
            "customer": change.id,
            "feature": entitlement.feature,
            "lookup_key": entitlement.lookup_key,
        }
        for change in written
        for entitlement in change.entitlements
    }
    if rows:
        await connection.execute(WRITE_ENTITLEMENTS, {"rows": _dump(rows.values())})
    complete = sorted(change.id for change in written if change.complete)
    if complete:
        await connection.execute(DELETE_OTHER_ENTITLEMENTS, {"customers": complete, "listed": sorted(rows)})


async def _merge_payment_failures(connection: db.Connection, invoices: Iterable[AnyChange]) -> set[str]:
    rows: list[dict[str, Any]] = [
        {
            "id": change.id,
            "payment_failed_at": change.payment_failed_at,
            "payment_failing_since": change.payment_failing_since,
        }
        for change in invoices
        if isinstance(change, InvoiceChange) and change.payment_failed_at is not None
    ]
    if not rows:
        return set()
    parameters = {"ids": [row["id"] for row in rows], "rows": _dump(rows)}
    return set((await connection.execute(MERGE_PAYMENT_FAILURES, parameters)).scalars())


def _periods_of(changes: Iterable[AnyChange]) -> list[dict[str, Any]]:
    ends: dict[tuple[str, str, datetime, str, str], datetime] = {}
    subscriptions = [change for change in changes if isinstance(change, SubscriptionChange)]
    for change in subscriptions:
        for item in change.items:
            start, end = item.current_period_start, item.current_period_end
            if item.price is not None and start is not None and end is not None and start < end:
                key = (item.id, item.price, start, change.id, change.customer)
                ends[key] = max(end, ends.get(key, end))
    names = ("item", "price", "period_start", "subscription", "customer")
    return [dict(zip(names, key, strict=True)) | {"period_end": end} for key, end in ends.items()]


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
    """Note the events that changed something, and of each customer's the last that access can follow from.

    Access follows from subscriptions, invoices and a customer's deletion. Any other event is named only where there is
    none of these: when access was never decided before, or by other rules.
    """
    for change in sorted(changes, key=lambda change: (_moves_access(change), change.mark.created, change.mark.order)):
        if change.mark.event:
            applied.events.add(change.mark.event)
            for customer in _customers_of(change):
                applied.customers[customer] = change.mark.event


def _moves_access(change: AnyChange) -> bool:
    match change:
        case SubscriptionChange() | InvoiceChange():
            return True
        case CustomerChange():
            return change.mark.deleted
        case _:
            return False


def _tellers_of_failures(
    changes: Iterable[AnyChange], folded: Iterable[AnyChange], written: set[str]
) -> list[InvoiceChange]:
    """Those that told of a payment failure that is in a row now, though the rest of them may have lost."""
    told = {
        change.id: (change.payment_failed_at, change.payment_failing_since)
        for change in folded
        if isinstance(change, InvoiceChange)
    }
    return [
        change
        for change in changes
        if isinstance(change, InvoiceChange)
        and change.id in written
        and change.payment_failed_at is not None
        and change.payment_failed_at in told[change.id]
    ]


def _rows(changes: Iterable[AnyChange]) -> str:
    return _dump(
        {name: getattr(change, name) for name in ("id", *TABLES[type(change)][1], "needs_refresh", "account")}
        | {
            "deleted": change.mark.deleted,
            "mark_created": change.mark.created if change.mark.created != NEVER else "-infinity",
            "mark_rank": change.mark.rank,
            "mark_event": change.mark.event,
        }
        for change in changes
    )


def _dump(rows: Iterable[Mapping[str, object]]) -> str:
    return msgspec.json.encode(list(rows)).decode()
