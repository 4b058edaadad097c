"""Apply changes to the mirror: set-based statements inside the caller's transaction, safe to repeat.

    1. fold       of several changes of one object only the greatest mark is written
    2. lock       the customers touched, in sorted order; unknown ones become stubs to be fetched. Two transactions that
                  touch different objects of one customer thereby decide its access one after the other.
    3. write      kind by kind, each row guarded by its mark, in the order of ids, so that no two transactions can wait
                  for each other
    4. children   the items of the subscriptions that were written, and of no others; entitlements likewise

No order between objects is assumed: an invoice may come before its customer and a subscription before its prices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

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
    ADD_BOUNDARIES,
    DELETE_OTHER_ENTITLEMENTS,
    ENTOMB,
    FIND_ACCOUNTS,
    FIND_PRICES,
    LOCK_CUSTOMERS,
    MERGE_PAYMENT_FAILURES,
    NOTE_TIES,
    OVERWRITE,
    TABLES,
    WRITE,
    WRITE_ENTITLEMENTS,
    WRITE_ITEMS,
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

    The events whose change is in a row now, the latest of them for each customer, and the statuses that changed;
    and the events about an object whose id another account has already, of which nothing was written.
    """

    events: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    customers: dict[str, str] = field(default_factory=dict)
    transitions: list[Transition] = field(default_factory=list)


async def apply_changes(connection: AsyncConnection, changes: Sequence[AnyChange]) -> Applied:
    """Write the changes that win over what the mirror holds. The caller decides the customers' access, and commits.

    A change that loses leaves nothing but its payment failure, its period boundaries and stubs of what it links to:
    these are true whatever came later.
    """
    folded = fold(changes)
    await lock_customers(
        connection, {customer: change.account for change in changes for customer in _customers_of(change)}
    )
    applied = Applied()
    for kind in TABLES:
        of_kind = [change for change in folded if type(change) is kind]
        if kind is PriceChange:
            of_kind += await _find_price_stubs(connection, changes, known={change.id for change in of_kind})
        if not of_kind:
            continue
        rows = _rows(of_kind)
        written_rows = (await connection.execute(WRITE[kind], {"rows": rows})).all()
        written = {row.id for row in written_rows}
        applied.transitions += _transitions(of_kind, written_rows)
        if len(written) < len(of_kind):
            await connection.execute(NOTE_TIES[kind], {"rows": rows})
        applied.foreign |= await _find_foreign(connection, kind, changes)
        await _write_children(connection, [change for change in of_kind if change.id in written])
        if kind is InvoiceChange:
            losers = [
                change for change in of_kind if change.id not in written and change.mark.event not in applied.foreign
            ]
            written_failures = written | await _merge_payment_failures(connection, losers)
            _note_payment_failures(applied, changes, of_kind, written_failures)
        _note_written(applied, [change for change in of_kind if change.id in written])
    await _add_boundaries(connection, changes)
    return applied


async def lock_customers(connection: AsyncConnection, customers: Iterable[str] | Mapping[str, str]) -> None:
    """Lock the customers' rows until the transaction ends, in one order for everybody; unknown ones become stubs.

    A mapping gives the customers' accounts too; without one they belong to the own account.
    """
    accounts = customers if isinstance(customers, Mapping) else dict.fromkeys(customers, "")
    rows = [{"id": customer, "account": accounts[customer]} for customer in sorted(accounts)]
    if rows:
        await connection.execute(LOCK_CUSTOMERS, {"rows": _dump(rows)})


async def overwrite(connection: AsyncConnection, change: AnyChange, version: str) -> Applied | None:
    """Write a fetched object over its row, whatever the marks; None when it was not written.

    It is written only over the `version` of the row (its xmin) that was read before the fetch, so that a slow fetch
    never undoes what came meanwhile. The row keeps the mark of its last event. The caller has locked the customer.
    """
    kind = type(change)
    if isinstance(change, SubscriptionChange):
        stubs = await _find_price_stubs(connection, [change], known=set())
        if stubs:
            await connection.execute(WRITE[PriceChange], {"rows": _rows(stubs)})
    written = (await connection.execute(OVERWRITE[kind], {"rows": _rows([change]), "version": version})).all()
    if written:
        await _write_children(connection, [change])
    await _add_boundaries(connection, [change])
    return Applied(transitions=_transitions([change], written)) if written else None


