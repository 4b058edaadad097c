"""Drift: compare the mirror with Stripe's API, field by field, and repair what differs.

1. first look   Stripe's lists against the rows of the mirror, and the rows that were in no list: the suspects
2. pause        an object may just have changed at Stripe, with its webhook on the way
3. second look  each suspect alone: the row, the object, the row again. What still differs, while the row has stayed
                as it was, is drift
4. repair       if asked for: the object is written over that version of the row, as `refresh` does it, so that
                what has come meanwhile is left alone
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import structlog
from msgspec import structs
from sqlalchemy import text

from tallystick import db
from tallystick.access.state import recompute_access
from tallystick.access.timeline import lines_of, write_timeline
from tallystick.mirror.apply import accounts_of, entomb, lock_customers, overwrite
from tallystick.mirror.changes import AnyChange, Entitlement, EntitlementsChange, Item, SubscriptionChange
from tallystick.mirror.statements import TABLES
from tallystick.resources import Resources
from tallystick.webhooks.reading import PAGE_SIZE, Reader
from tallystick.webhooks.refresh import KINDS
from tallystick.webhooks.sync import (
    RECENT_INVOICES,
    apply_listed,
    complete,
    fetch,
    lists_to_read,
    read_known_until,
    read_object,
)
from tallystick.webhooks.translate import SUMMARY

log = structlog.get_logger()

# Webhooks come within a second or two.
PAUSE_SECONDS = 3.0
# A row that is written at each look is alive, and no drift.
LOOKS = 3

# Told by events alone: the invoice does not say when its payment failed.
NOT_AT_STRIPE = {"payment_failed_at", "payment_failing_since"}

COLUMNS = {kind: [name for name in TABLES[KINDS[kind].change][1] if name not in NOT_AT_STRIPE] for kind in KINDS}

READ_ROWS = {
    kind: text(f"""
        SELECT {", ".join(("id", "account", "deleted", "CAST(xmin AS text) AS version", *COLUMNS[kind]))}
          FROM {KINDS[kind].table} WHERE id = ANY(:ids)
    """)  # noqa: S608  names from the table of kinds
    for kind in KINDS
}

# What belongs to an object and has no row of its own among the kinds: the table, whose it is, and what is kept of it.
CHILDREN = {
    "subscription": ("subscription_items", "subscription", ("price", "current_period_start", "current_period_end")),
    SUMMARY: ("active_entitlements", "customer", ("feature", "lookup_key")),
}

READ_CHILDREN = {
    kind: text(f"""
        SELECT {owner} AS owner, id, {", ".join(columns)} FROM {table} WHERE {owner} = ANY(:ids) AND NOT deleted
    """)  # noqa: S608  names from the table above
    for kind, (table, owner, columns) in CHILDREN.items()
}

# Invoices are looked for as far back as they are listed.
FIND_IDS = {
    kind: text(f"""
        SELECT id FROM {KINDS[kind].table}
         WHERE NOT deleted AND account = ''
           {"AND (created >= :since OR status IN ('open', 'uncollectible'))" if kind == "invoice" else ""}
         ORDER BY random() LIMIT :limit
    """)  # noqa: S608  names from the table of kinds
    for kind in KINDS
}


@dataclass(frozen=True)
class Difference:
    """One field that differs. `object` is the field of an object that is missing on one side."""

    field: str
    here: object
    stripe: object


@dataclass(frozen=True)
class Drift:
    """An object that differs, and whether it was repaired."""

    kind: str
    id: str
    differences: tuple[Difference, ...]
    repaired: bool = False

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Checked:
    """How many objects of each kind were compared, and what was found."""

    objects: dict[str, int] = field(default_factory=dict)
    drift: list[Drift] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether the mirror now says what Stripe says."""
        return all(drift.repaired for drift in self.drift)

    def as_json(self) -> dict[str, object]:
        return {"objects": self.objects, "drift": [drift.as_json() for drift in self.drift]}


@dataclass(frozen=True)
class Mirrored:
    """A row of the mirror as it was read, with its children by their ids. `foreign`: it is a connected account's."""

    version: str
    deleted: bool
    foreign: bool
    fields: Mapping[str, object]
    children: Mapping[str, Mapping[str, object]]


