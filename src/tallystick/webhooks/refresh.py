"""Refresh: fetch the objects that events left in doubt, and write them over what the mirror has.

A row needs it when it is a stub, known only from a link to it; when two events of one second told different things; or
when an event showed only some of a subscription's items, or of a customer's entitlements.

    1. claim    in one transaction: take some rows, with their versions, and keep other workers off them for a minute
    2. fetch    with no transaction open
    3. write    in one transaction, if the row is still the version that was claimed: whatever has come meanwhile is
                newer than the fetch, or is fetched again

Died between 1 and 3, or Stripe failed: the claim runs out and the row is tried again, once a minute at most.
"""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic
from typing import Any
from urllib.parse import quote

import structlog
from sqlalchemy import text

from tallystick import db
from tallystick.access.state import recompute_access
from tallystick.access.timeline import lines_of, write_timeline
from tallystick.config import Settings
from tallystick.loops import all_ended
from tallystick.mirror.apply import entomb, lock_customers, overwrite
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
from tallystick.mirror.marks import CREATED, FINAL, NEVER, Mark
from tallystick.resources import Resources
from tallystick.stripe_gateway import STRIPE_ERRORS, is_missing
from tallystick.webhooks.reading import PAGE_SIZE
from tallystick.webhooks.translate import SUMMARY, is_final, translate_object

log = structlog.get_logger()

# A run every two seconds makes this 20 rows a second at most, a fifth of what Stripe allows an account.
ROWS_PER_RUN = 40
FETCHES_AT_ONCE = 5
# The pause after a failure, and for how long other workers keep off, if a fetch cannot take longer (`_claim_for`).
CLAIM_FOR = timedelta(minutes=1)
# While Stripe is slow, most of a run's rows wait for their turn. Those that have waited for so long are left: their
# claims would end before their fetches, and another worker would fetch them too.
BEGIN_WITHIN = timedelta(seconds=30)

SUMMARY_PATH = "/v1/entitlements/active_entitlements"


@dataclass(frozen=True)
class Kind:
    """What is fetched, and from where. `customer`: the column that says whose it is."""

    table: str
    customer: str | None
    change: type[AnyChange]
    path: str


# What is left of a run goes to customers first: they carry the references by which everything else is asked for.
KINDS: Mapping[str, Kind] = {
    "customer": Kind("customers", "id", CustomerChange, "/v1/customers"),
    "subscription": Kind("subscriptions", "customer", SubscriptionChange, "/v1/subscriptions"),
    "invoice": Kind("invoices", "customer", InvoiceChange, "/v1/invoices"),
    SUMMARY: Kind("entitlement_summaries", "id", EntitlementsChange, SUMMARY_PATH),
    "checkout.session": Kind("checkout_sessions", "customer", CheckoutSessionChange, "/v1/checkout/sessions"),
    "payment_method": Kind("payment_methods", None, PaymentMethodChange, "/v1/payment_methods"),
    "billing.meter": Kind("meters", None, MeterChange, "/v1/billing/meters"),
    "price": Kind("prices", None, PriceChange, "/v1/prices"),
    "product": Kind("products", None, ProductChange, "/v1/products"),
}

# Of a run each kind has this many before any has more: of a kind that the key may not read, rows come back each minute
# and could fill all runs.
SHARE = ROWS_PER_RUN // len(KINDS)

# ARRAY: chosen once. Joined to a subquery, rows that are claimed make room for others whenever that is run again.
CLAIM = {
    kind: text(f"""
        UPDATE {of.table} SET refresh_after = :claimed_until
         WHERE id = ANY(ARRAY(SELECT id FROM {of.table} WHERE needs_refresh AND refresh_after <= :now
                               ORDER BY refresh_after, id LIMIT :limit FOR UPDATE SKIP LOCKED))
        RETURNING id, account, CAST({of.customer or "NULL"} AS text) AS customer, CAST(xmin AS text) AS version
    """)  # noqa: S608  names from the table above
    for kind, of in KINDS.items()
}


@dataclass(frozen=True)
class Claim:
    """A row to be fetched: the object's id, its account, its customer where it has one, and the row's version."""

    kind: str
    id: str
    account: str
    customer: str | None
    version: str


async def refresh_mirror(resources: Resources, now: datetime) -> int:
    """Fetch up to `ROWS_PER_RUN` objects that need it; how many rows were settled. One row's failure stops no other."""
    claims = await _claim(resources, now)
    gate = asyncio.Semaphore(FETCHES_AT_ONCE)
    begin_until = monotonic() + BEGIN_WITHIN.total_seconds()
    random.shuffle(claims)  # or those that are left would be the same ones each time

    async def refresh(claim: Claim) -> bool:
        async with gate:
            if monotonic() > begin_until:
                return False
            try:
                return await _refresh(resources, claim, now)
            except Exception as error:  # noqa: BLE001  the row's edge: it is tried again when its claim has run out
                log.warning("refresh_failed", kind=claim.kind, id=claim.id, error=type(error).__name__)
                return False

    return sum(await all_ended(refresh(claim) for claim in claims))


