"""Sync: fill the mirror from Stripe's API, list by list.

What a listed object says is applied as if it were an event: one that was created when the list was read, and that tells
the object's state. So it needs a mark. The mark's time must not be later than the reading, or it would beat an event
that happened after it; and it must be on Stripe's clock, with which events are marked. Both hold for the time of the
newest event that Stripe has *before* the first list is read:

- an event that was created before that time is in what the lists say, however late its webhook comes: stale;
- an event that was created after it, and one that came while a list was being read, has the greater mark: it wins;
- an event of the same second may be either: by its rank it ties with the mark, wins, and has the object fetched again.

A minute is taken off that time, in case a list is read from a copy of Stripe's database that is a little behind: within
that minute the events themselves have the last word. A row that an event wrote since then stays as it is.

Each page is one transaction, with the cursor behind it: what a crash interrupts goes on there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.access.state import recompute_access
from tallystick.access.timeline import lines_of, write_timeline
from tallystick.mirror.apply import accounts_of, apply_changes, lock_customers
from tallystick.mirror.marks import CREATED, FINAL, NEVER, UPDATED, Mark
from tallystick.resources import Resources
from tallystick.stripe_gateway import STRIPE_ERRORS, is_missing
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.refresh import KINDS, SUMMARY_PATH
from tallystick.webhooks.translate import SUMMARY, Translation, is_final, translate_object

log = structlog.get_logger()

# The open invoices and those of a quarter are what access and the last bills depend on.
RECENT_INVOICES = timedelta(days=95)
# An interrupted sync that is older begins anew: what changed since would have to be recovered from many events.
RESUMED_WITHIN = timedelta(days=1)
READ_MAY_BE_BEHIND = timedelta(minutes=1)
# Read one by one, in about a second.
CUSTOMERS_PER_PAGE = 20

FIND_UNFINISHED = text("""
    SELECT started_at FROM mirror_sync
     WHERE finished_at IS NULL AND all_invoices = :all_invoices AND started_at > :oldest
""")

BEGIN = text("""
    INSERT INTO mirror_sync (all_invoices, started_at) VALUES (:all_invoices, :now)
    ON CONFLICT (only_row) DO UPDATE SET
        all_invoices = excluded.all_invoices, started_at = excluded.started_at, finished_at = NULL
""")

FORGET_LISTS = text("DELETE FROM mirror_sync_lists")

READ_LISTS = text("SELECT name, cursor, objects, finished_at IS NOT NULL AS finished FROM mirror_sync_lists")

SAVE_LIST = text("""
    INSERT INTO mirror_sync_lists AS l (name, cursor, objects, finished_at)
    VALUES (:name, :cursor, :objects, :finished_at)
    ON CONFLICT (name) DO UPDATE SET
        cursor = excluded.cursor, objects = l.objects + excluded.objects, finished_at = excluded.finished_at
""")

# Whoever may be entitled to something, or be charged.
FIND_SUBSCRIBERS = text("""
    SELECT DISTINCT customer FROM subscriptions
     WHERE NOT deleted AND account = '' AND status NOT IN ('canceled', 'incomplete_expired') AND customer > :after
     ORDER BY customer LIMIT :limit