async def check_mirror(
    resources: Resources,
    now: datetime,
    *,
    all_invoices: bool = False,
    sample: int | None = None,
    repair: bool = False,
    report: Callable[[str, int], None] | None = None,
) -> Checked:
    """Compare everything, or of each list its newest `sample` objects and as many rows picked by chance.

    `report(list, objects)` is called after each page. Raises Stripe's and SQLAlchemy's errors.
    """
    reader, checked = Reader(resources), Checked()
    seen: dict[str, set[str]] = {kind: set() for kind in KINDS}
    suspects: list[tuple[str, str]] = []
    for wanted in lists_to_read(now, all_invoices=all_invoices):
        if wanted.per_customer:
            continue  # the rows of these are looked up one by one
        cursor, more, listed = None, True, 0
        while more:
            size = PAGE_SIZE if sample is None else min(PAGE_SIZE, sample - listed)
            page, cursor = await reader.page(KINDS[wanted.kind].path, cursor, **{**wanted.params, "limit": size})
            payloads = {payload["id"]: await complete(reader, wanted.kind, payload) for payload in page}
            suspects += [(wanted.kind, id_) for id_ in await _suspects(resources, wanted.kind, payloads)]
            seen[wanted.kind] |= payloads.keys()
            listed += len(page)
            more = cursor is not None and (sample is None or listed < sample)
            if report is not None:
                report(wanted.name, listed)
    since = datetime.min.replace(tzinfo=UTC) if all_invoices else now - RECENT_INVOICES
    for kind in KINDS:
        unlisted = await _find_unlisted(resources, kind, seen[kind], sample, since)
        suspects += [(kind, id_) for id_ in unlisted]
        checked.objects[kind] = len(seen[kind]) + len(unlisted)
    if suspects:
        await asyncio.sleep(PAUSE_SECONDS)
    known_until = await read_known_until(reader)
    for position, (kind, id_) in enumerate(dict.fromkeys(suspects), start=1):
        drift = await _settle(reader, kind, id_, known_until if repair else None, now)
        if drift is not None:
            checked.drift.append(drift)
        if report is not None:
            report("second look", position)
    return checked


def differences(change: AnyChange | None, row: Mirrored | None) -> tuple[Difference, ...]:
    """What differs between an object, None when Stripe has none, and its row, None when the mirror has none."""
    if row is None:
        return () if change is None else (Difference("object", "missing", "present"),)
    if row.foreign:
        return ()
    if change is None:
        return () if row.deleted else (Difference("object", "present", "deleted"),)
    if row.deleted:
        return (Difference("object", "deleted", "present"),)
    found = [
        Difference(name, here, getattr(change, name))
        for name, here in row.fields.items()
        if here != getattr(change, name)
    ]
    at_stripe = {child.id: structs.asdict(child) for child in _children_of(change)}
    for id_ in sorted(at_stripe.keys() | row.children.keys()):
        found += _child_differences(id_, row.children.get(id_), at_stripe.get(id_))
    return tuple(found)


def _children_of(change: AnyChange) -> Sequence[Item | Entitlement]:
    match change:
        case SubscriptionChange():
            return change.items
        case EntitlementsChange():
            return change.entitlements
        case _:
            return ()


def _child_differences(
    id_: str, here: Mapping[str, object] | None, stripe: Mapping[str, object] | None
) -> Iterable[Difference]:
    if here is None:
        yield Difference(id_, "missing", "present")
    elif stripe is None:
        yield Difference(id_, "present", "missing")
    else:
        for name, value in here.items():
            if value != stripe[name]:
                yield Difference(f"{id_}.{name}", value, stripe[name])


# 1. First look


