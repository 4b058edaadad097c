"""Which Stripe customer a reference of the product means: asked, linked and unlinked."""

from datetime import UTC, datetime

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.access.names import MAY_MEAN
from tallystick.access.routes import FIND_CUSTOMER, UNKNOWN_CUSTOMER, Reference
from tallystick.access.state import recompute_access
from tallystick.access.timeline import Line, write_timeline
from tallystick.auth import bearer, require_scope
from tallystick.card_numbers import refuse_card_number
from tallystick.errors import InvalidRequest, UnknownCustomer
from tallystick.mirror.apply import lock_customers
from tallystick.resources import Resources

router = APIRouter(dependencies=[bearer], tags=["customers"])

# Two that move one reference at once go one after the other, so that the timeline tells what really was before.
LOCK_REFERENCE = text("SELECT pg_advisory_xact_lock(hashtextextended(:ref, 0))")

# Others may go by the name as well: a customer that was deleted keeps it until somebody takes it (access/names.py).
LINK = text("""
    WITH written AS (
        INSERT INTO customer_links AS t (ref, customer) VALUES (:ref, :customer)
        ON CONFLICT (ref) DO UPDATE SET customer = excluded.customer, linked_at = now()
         WHERE t.customer <> excluded.customer
        RETURNING ref
    )
    INSERT INTO changed_refs (ref) SELECT ref FROM written
""")

UNLINK = text("""
    WITH written AS (DELETE FROM customer_links WHERE ref = :ref RETURNING ref)
    INSERT INTO changed_refs (ref) SELECT ref FROM written
""")

FIND_CANDIDATES = text(MAY_MEAN.format(ref=":ref"))


class LinkRequest(BaseModel):
    """Which Stripe customer the reference shall mean."""

    model_config = ConfigDict(extra="forbid")

    customer: str = Field(pattern=r"^cus_[A-Za-z0-9_]{1,250}$", description="The `cus_…` id.")


class CustomerLink(BaseModel):
    """A reference and the Stripe customer that it means."""

    ref: str
    customer: str


class Unlinked(BaseModel):
    """A reference without a link, and the Stripe customer that it means all the same, by what Stripe has."""

    ref: str
    customer: str | None


@router.get("/v1/customers/{ref}", dependencies=[Depends(require_scope("access:read"))], responses=UNKNOWN_CUSTOMER)
async def get_customer(request: Request, ref: Reference) -> CustomerLink:
    """The Stripe customer that a reference means. Needs the scope `access:read`."""
    resources: Resources = request.app.state.resources
    async with db.transaction(resources.engine) as connection:
        customer = await connection.scalar(FIND_CUSTOMER, {"ref": ref})
    if customer is None:
        raise UnknownCustomer(ref)
    return CustomerLink(ref=ref, customer=customer)


@router.put("/v1/customers/{ref}", dependencies=[Depends(require_scope("customers:write"))])
async def link_customer(request: Request, ref: Reference, body: LinkRequest) -> CustomerLink:
    """Let a reference mean this Stripe customer from now on, whatever it meant before. Safe to repeat.

    It wins over a reference in a customer's metadata or a checkout. A customer that was never heard of is fetched from
    Stripe soon. Usage under the reference that was not sealed yet goes to this customer, too. 422 when the reference
    looks like a Stripe id, since such a name means itself only, or when the customer is a connected account's. Needs
    the scope `customers:write`.
    """
    _check(ref)
    refuse_card_number(ref, "ref")
    resources: Resources = request.app.state.resources
    await _change_meaning(resources, ref, LINK, body.customer)
    return CustomerLink(ref=ref, customer=body.customer)


@router.delete("/v1/customers/{ref}", dependencies=[Depends(require_scope("customers:write"))])
async def unlink_customer(request: Request, ref: Reference) -> Unlinked:
    """Take the link of a reference away. Safe to repeat.

    Then the reference means the customer whose metadata or checkout at Stripe has it, or nobody: `customer` says whom.
    422 when the reference looks like a Stripe id. Needs the scope `customers:write`.
    """
    _check(ref)
    resources: Resources = request.app.state.resources
    return Unlinked(ref=ref, customer=await _change_meaning(resources, ref, UNLINK, None))


class _Moved(Exception):
    """The reference came to mean, while we waited for locks, customers that we have not locked."""

    def __init__(self, customers: set[str]) -> None:
        super().__init__()
        self.customers = customers


async def _change_meaning(resources: Resources, ref: str, statement: TextClause, linked: str | None) -> str | None:
    """Link or unlink a reference, and tell both customers' timelines; whom it means now."""
    also: set[str] = {linked} if linked is not None else set()
    while True:
        try:
            async with db.transaction(resources.engine) as connection:
                return await _try_to_change(connection, resources, ref, statement, linked, also)
        except _Moved as moved:
            # Locked in a second step, they could be waited for by someone who has them and waits for ours.
            also |= moved.customers


async def _try_to_change(
    connection: AsyncConnection,
    resources: Resources,
    ref: str,
    statement: TextClause,
    linked: str | None,
    also: set[str],
) -> str | None:
    """Raises `_Moved` when the customers concerned are others than the candidates and `also`, which it locks."""
    now = datetime.now(UTC)
    await connection.execute(LOCK_REFERENCE, {"ref": ref})
    locked = {*also, *await connection.scalars(FIND_CANDIDATES, {"ref": ref})}
    await lock_customers(connection, locked)
    # Read when nobody else can write them any more, or the timeline would tell of a customer that it no longer meant.
    old = await connection.scalar(FIND_CUSTOMER, {"ref": ref})
    await connection.execute(statement, {"ref": ref, "customer": linked} if linked is not None else {"ref": ref})
    new: str | None = await connection.scalar(FIND_CUSTOMER, {"ref": ref})
    concerned = {customer for customer in (old, new) if customer is not None}
    if not concerned <= locked:
        # An access that is decided without the lock may be older than the one that it writes over.
        raise _Moved(concerned)
    if linked is not None and new != linked:
        raise InvalidRequest("It is a customer of a connected account, which has no references.", field="customer")
    if new != old:
        lines = [Line(customer, "link", "link", object_id=ref, old=old, new=new) for customer in sorted(concerned)]
        await write_timeline(connection, lines, now)
    # A customer that was unknown until now has no access yet, not even the access "none".
    rules = resources.rules.current(now).access
    await recompute_access(connection, dict.fromkeys(concerned), rules, now, cause="link")
    return new


def _check(ref: str) -> None:
    if ref.startswith("cus_"):
        raise InvalidRequest("A reference may not begin with cus_.", field="ref")
