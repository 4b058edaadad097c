"""What a customer may use now, and what changed about it: asked for by the product's own reference."""

import asyncio
import hashlib
import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncEngine

from tallystick import db
from tallystick.access.timeline import READ_LINES, Cause, What
from tallystick.auth import authenticate, bearer, require_scope
from tallystick.errors import InvalidRequest, UnknownCustomer
from tallystick.resources import Resources
from tallystick.rules import PLAIN_TEXT, Access

router = APIRouter(dependencies=[bearer], tags=["customers"])

MAX_CUSTOMERS = 100
MAX_LINES = 100
LATEST = 2**63 - 1

IS_PLAIN_TEXT = re.compile(PLAIN_TEXT).fullmatch
MAX_REFERENCE = 100
Reference = Annotated[
    str,
    Path(
        min_length=1,
        max_length=MAX_REFERENCE,
        pattern=PLAIN_TEXT,
        description="The product's own reference, or a `cus_…` id.",
        examples=["acme"],
    ),
]

UNKNOWN_CUSTOMER: dict[int | str, dict[str, Any]] = {404: {"description": "No Stripe customer is known by this name"}}

# Customers of connected accounts can be asked for too, by their ids.
FIND_CUSTOMER = text("SELECT customer FROM all_customer_references WHERE ref = :ref")

# The members of `CustomerAccess`, in their order.
ANSWER = """
    a.customer, asked.ref, a.access, a.reason, a.since, a.until, a.decided_by, a.prices,
    ARRAY(SELECT e.lookup_key FROM active_entitlements e
           WHERE e.customer = a.customer AND NOT e.deleted AND e.lookup_key IS NOT NULL
           ORDER BY e.lookup_key) AS entitlements
"""

# LIMIT keeps the planner from reading all references at once: each is looked up by itself, by the indexes.
FIND_ACCESS_OF_ALL = text(f"""
    SELECT {ANSWER}
      FROM unnest(CAST(:refs AS text[])) AS asked(ref)
     CROSS JOIN LATERAL (SELECT customer FROM all_customer_references WHERE ref = asked.ref LIMIT 1) r
      JOIN customer_access a ON a.customer = r.customer
""")  # noqa: S608  a constant


class CustomerAccess(BaseModel):
    """What a customer may use, as Stripe's word was last heard."""

    customer: str
    ref: str = Field(description="The name that was asked for.")
    access: Access
    reason: str = Field(description="Why; docs/access.md lists the reasons.")
    since: datetime = Field(description="Since when the access is what it is, UTC.")
    until: datetime | None = Field(description="When grace ends, if nothing is paid until then, UTC.")
    decided_by: str | None = Field(description="The event that led to this, if it was one.")
    prices: list[str] = Field(description="The prices of the subscriptions that give access.")
    entitlements: list[str] = Field(description="The lookup keys of its active entitlements at Stripe.")


# Caches may keep an answer for its caller, and must ask whether it still holds.
CACHING = [(b"cache-control", b"private, no-cache"), (b"vary", b"Authorization")]

# In the order of ANSWER, as a row has them.
ACCESS_FIELDS = tuple(CustomerAccess.model_fields)


class AccessRequest(BaseModel):
    """Whose access is asked for."""

    model_config = ConfigDict(extra="forbid")

    customers: list[Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=PLAIN_TEXT)]] = Field(
        min_length=1, max_length=MAX_CUSTOMERS, description="References or `cus_…` ids."
    )


class AccessOfSeveral(BaseModel):
    """The access of each known customer, in the order asked for, and the names that nobody is known by."""

    customers: list[CustomerAccess]
    unknown: list[str]


class CausingEvent(BaseModel):
    """A Stripe event. Its type and time are null once it is no longer recorded."""

    id: str
    type: str | None
    created: datetime | None


class TimelineLine(BaseModel):
    """One change of a customer's state."""

    id: int
    at: datetime = Field(description="When it was committed here, UTC.")
    what: What
    object_id: str | None = Field(description="The subscription or invoice; of a link the reference.")
    old: str | None = Field(description="The status, the access or the customer before; null: none was known.")
    new: str | None = Field(description="The same after it.")
    reason: str | None = Field(description="Of a new access.")
    cause: Cause
    event: CausingEvent | None = Field(description="The event that led to it, if it was one.")


class Timeline(BaseModel):
    """A customer's changes, the newest first."""

    customer: str
    ref: str
    lines: list[TimelineLine]
    next_before: int | None = Field(description="Ask with this `before` for older lines; null: there are none.")