""")

FINISH = text("UPDATE mirror_sync SET finished_at = :now")

# What was missed before the sync began is in what it has read.
CLOSE_GAP = text("UPDATE event_recovery SET gap_from = NULL, gap_until = NULL WHERE gap_until <= :started_at")


@dataclass(frozen=True)
class ListToRead:
    """One of Stripe's lists: a name for people, the kind of its objects, and what narrows it.

    `per_customer`: Stripe has one such list for each customer.
    """

    name: str
    kind: str
    params: Mapping[str, object]
    per_customer: bool = False


@dataclass(frozen=True)
class Synced:
    """How many objects of each list were read, in this run and in those that it went on from."""

    objects: Mapping[str, int]
    resumed: bool

    def as_json(self) -> dict[str, object]:
        return {"objects": dict(self.objects), "resumed": self.resumed}


async def sync_mirror(
    resources: Resources,
    now: datetime,
    *,
    all_invoices: bool = False,
    restart: bool = False,
    report: Callable[[str, int], None] | None = None,
) -> Synced:
    """Read all that is mirrored from Stripe and apply it; go on with an interrupted run unless `restart`.

    `report(list, objects)` is called after each page. Safe beside webhooks and beside another sync. Raises Stripe's
    and SQLAlchemy's errors; then the next run goes on after the last page.
    """
    reader = Reader(resources)
    # Read before everything else: see above. And a run that Stripe refuses at once was not begun.
    known_until = await read_known_until(reader)
    started_at, resumed = await _resume_or_begin(resources, now, all_invoices=all_invoices, restart=restart)
    done: dict[str, int] = {}
    async with db.transaction(resources.engine) as connection:
        progress = {row.name: row for row in await connection.execute(READ_LISTS)}
    for wanted in lists_to_read(now, all_invoices=all_invoices):
        before = progress.get(wanted.name)
        done[wanted.name] = before.objects if before is not None else 0
        if before is not None and before.finished:
            continue
        cursor, more = before.cursor if before is not None else None, True
        while more:
            payloads, cursor = await _read_page(reader, wanted, cursor)
            more = cursor is not None
            saved = {
                "name": wanted.name,
                "cursor": cursor,
                "objects": len(payloads),
                "finished_at": None if more else now,
            }
            async with db.transaction(resources.engine) as connection:
                await apply_listed(connection, resources, wanted.kind, payloads, known_until, now)
                await connection.execute(SAVE_LIST, saved)
            # Died here: the next run goes on after this page.
            done[wanted.name] += len(payloads)
            if report is not None:
                report(wanted.name, done[wanted.name])
    async with db.transaction(resources.engine) as connection:
        await connection.execute(FINISH, {"now": now})
        await connection.execute(CLOSE_GAP, {"started_at": started_at})
    log.info("mirror_synced", **done)
    return Synced(done, resumed)


async def read_known_until(reader: Reader) -> datetime:
    """The time of the mark of all that is read from now on (see above)."""
    newest = await reader.newest_event()
    return newest - READ_MAY_BE_BEHIND if newest is not None else NEVER


def lists_to_read(now: datetime, *, all_invoices: bool) -> list[ListToRead]:
    """Stripe's lists that together are the mirror, what others link to first."""
    recent = int((now - RECENT_INVOICES).timestamp())
    return [
        ListToRead("meters", "billing.meter", {}),
        ListToRead("products", "product", {}),
        # Without `active` Stripe lists the active ones only.
        ListToRead("active prices", "price", {"active": True}),
        ListToRead("inactive prices", "price", {"active": False}),
        ListToRead("customers", "customer", {}),
        # Without `status` it leaves out the canceled ones.
        ListToRead("subscriptions", "subscription", {"status": "all"}),
        *(
            [ListToRead("invoices", "invoice", {})]
            if all_invoices
            else [
                ListToRead("open invoices", "invoice", {"status": "open"}),
                ListToRead("uncollectible invoices", "invoice", {"status": "uncollectible"}),
                ListToRead("recent invoices", "invoice", {"created": {"gte": recent}}),
            ]
        ),
        ListToRead("completed checkouts", "checkout.session", {"status": "complete"}),
        ListToRead("payment methods", "payment_method", {}, per_customer=True),
        ListToRead("entitlements", SUMMARY, {}, per_customer=True),
    ]