async def entomb(connection: AsyncConnection, kind: type[AnyChange], object_id: str, version: str) -> Applied | None:
    """Mark a row as deleted because Stripe no longer has the object; None when it is not the `version` (see above)."""
    row = (await connection.execute(ENTOMB[kind], {"id": object_id, "version": version})).one_or_none()
    if row is None:
        return None
    name = _status_kind(kind)
    return Applied(transitions=[Transition(name, row.id, row.customer, row.old, "deleted", None)] if name else [])


def _transitions(changes: Iterable[AnyChange], written: Iterable[Row[Any]]) -> list[Transition]:
    changed = {change.id: change for change in changes}
    transitions = []
    for row in sorted(written, key=lambda row: str(row.id)):
        change = changed[row.id]
        name = _status_kind(type(change))
        if name and isinstance(change, SubscriptionChange | InvoiceChange) and row.old != row.new:
            transitions.append(Transition(name, row.id, change.customer, row.old, row.new, change.mark.event or None))
    return transitions


def _status_kind(kind: type[AnyChange]) -> Literal["subscription", "invoice"] | None:
    return "subscription" if kind is SubscriptionChange else "invoice" if kind is InvoiceChange else None


async def _find_foreign(connection: AsyncConnection, kind: type[AnyChange], changes: Iterable[AnyChange]) -> set[str]:
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


async def _write_children(connection: AsyncConnection, written: Sequence[AnyChange]) -> None:
    """Write what belongs to the rows that were just written, and take away what no longer does."""
    await _write_items(connection, [change for change in written if isinstance(change, SubscriptionChange)])
    await _write_entitlements(connection, [change for change in written if isinstance(change, EntitlementsChange)])


async def _write_entitlements(connection: AsyncConnection, written: Sequence[EntitlementsChange]) -> None:
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


async def _write_items(connection: AsyncConnection, written: Sequence[SubscriptionChange]) -> None:
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
    complete = sorted(change.id for change in written if change.complete)
    if items or complete:
        parameters = {"rows": _dump(items.values()), "complete": complete, "listed": sorted(items)}
        await connection.execute(WRITE_ITEMS, parameters)


async def _merge_payment_failures(connection: AsyncConnection, invoices: Iterable[AnyChange]) -> set[str]:
    rows = [
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
    return set((await connection.execute(MERGE_PAYMENT_FAILURES, {"rows": _dump(rows)})).scalars())


async def _add_boundaries(connection: AsyncConnection, changes: Iterable[AnyChange]) -> None:
    """Every instant at which a period begins or ends, of late and stale events too: each was a boundary once.

    One too many cuts an hour of usage in two, which changes no sum; one too few may put usage on the wrong invoice.
    """
    boundaries = {(customer, at) for change in changes for customer, at in _boundaries_of(change) if at is not None}
    if boundaries:
        rows = [{"customer": customer, "at": at} for customer, at in sorted(boundaries)]
        await connection.execute(ADD_BOUNDARIES, {"rows": _dump(rows), "periods": _dump(_periods_of(changes))})


def _periods_of(changes: Iterable[AnyChange]) -> list[dict[str, Any]]:
    """The period of each item, of late and stale events too: usage may still be on its way to that period's invoice."""
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
    for change in sorted(changes, key=lambda change: change.mark.order):
        if change.mark.event:
            applied.events.add(change.mark.event)
            for customer in _customers_of(change):
                applied.customers[customer] = change.mark.event


def _note_payment_failures(
    applied: Applied, changes: Sequence[AnyChange], folded: Sequence[AnyChange], written: set[str]
) -> None:
    """An event that lost to a later one has still left the payment failure that it told of."""
    told = {
        change.id: (change.payment_failed_at, change.payment_failing_since)
        for change in folded
        if isinstance(change, InvoiceChange)
    }
    for change in changes:
        if (
            isinstance(change, InvoiceChange)
            and change.id in written
            and change.payment_failed_at is not None
            and change.payment_failed_at in told[change.id]
        ):
            applied.events.add(change.mark.event)
            applied.customers[change.customer] = change.mark.event


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
