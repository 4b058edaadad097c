"""Usage as the totals have it: quantities of a customer by hour, day or month.

Totals are exact to the bucket, which is an hour cut at the customer's period boundaries. So a window may begin and
end at a whole hour or at such a boundary, and nowhere else: anything else could only be answered approximately.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.errors import InvalidRequest
from tallystick.usage.buckets import floor_hour

Window = Literal["hour", "day", "month"]

FIND_CUSTOMER = text("SELECT customer FROM customer_references WHERE ref = :ref")

# All names of the customer count: usage may have been posted under any of them.
ADD_UP = text("""
    SELECT t.meter, date_trunc(:window, t.bucket_start, 'UTC') AS start, sum(t.quantity) AS quantity,
           sum(t.events)::bigint AS events
      FROM usage_totals t
     WHERE t.customer_ref = ANY(:refs)
       AND t.bucket_start >= :from AND t.bucket_start < :to
       AND (CAST(:meter AS text) IS NULL OR t.meter = :meter)
     GROUP BY 1, 2 ORDER BY 2, 1
""")


@dataclass(frozen=True)
class Row:
    """What a customer used of a meter in the window that begins at `start`."""

    meter: str
    start: datetime
    quantity: Decimal
    events: int


async def find_refs(connection: AsyncConnection, ref: str) -> tuple[str | None, list[str]]:
    """The Stripe customer of a reference, if it is linked, and all references of that customer."""
    customer = await connection.scalar(FIND_CUSTOMER, {"ref": ref})
    if customer is None:
        return None, [ref]
    refs = await connection.scalars(
        text("SELECT ref FROM customer_references WHERE customer = :customer"), {"customer": customer}
    )
    return customer, list(refs)


async def add_up_usage(
    connection: AsyncConnection, *, ref: str, meter: str | None, from_: datetime, to: datetime, window: Window
) -> tuple[str | None, list[Row]]:
    """The customer of a reference and what it used from `from_` (included) to `to` (excluded), by window in UTC.

    Raises `InvalidRequest` when an end of the window is neither a whole hour nor a boundary of the customer's periods.
    """
    customer, refs = await find_refs(connection, ref)
    for name, at in (("from", from_), ("to", to)):
        if at != floor_hour(at) and not await _is_boundary(connection, customer, at):
            raise InvalidRequest(
                "It must be a whole hour, or an instant at which one of the customer's billing periods begins or ends.",
                field=name,
            )
    rows = await connection.execute(ADD_UP, {"window": window, "refs": refs, "from": from_, "to": to, "meter": meter})
    return customer, [Row(*row) for row in rows]


async def _is_boundary(connection: AsyncConnection, customer: str | None, at: datetime) -> bool:
    return bool(
        await connection.scalar(
            text("SELECT EXISTS (SELECT FROM period_boundaries WHERE customer = :customer AND at = :at)"),
            {"customer": customer, "at": at},
        )
    )
