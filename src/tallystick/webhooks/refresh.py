"""Refresh: fetch the objects that events left in doubt, and write them over what the mirror has.

A row needs it when it is a stub, known only from a link to it; when two events of one second told different things; or
when an event showed only some of a subscription's items.

    1. claim    in one transaction: take some rows, with their versions, and keep other workers off them for a minute
    2. fetch    with no transaction open
    3. write    in one transaction, if the row is still the version that was claimed: whatever has come meanwhile is
                newer than the fetch, or is fetched again

Died between 1 and 3, or Stripe failed: the claim runs out and the row is tried again, once a minute at most.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import text

from tallystick import db
from tallystick.access.state import recompute_access
from tallystick.mirror.apply import entomb, lock_customers, overwrite
from tallystick.mirror.changes import (
    AnyChange,
    CustomerChange,
    InvoiceChange,
    PriceChange,
    ProductChange,
    SubscriptionChange,
)
from tallystick.mirror.marks import CREATED, FINAL, NEVER, Mark
from tallystick.resources import Resources
from tallystick.stripe_gateway import STRIPE_ERRORS
from tallystick.webhooks.translate import is_final, translate_object

log = structlog.get_logger()

# A run every two seconds makes this 20 rows a second at most, a fifth of what Stripe allows an account.
ROWS_PER_RUN = 40
FETCHES_AT_ONCE = 5
# Longer than a fetch can take, so that a claim holds until its fetch is over; also the pause after a failure.
CLAIM_FOR = timedelta(minutes=1)

# Customers first: they carry the references by which everything else is asked for.
KINDS: Mapping[str, tuple[str, str, type[AnyChange]]] = {
    "customer": ("customers", "id", CustomerChange),
    "subscription": ("subscriptions", "customer", SubscriptionChange),
    "invoice": ("invoices", "customer", InvoiceChange),
    "price": ("prices", "NULL", PriceChange),
    "product": ("products", "NULL", ProductChange),
}

CLAIM = {
    kind: text(f"""
        UPDATE {table} SET refresh_after = :claimed_until
         WHERE id IN (SELECT id FROM {table} WHERE needs_refresh AND refresh_after <= :now
                       ORDER BY refresh_after, id LIMIT :limit FOR UPDATE SKIP LOCKED)
        RETURNING id, CAST({customer} AS text) AS customer, CAST(xmin AS text) AS version
    """)  # noqa: S608  names from the table above
    for kind, (table, customer, _) in KINDS.items()
}


@dataclass(frozen=True)
class Claim:
    """A row to be fetched: the object's id, its customer where it has one, and the row's version."""

    kind: str
    id: str
    customer: str | None
    version: str


async def refresh_mirror(resources: Resources, now: datetime) -> int:
    """Fetch up to `ROWS_PER_RUN` objects that need it; how many rows were settled. One row's failure stops no other."""
    claims = await _claim(resources, now)
    gate = asyncio.Semaphore(FETCHES_AT_ONCE)

    async def refresh(claim: Claim) -> bool:
        async with gate:
            try:
                return await _refresh(resources, claim, now)
            except Exception as error:  # noqa: BLE001  the row's edge: it is tried again when its claim has run out
                log.warning("refresh_failed", kind=claim.kind, id=claim.id, error=type(error).__name__)
                return False

    return sum(await asyncio.gather(*(refresh(claim) for claim in claims)))


async def _claim(resources: Resources, now: datetime) -> list[Claim]:
    claims: list[Claim] = []
    async with db.transaction(resources.engine) as connection:
        for kind, statement in CLAIM.items():
            limit = ROWS_PER_RUN - len(claims)
            if limit > 0:
                rows = await connection.execute(
                    statement, {"now": now, "claimed_until": now + CLAIM_FOR, "limit": limit}
                )
                claims += [Claim(kind, *row) for row in rows]
    return claims


async def _refresh(resources: Resources, claim: Claim, now: datetime) -> bool:
    payload = await _fetch(resources, claim)
    change_class = KINDS[claim.kind][2]
    if payload is None:
        change = None
    else:
        # Only whether it is final counts of this mark: the row keeps its own.
        mark = Mark(deleted=False, created=NEVER, rank=FINAL if is_final(claim.kind, payload) else CREATED, event="")
        translation = translate_object(claim.kind, payload, mark, resources.settings.customer_reference_key)
        if translation.change is None:
            raise ValueError(translation.unusable)
        change = translation.change
    async with db.transaction(resources.engine) as connection:
        if claim.customer is not None:
            await lock_customers(connection, [claim.customer])
        if change is None:
            written = await entomb(connection, change_class, claim.id, claim.version)
        else:
            written = await overwrite(connection, change, claim.version)
        if written and claim.customer is not None:
            await recompute_access(connection, {claim.customer: None}, now)
    log.info("refreshed", kind=claim.kind, id=claim.id, written=written, deleted=change is None)
    return written


async def _fetch(resources: Resources, claim: Claim) -> Mapping[str, Any] | None:
    """The object as Stripe has it now, with all of a subscription's items, or None when it has been deleted."""
    services = resources.stripe.v1
    retrieve: Mapping[str, Callable[[str], Awaitable[Any]]] = {
        "customer": services.customers.retrieve_async,
        "subscription": services.subscriptions.retrieve_async,
        "invoice": services.invoices.retrieve_async,
        "price": services.prices.retrieve_async,
        "product": services.products.retrieve_async,
    }
    try:
        fetched = await retrieve[claim.kind](claim.id)
    except STRIPE_ERRORS as error:
        if error.http_status == 404:
            return None
        raise
    payload: dict[str, Any] = fetched.to_dict(for_json=True)
    if payload.get("deleted") is True:
        return None
    if claim.kind == "subscription" and payload.get("items", {}).get("has_more"):
        # A subscription shows its first ten items and may have twenty, so this is one page.
        items = await services.subscription_items.list_async({"subscription": claim.id, "limit": 100})
        payload["items"] = items.to_dict(for_json=True)
    return payload
