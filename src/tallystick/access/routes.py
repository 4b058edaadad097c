"""Customers by the product's own references: their access, and which Stripe customer a reference means."""

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tallystick import db
from tallystick.access.policy import Access
from tallystick.access.state import recompute_access
from tallystick.auth import bearer, require_scope
from tallystick.errors import InvalidRequest, NotFound
from tallystick.mirror.apply import lock_customers
from tallystick.resources import Resources

router = APIRouter(dependencies=[bearer], tags=["customers"])

# No control characters: PostgreSQL refuses NUL, and nobody means the others.
PLAIN_TEXT = r"^[^\x00-\x1f\x7f]+$"
Reference = Annotated[
    str,
    Path(
        min_length=1,
        max_length=100,
        pattern=PLAIN_TEXT,
        description="The product's own reference, or a `cus_…` id.",
        examples=["acme"],
    ),
]

UNKNOWN_CUSTOMER: dict[int | str, dict[str, Any]] = {404: {"description": "No Stripe customer is known by this name"}}

FIND_ACCESS = text("""
    SELECT a.customer, a.access, a.reason, a.since, a.decided_by, a.prices
      FROM customer_references r JOIN customer_access a ON a.customer = r.customer
     WHERE r.ref = :ref
""")

FIND_CUSTOMER = text("SELECT customer FROM customer_references WHERE ref = :ref")

LINK = text("""
    INSERT INTO customer_links AS t (ref, customer) VALUES (:ref, :customer)
    ON CONFLICT (ref) DO UPDATE SET customer = excluded.customer, linked_at = now()
     WHERE t.customer <> excluded.customer
""")


class CustomerAccess(BaseModel):
    """What a customer may use, as Stripe's word was last heard."""

    customer: str
    ref: str = Field(description="The name that was asked for.")
    access: Access
    reason: str = Field(description="Why; docs/access.md lists the reasons.")
    since: datetime = Field(description="Since when the access is what it is, UTC.")
    decided_by: str | None = Field(description="The event that led to this, if it was one.")
    prices: list[str] = Field(description="The prices of the subscriptions that give access.")


class LinkRequest(BaseModel):
    """Which Stripe customer the reference shall mean."""

    model_config = ConfigDict(extra="forbid")

    customer: str = Field(pattern=r"^cus_[A-Za-z0-9_]{1,250}$", description="The `cus_…` id.")


class CustomerLink(BaseModel):
    """A reference and the Stripe customer that it means."""

    ref: str
    customer: str


@router.get(
    "/v1/customers/{ref}/access",
    dependencies=[Depends(require_scope("access:read"))],
    responses={304: {"description": "It is still what the ETag says"}, **UNKNOWN_CUSTOMER},
    response_model=CustomerAccess,
)
async def get_access(request: Request, ref: Reference) -> Response:
    """Whether a customer may use the product, from one indexed row. Needs the scope `access:read`.

    The answer has a strong `ETag`; with it in `If-None-Match` the answer is 304 while nothing has changed (RFC 9110).
    """
    async with db.transaction(_engine(request)) as connection:
        row = (await connection.execute(FIND_ACCESS, {"ref": ref})).first()
    if row is None:
        raise _unknown(ref)
    body = CustomerAccess(
        customer=row.customer,
        ref=ref,
        access=row.access,
        reason=row.reason,
        since=row.since,
        decided_by=row.decided_by,
        prices=row.prices,
    ).model_dump_json()
    etag = f'"{hashlib.sha256(body.encode()).hexdigest()[:32]}"'
    # Caches may keep it for this caller, and must ask whether it still holds.
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}
    if _is_known(etag, request.headers.getlist("if-none-match")):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


@router.get("/v1/customers/{ref}", dependencies=[Depends(require_scope("access:read"))], responses=UNKNOWN_CUSTOMER)
async def get_customer(request: Request, ref: Reference) -> CustomerLink:
    """The Stripe customer that a reference means. Needs the scope `access:read`."""
    async with db.transaction(_engine(request)) as connection:
        customer = await connection.scalar(FIND_CUSTOMER, {"ref": ref})
    if customer is None:
        raise _unknown(ref)
    return CustomerLink(ref=ref, customer=customer)


@router.put("/v1/customers/{ref}", dependencies=[Depends(require_scope("customers:write"))])
async def link_customer(request: Request, ref: Reference, body: LinkRequest) -> CustomerLink:
    """Let a reference mean this Stripe customer from now on, whatever it meant before. Safe to repeat.

    It wins over a reference in a customer's metadata. A customer that was never heard of is fetched from Stripe soon.
    422 when the reference looks like a Stripe id: such a name means itself only. Needs the scope `customers:write`.
    """
    if ref.startswith("cus_"):
        raise InvalidRequest("A reference may not begin with cus_.", field="ref")
    async with db.transaction(_engine(request)) as connection:
        await _link(connection, ref, body.customer)
    return CustomerLink(ref=ref, customer=body.customer)


async def _link(connection: AsyncConnection, ref: str, customer: str) -> None:
    await lock_customers(connection, [customer])
    await connection.execute(LINK, {"ref": ref, "customer": customer})
    # A customer that was unknown until now has no access yet, not even the access "none".
    await recompute_access(connection, {customer: None}, datetime.now(UTC))


def _engine(request: Request) -> AsyncEngine:
    resources: Resources = request.app.state.resources
    return resources.engine


def _is_known(etag: str, if_none_match: list[str]) -> bool:
    # RFC 9110, 13.1.2: a list of tags, compared weakly, or * for any.
    tags = [tag.strip().removeprefix("W/") for header in if_none_match for tag in header.split(",")]
    return etag in tags or "*" in tags


def _unknown(ref: str) -> NotFound:
    return NotFound(f"No Stripe customer is known as {ref!a}.", type="unknown-customer")
