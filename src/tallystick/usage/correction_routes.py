"""`POST /v1/usage/corrections`, and what became of each."""

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from sqlalchemy import text

from tallystick import db
from tallystick.auth import ApiKey, bearer, require_scope
from tallystick.card_numbers import refuse_card_number
from tallystick.errors import Forbidden, InvalidRequest, NotFound, Unavailable
from tallystick.redis_client import REDIS_ERRORS
from tallystick.resources import Resources
from tallystick.rules import PLAIN_TEXT
from tallystick.usage.corrections import Action, Method, State, Wanted, Why, record_correction
from tallystick.usage.drain import drain
from tallystick.usage.events import BadEvent, plain, read_value
from tallystick.usage.formats import refuse_repeated_names
from tallystick.usage.trace import waits_in_buffer

router = APIRouter(dependencies=[bearer], tags=["usage"])

MAX_LISTED = 500

# The last one that was shown is where the next page begins.
LIST_CORRECTIONS = text("""
    SELECT c.* FROM usage_corrections c
     WHERE c.source = :source
       AND (CAST(:state AS text) IS NULL OR c.state = :state)
       AND (CAST(:event AS text) IS NULL OR c.event_id = :event)
       AND (CAST(:before AS text) IS NULL
            OR (c.requested_at, c.id) < (SELECT b.requested_at, b.id FROM usage_corrections b
                                          WHERE b.source = :source AND b.id = :before))
     ORDER BY c.requested_at DESC, c.id DESC LIMIT :limit
""")


FIND_DAYS = text("SELECT day FROM usage_events WHERE source = :source AND id = :id ORDER BY day")


class CorrectionRequest(BaseModel):
    """What is to be corrected. Sent again with the same `id`, it is done once."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="The correction's own; yours.")
    event_id: str = Field(min_length=1, max_length=201, pattern=PLAIN_TEXT, description="Of the event.")
    action: Action
    value: StrictStr | StrictInt | None = Field(
        default=None, description="With `adjust`: what the event shall count instead, a decimal as text."
    )
    reason: str = Field(min_length=1, max_length=500, pattern=PLAIN_TEXT, description="For people; kept.")
    day: date | None = Field(
        default=None, description="The day (UTC) of the event; needed only if its id was used on several days."
    )


class Correction(BaseModel):
    """A correction and what became of it."""

    id: str
    source: str
    event_id: str
    day: date
    action: Action
    value: str | None = Field(description="Of an event that is adjusted: its new value.")
    delta: str = Field(description="What it changes, an exact decimal.")
    reason: str
    method: Method
    state: State
    why: Why | None = Field(description="Why it is left to an operator; docs/corrections.md lists the words.")
    invoice: str | None = Field(description="The final invoice that a proposal is about.")
    requested_at: datetime
    settled_at: datetime | None
    note: str | None = Field(description="The operator's.")


class Corrections(BaseModel):
    """The newest first."""

    data: list[Correction]
    has_more: bool


@router.post(
    "/v1/usage/corrections",
    responses={
        404: {"description": "There is no such event, or it is not recorded yet (`not-recorded-yet`)"},
        409: {"description": "The event or the id stands against it; docs/corrections.md lists the types"},
    },
)
async def correct_usage(
    request: Request, body: CorrectionRequest, key: Annotated[ApiKey, Depends(require_scope("usage:write"))]
) -> Correction:
    """Take an event back, or change its value. The event must be of the key's own source. Scope `usage:write`.

    The answer says how: `cancel` and `compensate` need nobody, `propose` waits for an operator. Safe to repeat: the
    same `id` and body are answered with the correction as it is by then.
    """
    refuse_repeated_names(await request.body())
    now = datetime.now(UTC)
    resources: Resources = request.app.state.resources
    wanted = Wanted(key.source, body.id, body.event_id, body.day, body.action, _read_value(body), body.reason)
    try:
        return await _record(resources, wanted, now)
    except NotFound as unknown:
        try:
            if not await waits_in_buffer(resources, key.source, body.event_id, now):
                raise
            await drain(resources, now)
        except REDIS_ERRORS as error:
            raise Unavailable(
                "The ledger has no such event, and Redis cannot be asked.", retry_after_seconds=2
            ) from error
        try:
            return await _record(resources, wanted, now)
        except NotFound:
            if days := await _find_days(resources, key.source, body.event_id):
                raise NotFound(
                    f"The event {body.event_id!a} is not of this day (UTC), but of: {', '.join(days)}.",
                    type="unknown-usage-event",
                ) from unknown
            raise NotFound(
                f"The event {body.event_id!a} was accepted and is not in the ledger yet; that takes a second.",
                type="not-recorded-yet",
                retry_after_seconds=1,
            ) from unknown


@router.get("/v1/usage/corrections")
async def list_corrections(
    request: Request,
    key: Annotated[ApiKey, Depends(require_scope("usage:read"))],
    state: Annotated[State | None, Query(description="All when left out.")] = None,
    event_id: Annotated[str | None, Query(min_length=1, max_length=201, pattern=PLAIN_TEXT)] = None,
    source: Annotated[
        str | None,
        Query(
            min_length=1, max_length=100, pattern=PLAIN_TEXT, description="Default: the key's. Another needs `admin`."
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
    before: Annotated[
        str | None,
        Query(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="Those before the one with this id."),
    ] = None,
) -> Corrections:
    """Corrections of a source, the newest first. Needs the scope `usage:read`."""
    if source is not None and source != key.source and not key.allows("admin"):
        raise Forbidden("Only a key with the scope admin may see the corrections of another source.")
    asked = {"source": source or key.source, "state": state, "event": event_id, "before": before, "limit": limit + 1}
    resources: Resources = request.app.state.resources
    async with db.transaction(resources.engine) as connection:
        rows = (await connection.execute(LIST_CORRECTIONS, asked)).all()
    return Corrections(data=[show_correction(row) for row in rows[:limit]], has_more=len(rows) > limit)


async def _find_days(resources: Resources, source: str, id: str) -> list[str]:
    async with db.transaction(resources.engine) as connection:
        found = await connection.scalars(FIND_DAYS, {"source": source, "id": id})
        return [day.isoformat() for day in found]


async def _record(resources: Resources, wanted: Wanted, now: datetime) -> Correction:
    async with db.transaction(resources.engine) as connection:
        row = await record_correction(connection, wanted, resources.rules.current(now), now)
    return show_correction(row)


def _read_value(body: CorrectionRequest) -> Decimal | None:
    for name, given in (("id", body.id), ("reason", body.reason)):
        refuse_card_number(given, name)
    if (body.action == "adjust") != (body.value is not None):
        raise InvalidRequest("It is given with 'adjust', and only then.", field="value")
    if body.value is None:
        return None
    try:
        return read_value(str(body.value), "value")
    except BadEvent as error:
        raise InvalidRequest(error.message, field="value") from None


def show_correction(row: Any) -> Correction:
    """A correction as it is shown, from its row."""
    return Correction(
        id=row.id,
        source=row.source,
        event_id=row.event_id,
        day=row.event_day,
        action=row.action,
        value=None if row.value is None else plain(row.value),
        delta=plain(row.delta),
        reason=row.reason,
        method=row.method,
        state=row.state,
        why=row.why,
        invoice=row.invoice,
        requested_at=row.requested_at,
        settled_at=row.settled_at,
        note=row.note,
    )
