"""The routes of usage that are not hot: what was used, where it is, what became of one event, which invoices wait."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import AwareDatetime, BaseModel, Field

from tallystick import db
from tallystick.auth import ApiKey, bearer, require_scope
from tallystick.errors import Forbidden, InvalidRequest, NotFound, Unavailable
from tallystick.redis_client import REDIS_ERRORS
from tallystick.resources import Resources
from tallystick.rules import PLAIN_TEXT
from tallystick.usage.aggregations import Aggregation
from tallystick.usage.board import list_open_periods
from tallystick.usage.buckets import floor_hour
from tallystick.usage.conservation import Slice, count_slices, find_first_day
from tallystick.usage.events import plain
from tallystick.usage.query import Question, add_up_usage, find_period_start, find_refs, find_unknown
from tallystick.usage.trace import trace_event, waits_in_buffer
from tallystick.usage.windows import Window, start_of_month

router = APIRouter(dependencies=[bearer], tags=["usage"])

# As much as a year by hour: an answer that a person or a chart can still use.
MAX_SPAN = {"hour": timedelta(days=366)}
MAX_SPAN_OF_OTHERS = timedelta(days=3660)

# A slice of a few customers is counted in milliseconds; who asks for all of them should use the command.
SLICE_PATIENCE = timedelta(seconds=20)

Customer = Annotated[
    str, Query(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="A reference or a `cus_…` id.")
]
Meter = Annotated[
    str | None, Query(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="All meters when left out.")
]
# A CloudEvent's id is its source, a space and its id.
EventId = Annotated[str, Path(min_length=1, max_length=201, pattern=PLAIN_TEXT, examples=["req-1"])]


class UsageRow(BaseModel):
    """The quantity of one meter in one window."""

    meter: str
    aggregation: Aggregation
    start: datetime = Field(description="Start of the window, UTC; included.")
    end: datetime = Field(description="End of the window, UTC; excluded.")
    quantity: str = Field(description="An exact decimal, as text.")
    events: int
    group: str | None = Field(description="With `group_by`: the property's value; null for events without it.")
    subscribed: bool = Field(description="Whether a subscription bills the meter at some time of the window.")


class Usage(BaseModel):
    """What a customer used."""

    customer: str | None = Field(description="The Stripe customer, or null while the reference is not linked.")
    ref: str
    window: Window
    time_zone: str
    group_by: str | None
    from_: datetime = Field(serialization_alias="from")
    to: datetime
    data: list[UsageRow]


@router.get("/v1/usage", dependencies=[Depends(require_scope("usage:read"))])
async def get_usage(
    request: Request,
    customer: Customer,
    meter: Meter = None,
    from_: Annotated[
        AwareDatetime | None,
        Query(alias="from", description="Included. Default: the start of this month, or of the present period."),
    ] = None,
    to: Annotated[AwareDatetime | None, Query(description="Excluded. Default: the end of this hour.")] = None,
    window: Annotated[Window, Query(description="How to group by time.")] = "day",
    time_zone: Annotated[
        str, Query(min_length=1, max_length=64, description="Whose hours, days and months: an IANA name.")
    ] = "UTC",
    group_by: Annotated[
        str | None,
        Query(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="A property that the meter declares."),
    ] = None,
) -> Usage:
    """Quantities from the ledger's totals, exact, within two seconds of the 202. Needs the scope `usage:read`.

    Every window begins and ends at a whole hour (UTC) or at an instant at which a billing period of the customer begins
    or ends (422 otherwise). Windows without usage are left out.
    """
    now = datetime.now(UTC)
    resources: Resources = request.app.state.resources
    rules = resources.rules.current(now)
    async with db.transaction(resources.engine) as connection:
        start = _utc(from_, "from")
        if start is None and window == "billing_period":
            start = await find_period_start(connection, customer, meter, rules, now)
        start = start or start_of_month(now, time_zone)
        end = _utc(to, "to") or floor_hour(now) + timedelta(hours=1)
        span = MAX_SPAN.get(window, MAX_SPAN_OF_OTHERS)
        if not start < end or end - start > span:
            raise InvalidRequest(f"It must lie after 'from', by at most {span.days} days.", field="to")
        if not 2000 <= start.year <= end.year < 2200:  # no zone can be applied near the calendar's ends
            raise InvalidRequest("It lies outside of the years 2000 to 2199.", field="from")
        question = Question(customer, meter, start, end, window, time_zone, group_by)
        stripe_customer, rows = await add_up_usage(connection, question, rules)
    return Usage(
        customer=stripe_customer,
        ref=customer,
        window=window,
        time_zone=time_zone,
        group_by=group_by,
        from_=start,
        to=end,
        data=[UsageRow.model_validate(vars(row) | {"quantity": plain(row.quantity)}) for row in rows],
    )


class EventTrace(BaseModel):
    """What is written down about an id. docs/reading.md explains every member and every word."""

    id: str
    source: str
    events: list[dict[str, Any]] = Field(description="One, unless the id was used on several days.")
    conflicts: list[dict[str, Any]] = Field(description="Accepted with this id, but not the same: not billed.")
    corrections: list[dict[str, Any]]


@router.get(
    "/v1/usage/events/{id:path}",
    responses={404: {"description": "There is no such event, or it is not recorded yet (`not-recorded-yet`)"}},
)
async def get_event(
    request: Request,
    id: EventId,
    key: Annotated[ApiKey, Depends(require_scope("usage:read"))],
    source: Annotated[
        str | None,
        Query(
            min_length=1, max_length=100, pattern=PLAIN_TEXT, description="Default: the key's. Another needs `admin`."
        ),
    ] = None,
) -> EventTrace:
    """One event on its whole way: ledger, total, deliveries with every try, summary, invoice. Scope `usage:read`."""
    if source is not None and source != key.source and not key.allows("admin"):
        raise Forbidden("Only a key with the scope admin may see the events of another source.")
    now = datetime.now(UTC)
    resources: Resources = request.app.state.resources
    asked = source or key.source
    traced = await trace_event(resources, asked, id, now)
    if not traced.events and not traced.conflicts:
        try:
            waits = await waits_in_buffer(resources, asked, id, now)
        except REDIS_ERRORS as error:
            raise Unavailable("The ledger has no such event, and Redis cannot be asked.", retry_after_seconds=2) from (
                error
            )
        if waits:
            raise NotFound(
                f"The event {id!a} was accepted and is not in the ledger yet; that takes a second.",
                type="not-recorded-yet",
            )
        raise NotFound(f"There is no event {id!a} of the source {asked!a}.", type="unknown-usage-event")
    return EventTrace(
        id=id, source=asked, events=traced.events, conflicts=traced.conflicts, corrections=traced.corrections
    )


class ConservationPart(BaseModel):
    """Of one customer and meter: what was accepted, and in which states it is now."""

    customer: str = Field(description="The Stripe customer, or the reference while it is not linked.")
    meter: str
    events: dict[str, int] = Field(description="By state, with `accepted` and `difference`.")
    quantity: dict[str, str] | None = Field(
        description="The same in quantities, as exact decimals; null for meters whose quantities do not add up."
    )


class SliceConservation(BaseModel):
    """Conservation of a part of the ledger. `difference` is 0 unless there is a bug."""

    from_: datetime | None = Field(serialization_alias="from")
    to: datetime | None
    holds: bool
    data: list[ConservationPart]


@router.get(
    "/v1/usage/conservation",
    dependencies=[Depends(require_scope("usage:read"))],
    responses={404: {"description": "The name is nobody's (`unknown-customer`, `unknown-meter`)"}},
)
async def get_conservation(
    request: Request,
    customer: Annotated[
        str | None, Query(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="All when left out.")
    ] = None,
    meter: Meter = None,
    from_: Annotated[AwareDatetime | None, Query(alias="from", description="Buckets that begin then or later.")] = None,
    to: Annotated[AwareDatetime | None, Query(description="Buckets that begin before.")] = None,
) -> SliceConservation:
    """Prove that every accepted event of a slice is in a named state (I2). Needs the scope `usage:read`.

    A slice begins, at the earliest, with the oldest day whose single events are kept; `from` in the answer says it.
    """
    resources: Resources = request.app.state.resources
    begin, end = _utc(from_, "from"), _utc(to, "to")
    if begin is not None and end is not None and not begin < end:
        raise InvalidRequest("It must lie after 'from'.", field="to")
    async with db.transaction(resources.engine) as connection:
        refs = (await find_refs(connection, customer))[1] if customer is not None else None
        first = await find_first_day(connection)
        start = max((at for at in (begin, first) if at is not None), default=None)
        parts = await count_slices(connection, Slice(refs, meter, start, end), SLICE_PATIENCE)
        if not parts:  # a name that is misspelt must not look as if everything were well
            rules = resources.rules.current(datetime.now(UTC))
            unknown = await find_unknown(connection, customer, meter, rules)
            if unknown is not None:
                name = customer if unknown == "customer" else meter
                raise NotFound(f"There is no usage of {name!a}: no {unknown} has this name.", type=f"unknown-{unknown}")
    data = []
    for part in parts:
        shown: Any = part.counted.as_json()
        data.append(
            ConservationPart(
                customer=part.customer,
                meter=part.meter,
                events=shown["events"],
                quantity=shown["quantity"] if part.additive else None,
            )
        )
    return SliceConservation(from_=start, to=end, holds=all(part.counted.holds for part in parts), data=data)


class OpenPeriods(BaseModel):
    """The draft invoices that bill metered usage, the most urgent first."""

    data: list[dict[str, Any]]


@router.get("/v1/periods", dependencies=[Depends(require_scope("usage:read"))], tags=["usage"])
async def get_open_periods(request: Request) -> OpenPeriods:
    """The draft invoices, how long they are drafts at least, and what Stripe was not told yet. Scope `usage:read`."""
    now = datetime.now(UTC)
    resources: Resources = request.app.state.resources
    return OpenPeriods(data=[period.as_json() for period in await list_open_periods(resources, now)])


def _utc(at: datetime | None, field: str) -> datetime | None:
    try:
        return at and at.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest("It lies outside of the calendar.", field=field) from None