class AccessReader:
    """Reads access with one statement at a time: those who ask while it is on its way share the next one.

    A read costs a round trip to PostgreSQL, whether it is for one customer or for a hundred. Whoever asks gets what was
    committed before, since the statement that answers begins later.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._asked: list[tuple[str, asyncio.Future[db.Row | None]]] = []
        self._reading: asyncio.Task[None] | None = None

    async def read(self, ref: str) -> db.Row | None:
        """The customer's row, or None for an unknown name. Raises what PostgreSQL raises."""
        found: asyncio.Future[db.Row | None] = asyncio.get_running_loop().create_future()
        self._asked.append((ref, found))
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_all(), name="access")
        return await found

    async def _read_all(self) -> None:
        """Answer all who ask, up to a hundred with one statement, until nobody waits."""
        while self._asked:
            asked, self._asked = self._asked[:MAX_CUSTOMERS], self._asked[MAX_CUSTOMERS:]
            try:
                rows = await self._read({ref for ref, _ in asked})
            except Exception as error:  # noqa: BLE001  it belongs to each of those who asked, and not to this task
                for _, found in asked:
                    if not found.done():
                        found.set_exception(error)
            else:
                for ref, found in asked:
                    if not found.done():  # done: its caller has gone away
                        found.set_result(rows.get(ref))
        self._reading = None

    async def _read(self, refs: Collection[str]) -> dict[str, db.Row]:
        async with db.reading(self._engine) as connection:
            return {row.ref: row for row in await connection.execute(FIND_ACCESS_OF_ALL, {"refs": list(refs)})}


async def get_access(request: Request) -> Response:
    """`GET /v1/customers/{ref}/access`: whether a customer may use the product, from one indexed read.

    Needs the scope `access:read`. The answer is a `CustomerAccess` with a strong `ETag`; with it in `If-None-Match` the
    answer is 304 while nothing has changed (RFC 9110). Problems: 401, 403, 404 an unknown name, 422, 429, 503.
    """
    await authenticate(request, "access:read")
    ref: str = request.path_params["ref"]
    if len(ref) > MAX_REFERENCE or not IS_PLAIN_TEXT(ref):
        raise InvalidRequest(
            f"It must have 1 to {MAX_REFERENCE} characters, none of them a control character.", field="ref"
        )
    reader: AccessReader = request.app.state.access_reader
    row = await reader.read(ref)
    if row is None:
        raise UnknownCustomer(ref)
    body = _write_access(row)
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    is_known = _is_known(etag, request.headers.getlist("if-none-match"))
    answer = Response(status_code=304) if is_known else Response(body, media_type="application/json")
    answer.raw_headers += [(b"etag", etag.encode()), *CACHING]
    return answer


@router.post("/v1/access", dependencies=[Depends(require_scope("access:read"))])
async def get_access_of_several(request: Request, body: AccessRequest) -> AccessOfSeveral:
    """The access of up to 100 customers, from one statement. Needs the scope `access:read`.

    A POST, because 100 references do not fit into every proxy's idea of a URL; it changes nothing.
    """
    refs = list(dict.fromkeys(body.customers))
    async with db.reading(_engine(request)) as connection:
        found = {row.ref: row for row in await connection.execute(FIND_ACCESS_OF_ALL, {"refs": refs})}
    return AccessOfSeveral(
        customers=[CustomerAccess.model_validate(dict(row)) for ref in refs if (row := found.get(ref))],
        unknown=[ref for ref in refs if ref not in found],
    )


@router.get(
    "/v1/customers/{ref}/timeline",
    dependencies=[Depends(require_scope("access:read"))],
    responses=UNKNOWN_CUSTOMER,
)
async def get_timeline(
    request: Request,
    ref: Reference,
    limit: Annotated[int, Query(ge=1, le=MAX_LINES, description="How many lines at most.")] = 50,
    before: Annotated[
        int | None, Query(ge=1, le=LATEST, description="Only lines with a smaller id: `next_before` of the last page.")
    ] = None,
) -> Timeline:
    """What changed for a customer and by which event, the newest first. Needs the scope `access:read`.

    The lines are those of the Stripe customer that the name means now. docs/access.md says what leaves a line.
    """
    async with db.transaction(_engine(request)) as connection:
        customer = await connection.scalar(FIND_CUSTOMER, {"ref": ref})
        if customer is None:
            raise UnknownCustomer(ref)
        rows = await connection.execute(
            READ_LINES, {"customer": customer, "before": before or LATEST, "limit": limit + 1}
        )
        lines = [read_line(row) for row in rows]
    return Timeline(
        customer=customer,
        ref=ref,
        lines=lines[:limit],
        next_before=lines[limit - 1].id if len(lines) > limit else None,
    )


def read_line(row: Row[Any]) -> TimelineLine:
    """A line as it is shown, from a row with `timeline.COLUMNS`."""
    event = None
    if row.event is not None:
        event = CausingEvent(id=row.event, type=row.event_type, created=row.event_created)
    return TimelineLine(
        id=row.id,
        at=row.at.astimezone(UTC),
        what=row.what,
        object_id=row.object_id,
        old=row.old,
        new=row.new,
        reason=row.reason,
        cause=row.cause,
        event=event,
    )


def _write_access(row: db.Row) -> bytes:
    """A `CustomerAccess` as JSON, straight from its row: this is done for each request of a product."""
    return msgspec.json.encode(dict(zip(ACCESS_FIELDS, row, strict=True)))


def _engine(request: Request) -> AsyncEngine:
    resources: Resources = request.app.state.resources
    return resources.engine


def _is_known(etag: str, if_none_match: list[str]) -> bool:
    # RFC 9110, 13.1.2: a list of tags, compared weakly, or * for any.
    tags = [tag.strip().removeprefix("W/") for header in if_none_match for tag in header.split(",")]
    return etag in tags or "*" in tags