async def _suspects(resources: Resources, kind: str, payloads: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = await _read_rows(resources, kind, list(payloads))
    return [id_ for id_, payload in payloads.items() if differences(_change(resources, kind, payload), rows.get(id_))]


def _change(resources: Resources, kind: str, payload: Mapping[str, Any] | None) -> AnyChange | None:
    if payload is None:
        return None
    said = read_object(kind, payload, None, resources.settings.customer_reference_key)
    if said.unusable is not None:
        raise ValueError(f"Stripe's {kind} {payload.get('id')}: {said.unusable}")
    return said.change


async def _read_rows(resources: Resources, kind: str, ids: Sequence[str]) -> dict[str, Mirrored]:
    children: dict[str, dict[str, Mapping[str, object]]] = {id_: {} for id_ in ids}
    # One snapshot for both: an object and its children are written together, and read together.
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        rows = (await connection.execute(READ_ROWS[kind], {"ids": ids})).mappings().all()
        if kind in CHILDREN:
            for child in (await connection.execute(READ_CHILDREN[kind], {"ids": ids})).mappings():
                children[child["owner"]][child["id"]] = {name: child[name] for name in CHILDREN[kind][2]}
    return {
        row["id"]: Mirrored(
            row["version"],
            row["deleted"],
            foreign=row["account"] != "",
            fields={name: row[name] for name in COLUMNS[kind]},
            children=children[row["id"]],
        )
        for row in rows
    }


async def _find_unlisted(
    resources: Resources, kind: str, seen: set[str], sample: int | None, since: datetime
) -> list[str]:
    """The rows, all or some, that no list has shown: Stripe may not have these objects any more."""
    parameters = {"limit": sample} | ({"since": since} if kind == "invoice" else {})
    async with db.transaction(resources.engine) as connection:
        found = (await connection.execute(FIND_IDS[kind], parameters)).scalars()
    return [id_ for id_ in found if id_ not in seen]


# 3. Second look, and 4. repair


async def _settle(reader: Reader, kind: str, id_: str, known_until: datetime | None, now: datetime) -> Drift | None:
    """What differs, and is repaired if `known_until` is given; looked at again where something came in between."""
    drift = None
    for _ in range(LOOKS):
        drift = await _look_again(reader, kind, id_)
        if drift is None or known_until is None:
            return drift
        if await _repair(reader, kind, id_, known_until, now):
            return replace(drift, repaired=True)
    return drift


async def _look_again(reader: Reader, kind: str, id_: str) -> Drift | None:
    for _ in range(LOOKS):
        row, payload = await _look(reader, kind, id_)
        found = differences(_change(reader.resources, kind, payload), row)
        if not found:
            return None
        after = (await _read_rows(reader.resources, kind, [id_])).get(id_)
        if (after and after.version) == (row and row.version):
            return Drift(kind, id_, found)
    return None


async def _look(reader: Reader, kind: str, id_: str) -> tuple[Mirrored | None, Mapping[str, Any] | None]:
    """The row, and the object as it was afterwards."""
    row = (await _read_rows(reader.resources, kind, [id_])).get(id_)
    return row, await fetch(reader, kind, id_)


async def _repair(reader: Reader, kind: str, id_: str, known_until: datetime, now: datetime) -> bool:
    """Write what Stripe has now over the row, unless something else has been written to it meanwhile."""
    resources = reader.resources
    row, payload = await _look(reader, kind, id_)
    change = _change(resources, kind, payload)
    customers = list(accounts_of([change])) if change is not None else []
    # Whose it was, if that differs or Stripe has nothing left to say.
    owner = id_ if KINDS[kind].customer == "id" else row.fields.get("customer") if row is not None else None
    if isinstance(owner, str):
        customers.append(owner)
    async with db.transaction(resources.engine) as connection:
        await lock_customers(connection, customers)
        if row is None:
            if payload is None:
                return True
            await apply_listed(connection, resources, kind, [payload], known_until, now)
            return True
        if change is None:
            written = await entomb(connection, KINDS[kind].change, id_, row.version)
        else:
            written = await overwrite(connection, change, row.version)
        if written is not None:
            await write_timeline(connection, lines_of(written), now)
        rules = resources.rules.current(now).access
        await recompute_access(connection, dict.fromkeys(customers), rules, now)
    log.info("drift_repaired", kind=kind, id=id_, written=written is not None)
    return written is not None
