"""`GET /v1/events/{id}`: what became of one of Stripe's events."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, Field
from sqlalchemy import Row, text

from tallystick import db
from tallystick.access.routes import TimelineLine, read_line
from tallystick.access.timeline import READ_LINES_OF_EVENT
from tallystick.auth import bearer, require_scope
from tallystick.errors import UnknownEvent
from tallystick.resources import Resources
from tallystick.rules import PLAIN_TEXT
from tallystick.webhooks.translate import HANDLED_TYPES

router = APIRouter(dependencies=[bearer], tags=["events"])

EventId = Annotated[
    str, Path(min_length=1, max_length=255, pattern=PLAIN_TEXT, examples=["evt_1PgafmB7WZ01zgkW6dKueIc5"])
]

# A failing event is not recorded before it is handled or set aside; its failures are counted meanwhile.
FIND_EVENT = text("""
    SELECT e.id, e.type, e.livemode, e.account, e.api_version, e.object_id, e.created, e.received_at, e.verdict,
           e.error, e.superseded_by, s.created AS superseding_created, CAST(NULL AS integer) AS failures
      FROM stripe_events e LEFT JOIN stripe_events s ON s.id = e.superseded_by
     WHERE e.id = :id
    UNION ALL
    SELECT id, type, NULL, NULL, NULL, NULL, NULL, first_at, 'failing', error, NULL, NULL, failures
      FROM stripe_event_failures WHERE id = :id AND NOT EXISTS (SELECT FROM stripe_events WHERE id = :id)
""")


class EventReport(BaseModel):
    """A Stripe event: what is recorded of it, and what it changed. Its payload is not kept."""

    id: str
    type: str
    livemode: bool | None
    account: str | None = Field(description="The connected account; empty: your own.")
    api_version: str | None = Field(description="Which version's shape the payload had.")
    object_id: str | None = Field(description="The object that it is about.")
    created: datetime | None = Field(description="When Stripe made it, UTC.")
    received_at: datetime = Field(description="When it came first, UTC.")
    verdict: Literal["applied", "stale", "ignored", "quarantined", "failing"]
    why: str | None = Field(description="Why it was not applied, in words.")
    superseded_by: str | None = Field(description="Of a stale event: the newer one whose state was known already.")
    changes: list[TimelineLine] = Field(description="The lines that it left in timelines, the oldest first.")


@router.get(
    "/v1/events/{id}",
    dependencies=[Depends(require_scope("access:read"))],
    responses={404: {"description": "No event with this id was received"}},
)
async def get_event(request: Request, id: EventId) -> EventReport:
    """What became of one of Stripe's events: received when, with which verdict and why, and what it changed.

    `failing`: our own handling failed, and Stripe sends it again; after some times it is `quarantined`. Needs the
    scope `access:read`.
    """
    resources: Resources = request.app.state.resources
    async with db.transaction(resources.engine) as connection:
        row = (await connection.execute(FIND_EVENT, {"id": id})).first()
        if row is None:
            raise UnknownEvent(f"No event {id!a} was received.")
        changes = [read_line(line) for line in await connection.execute(READ_LINES_OF_EVENT, {"event": id})]
    return EventReport(
        id=row.id,
        type=row.type,
        livemode=row.livemode,
        account=row.account,
        api_version=row.api_version,
        object_id=row.object_id,
        created=row.created,
        received_at=row.received_at,
        verdict=row.verdict,
        why=_explain(row),
        superseded_by=row.superseded_by if row.verdict == "stale" else None,
        changes=changes,
    )


def _explain(row: Row[Any]) -> str | None:
    match row.verdict:
        case "stale" if row.superseded_by is None:
            return f"{row.object_id} was known in a newer state, as fetched from Stripe."
        case "stale" if row.superseding_created == row.created:
            return (
                f"{row.superseded_by} tells of {row.object_id} in the same second; the object was fetched to be sure."
            )
        case "stale":
            return f"{row.object_id} was known in a newer state, by {row.superseded_by}."
        case "ignored" if row.object_id is None:
            return "It is about an object without an id."
        case "ignored" if row.type == "checkout.session.completed":
            return "The checkout has no usable client_reference_id, or no customer, so it links nothing."
        case "ignored" if row.type in HANDLED_TYPES:
            return f"Nothing of {row.object_id} is mirrored: it is of another kind or account."
        case "ignored":
            return f"Events of the type {row.type} change nothing that is mirrored."
        case "quarantined":
            return f"It could not be handled: {row.error}."
        case "failing":
            times = "once" if row.failures == 1 else f"{row.failures} times, an hour apart"
            return f"Handling it has failed {times} ({row.error}); Stripe sends it again."
        case _:
            return None