async def _claim(resources: Resources, now: datetime) -> list[Claim]:
    claims: list[Claim] = []
    kinds = list(CLAIM)
    claimed_until = now + _claim_for(resources.settings)
    async with db.transaction(resources.engine) as connection:
        for share in (SHARE, ROWS_PER_RUN):
            more = []
            for kind in kinds:
                limit = min(share, ROWS_PER_RUN - len(claims))
                if limit > 0:
                    values = {"now": now, "claimed_until": claimed_until, "limit": limit}
                    rows = (await connection.execute(CLAIM[kind], values)).all()
                    claims += [Claim(kind, *row) for row in rows]
                    if len(rows) == limit:
                        more.append(kind)
            kinds = more
    return claims


def _claim_for(settings: Settings) -> timedelta:
    """Longer than a row may wait for its turn, and the call to Stripe then take.

    The few fetches that take several calls, each of them slow, may outlast it. Then another worker fetches the row too,
    and of the two only the one with the row's latest version writes.
    """
    return max(CLAIM_FOR, BEGIN_WITHIN + timedelta(seconds=settings.stripe_timeout_seconds))


async def _refresh(resources: Resources, claim: Claim, now: datetime) -> bool:
    payload = await _fetch(resources, claim)
    change_class = KINDS[claim.kind].change
    if payload is None:
        change = None
    else:
        # Only whether it is final counts of this mark: the row keeps its own.
        mark = Mark(deleted=False, created=NEVER, rank=FINAL if is_final(claim.kind, payload) else CREATED, event="")
        reference_key = resources.settings.customer_reference_key
        translation = translate_object(claim.kind, payload, mark, reference_key, claim.account)
        if translation.change is None:
            raise ValueError(translation.unusable)
        change = translation.change
    async with db.transaction(resources.engine) as connection:
        if claim.customer is not None:
            await lock_customers(connection, {claim.customer: claim.account})
        if change is None:
            applied = await entomb(connection, change_class, claim.id, claim.version)
        else:
            applied = await overwrite(connection, change, claim.version)
        if applied is not None and claim.customer is not None:
            await write_timeline(connection, lines_of(applied), now)
            rules = resources.rules.current(now).access
            await recompute_access(connection, {claim.customer: None}, rules, now)
    log.info("refreshed", kind=claim.kind, id=claim.id, written=applied is not None, deleted=change is None)
    return applied is not None


async def _fetch(resources: Resources, claim: Claim) -> Mapping[str, Any] | None:
    """The object as Stripe has it now, with all that belongs to it, or None when it has been deleted."""
    if claim.kind == SUMMARY:
        return await _fetch_entitlements(resources, claim)
    try:
        payload = await _get(resources, claim, f"{KINDS[claim.kind].path}/{quote(claim.id, safe='')}")
    except STRIPE_ERRORS as error:
        if error.http_status == 404:
            return None
        raise
    if payload.get("deleted") is True:
        return None
    if claim.kind == "subscription" and payload["items"].get("has_more"):
        # A subscription shows its first ten items and may have twenty, so this is one page.
        items = await _get(resources, claim, "/v1/subscription_items", subscription=claim.id, limit=PAGE_SIZE)
        payload |= {"items": items}
    return payload


async def _fetch_entitlements(resources: Resources, claim: Claim) -> Mapping[str, Any]:
    """All of a customer's entitlements, as the summary that Stripe would send if it did not stop after ten."""
    entries: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    more = True
    while more:
        try:
            page = await _get(resources, claim, SUMMARY_PATH, customer=claim.id, limit=PAGE_SIZE, **after)
        except STRIPE_ERRORS as error:
            if not is_missing(error, "customer"):
                raise
            page = {"data": [], "has_more": False}  # a customer that is gone is entitled to nothing
        entries += page["data"]
        more = page["has_more"] and bool(page["data"])
        after = {"starting_after": entries[-1]["id"]} if more else {}
    return {"object": SUMMARY, "customer": claim.id, "entitlements": {"data": entries, "has_more": False}}


async def _get(resources: Resources, claim: Claim, path: str, **params: object) -> dict[str, Any]:
    """`GET path` on the account that has the object. Raises Stripe's errors."""
    of_account = {"stripe_account": claim.account} if claim.account else {}
    answer = await resources.stripe.raw_request_async("get", path, **params, **of_account)
    data: dict[str, Any] = answer.data
    return data
