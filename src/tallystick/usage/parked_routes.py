"""Parked deliveries over HTTP: see them, send them again, write them off."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from tallystick import db
from tallystick.auth import ApiKey, bearer, require_scope
from tallystick.card_numbers import refuse_card_number
from tallystick.errors import NotFound, Problem
from tallystick.resources import Resources
from tallystick.rules import PLAIN_TEXT
from tallystick.usage.parked import ALTERNATIVES, Decision, list_parked, resend, void
from tallystick.usage.query import find_refs

router = APIRouter(dependencies=[bearer], tags=["usage"])

MAX_LISTED = 500

Text = Annotated[str | None, Query(min_length=1, max_length=100, pattern=PLAIN_TEXT)]
Identifier = Annotated[str, Path(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="Of the delivery.")]


class NotDecided(Problem):
    """What was asked for would be refused by Stripe, or could be billed twice. `type` says which."""

    status = 409
    title = "This cannot be done with the delivery"


class Parked(BaseModel):
    """A delivery that Stripe will not be told as it is."""

    number: int = Field(description="For `after`.")
    identifier: str = Field(description="Under which Stripe was told, or would have been.")
    customer: str
    meter: str
    quantity: str = Field(description="An exact decimal, as text.")
    events: int = Field(description="How many usage events it carries.")
    sender: str
    timestamp: datetime = Field(description="Of the usage, as Stripe would be told it.")
    reason: str = Field(description="A reason of docs/deliveries.md; Stripe's own with its text after a colon.")
    since: datetime
    happened: str = Field(description="The reason, for people.")
    remedy: str = Field(description="What can be done.")


class ParkedPage(BaseModel):
    """Parked deliveries, oldest first. `next`: `after` of the next page, or null at the end."""

    data: list[Parked]
    next: int | None


class ResendRequest(BaseModel):
    """How to send it again."""

    model_config = ConfigDict(extra="forbid")

    carry: bool = Field(default=False, description="Move it into the open period, if it is too late or too old.")


class VoidRequest(BaseModel):
    """Why it is written off."""

    model_config = ConfigDict(extra="forbid")

    note: str = Field(min_length=1, max_length=500, pattern=PLAIN_TEXT, description="For people; kept on the trace.")


class Decided(BaseModel):
    """What became of it. `sent_as`: the identifier under which Stripe will be told now; null when it was voided."""

    identifier: str
    sent_as: str | None


@router.get("/v1/usage/parked", dependencies=[Depends(require_scope("usage:read"))])
async def get_parked(
    request: Request,
    customer: Annotated[Text, Query(description="A reference or a `cus_…` id.")] = None,
    meter: Text = None,
    reason: Annotated[Text, Query(description="Without Stripe's text: `period_closed`.")] = None,
    after: Annotated[int, Query(ge=0, le=2**62, description="`next` of the page before.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
) -> ParkedPage:
    """Parked deliveries, oldest first. Needs the scope `usage:read`."""
    resources: Resources = request.app.state.resources
    async with db.transaction(resources.engine) as connection:
        known = (await find_refs(connection, customer))[0] if customer is not None else None
        rows = await list_parked(
            connection, reason=reason, customer=known or customer, meter=meter, after=after, limit=limit
        )
    data = [Parked(**row) for row in rows]
    return ParkedPage(data=data, next=data[-1].number if len(data) == limit else None)


@router.post("/v1/usage/parked/{identifier}/resend")
async def post_resend(
    request: Request,
    identifier: Identifier,
    key: Annotated[ApiKey, Depends(require_scope("admin"))],
    body: ResendRequest | None = None,
) -> Decided:
    """Send a parked delivery again. Needs the scope `admin`.

    409 with one of the types `not-parked`, `outcome-unknown`, `no-second-left`, `meter-changed`, `period-closed`,
    `older-than-35-days`, `cannot-be-carried` and `no-open-period` when Stripe would refuse it or could bill it twice;
    `detail` names the alternatives.
    """
    resources: Resources = request.app.state.resources
    now = datetime.now(UTC)
    rules = resources.rules.current(now)
    async with db.transaction(resources.engine) as connection:
        decisions = await resend(
            connection, [identifier], rules, now, by=f"key {key.id}", carried=body is not None and body.carry
        )
    return _answer(identifier, decisions)


@router.post("/v1/usage/parked/{identifier}/void")
async def post_void(
    request: Request,
    identifier: Identifier,
    body: VoidRequest,
    key: Annotated[ApiKey, Depends(require_scope("admin"))],
) -> Decided:
    """Write a parked delivery off: it is never sent, and stays counted as voided. Needs the scope `admin`.

    409 `not-parked` when it is not parked.
    """
    refuse_card_number(body.note, field="note")
    resources: Resources = request.app.state.resources
    now = datetime.now(UTC)
    async with db.transaction(resources.engine) as connection:
        decisions = await void(connection, [identifier], now, by=f"key {key.id}", note=body.note)
    return _answer(identifier, decisions)


def _answer(identifier: str, decisions: list[Decision]) -> Decided:
    if not decisions:
        raise NotFound(f"There is no delivery {identifier!a}.", type="unknown-delivery")
    (decision,) = decisions
    if decision.refused is not None:
        raise NotDecided(ALTERNATIVES[decision.refused], type=decision.refused.replace("_", "-"))
    return Decided(identifier=decision.identifier, sent_as=decision.sent_as)
