"""The routes of usage that are not hot: what was used."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from pydantic import AwareDatetime, BaseModel, Field

from tallystick import db
from tallystick.auth import bearer, require_scope
from tallystick.errors import InvalidRequest
from tallystick.resources import Resources
from tallystick.usage.buckets import floor_hour
from tallystick.usage.events import plain
from tallystick.usage.query import Window, add_up_usage

router = APIRouter(dependencies=[bearer])

# As much as a year by hour: an answer that a person or a chart can still use.
MAX_SPAN = {"hour": timedelta(days=366), "day": timedelta(days=3660), "month": timedelta(days=3660)}


class UsageRow(BaseModel):
    """The quantity of one meter in one window."""

    meter: str
    start: datetime = Field(description="Start of the window, UTC.")
    quantity: str = Field(description="An exact decimal, as text.")
    events: int


class Usage(BaseModel):
    """What a customer used."""

    customer: str | None = Field(description="The Stripe customer, or null while the reference is not linked.")
    ref: str
    window: Window
    from_: datetime = Field(serialization_alias="from")
    to: datetime
    data: list[UsageRow]


@router.get("/v1/usage", dependencies=[Depends(require_scope("usage:read"))], tags=["usage"])
async def get_usage(
    request: Request,
    customer: Annotated[str, Query(min_length=1, max_length=100, description="A reference or a `cus_…` id.")],
    meter: Annotated[str | None, Query(min_length=1, max_length=100, description="All meters when left out.")] = None,
    from_: Annotated[
        AwareDatetime | None, Query(alias="from", description="Included. Default: the start of this month, UTC.")
    ] = None,
    to: Annotated[AwareDatetime | None, Query(description="Excluded. Default: the end of this hour.")] = None,
    window: Annotated[Window, Query(description="How to group, in UTC.")] = "day",
) -> Usage:
    """Quantities from the ledger's totals, exact, within two seconds of the 202. Needs the scope `usage:read`.

    `from` and `to` are whole hours, or instants at which a billing period of the customer begins or ends (422
    otherwise).
    """
    now = datetime.now(UTC)
    start = (from_ or floor_hour(now).replace(day=1, hour=0)).astimezone(UTC)
    end = (to or floor_hour(now) + timedelta(hours=1)).astimezone(UTC)
    if not start < end <= start + MAX_SPAN[window]:
        raise InvalidRequest(f"It must lie after 'from', by at most {MAX_SPAN[window].days} days.", field="to")
    resources: Resources = request.app.state.resources
    async with db.transaction(resources.engine) as connection:
        stripe_customer, rows = await add_up_usage(
            connection, ref=customer, meter=meter, from_=start, to=end, window=window
        )
    return Usage(
        customer=stripe_customer,
        ref=customer,
        window=window,
        from_=start,
        to=end,
        data=[
            UsageRow(meter=row.meter, start=row.start, quantity=plain(row.quantity), events=row.events) for row in rows
        ],
    )