async def _read_page(reader: Reader, wanted: ListToRead, cursor: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """Some objects after the cursor, each whole, and the next cursor if there may be more."""
    if not wanted.per_customer:
        page, after = await reader.page(KINDS[wanted.kind].path, cursor, **wanted.params)
        return [await complete(reader, wanted.kind, payload) for payload in page], after
    if wanted.kind == SUMMARY and not (await reader.page("/v1/entitlements/features", None, limit=1))[0]:
        return [], None  # nobody can be entitled to anything
    async with db.transaction(reader.resources.engine) as connection:
        found = await connection.execute(FIND_SUBSCRIBERS, {"after": cursor or "", "limit": CUSTOMERS_PER_PAGE})
        customers = list(found.scalars())
    if wanted.kind == SUMMARY:
        payloads = [await read_entitlements(reader, customer) for customer in customers]
    else:
        payloads = [method for customer in customers for method in await read_payment_methods(reader, customer)]
    return payloads, customers[-1] if customers else None


async def fetch(reader: Reader, kind: str, object_id: str) -> dict[str, Any] | None:
    """One object as it is now, whole; None when it has been deleted."""
    if kind == SUMMARY:
        return await read_entitlements(reader, object_id)
    fetched = await reader.find(f"{KINDS[kind].path}/{quote(object_id, safe='')}")
    if fetched is None or fetched.get("deleted") is True:
        return None
    return await complete(reader, kind, fetched)


async def complete(reader: Reader, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
    """An object with all of a subscription's items: at first it shows ten, and may have twenty."""
    if kind != "subscription" or not payload["items"].get("has_more"):
        return payload
    items, _ = await reader.page("/v1/subscription_items", None, subscription=payload["id"])
    return payload | {"items": {"data": items, "has_more": False}}


async def read_payment_methods(reader: Reader, customer: str) -> list[dict[str, Any]]:
    """All payment methods that are attached to a customer; none if it is gone."""
    return await _read_of_customer(reader, "/v1/payment_methods", customer)


async def read_entitlements(reader: Reader, customer: str) -> dict[str, Any]:
    """All of a customer's entitlements, as the summary that Stripe would send if it did not stop after ten."""
    entitlements = await _read_of_customer(reader, SUMMARY_PATH, customer)
    return {"object": SUMMARY, "customer": customer, "entitlements": {"data": entitlements, "has_more": False}}


async def _read_of_customer(reader: Reader, path: str, customer: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    cursor, more = None, True
    while more:
        try:
            page, cursor = await reader.page(path, cursor, customer=customer)
        except STRIPE_ERRORS as error:
            if not is_missing(error, "customer"):
                raise
            return []
        entries += page
        more = cursor is not None
    return entries


async def apply_listed(
    connection: AsyncConnection,
    resources: Resources,
    kind: str,
    payloads: Sequence[Mapping[str, Any]],
    known_until: datetime,
    now: datetime,
) -> None:
    """Apply objects that were read from Stripe after all events up to `known_until` had happened (see above)."""
    changes = []
    for payload in payloads:
        said = read_object(kind, payload, known_until, resources.settings.customer_reference_key)
        if said.change is not None:
            changes.append(said.change)
        elif said.unusable is not None:
            log.error("object_not_understood", kind=kind, id=str(payload.get("id")))
    await lock_customers(connection, accounts_of(changes))
    applied = await apply_changes(connection, changes)
    # What was not known before has not changed: an empty mirror that is filled leaves no lines.
    await write_timeline(connection, [line for line in lines_of(applied) if line.old is not None], now)
    rules = resources.rules.current(now).access
    await recompute_access(connection, dict.fromkeys(accounts_of(changes)), rules, now)


def read_object(kind: str, payload: Mapping[str, Any], known_until: datetime | None, reference_key: str) -> Translation:
    """What an object that was read from Stripe says.

    Without `known_until` it has no place in the order of events: it is to be written over a row that keeps its mark.
    """
    rank = FINAL if is_final(kind, payload) else CREATED if known_until is None else UPDATED
    mark = Mark(deleted=False, created=known_until or NEVER, rank=rank, event="")
    return translate_object(kind, payload, mark, reference_key)


async def _resume_or_begin(
    resources: Resources, now: datetime, *, all_invoices: bool, restart: bool
) -> tuple[datetime, bool]:
    async with db.transaction(resources.engine) as connection:
        found = await connection.execute(
            FIND_UNFINISHED, {"all_invoices": all_invoices, "oldest": now - RESUMED_WITHIN}
        )
        started_at: datetime | None = found.scalar()
        if started_at is not None and not restart:
            return started_at, True
        await connection.execute(BEGIN, {"all_invoices": all_invoices, "now": now})
        await connection.execute(FORGET_LISTS)
        return now, False
