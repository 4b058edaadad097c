"""Billing periods: the stretch of time whose usage of a meter goes onto one invoice of a customer.

In this order: the period of the subscription that bills the meter; what lies between two instants at which any of the
customer's periods begins or ends; the calendar month of UTC, cut at those instants.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

# Of several subscriptions that bill one meter, the period that began last: the same choice each time it is asked.
FIND_PERIODS = text("""
    SELECT p.period_start, p.period_end,
           (SELECT max(b.at) FROM period_boundaries b WHERE b.customer = r.customer AND b.at <= r.at) AS before,
           (SELECT min(b.at) FROM period_boundaries b WHERE b.customer = r.customer AND b.at > r.at) AS after
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(number integer, customer text, event_name text, price text, at timestamptz)
      LEFT JOIN LATERAL (
           SELECT period_start, period_end FROM metered_periods m
            WHERE m.customer = r.customer AND m.period_start <= r.at AND m.period_end > r.at
              AND (m.event_name = r.event_name OR m.price = r.price)
            ORDER BY period_start DESC, period_end, item LIMIT 1) p ON true
     ORDER BY r.number
""")


class Period(NamedTuple):
    """`start` is included, `end` excluded. `source`: what it is known from, a subscription of the meter at best."""

    start: datetime
    end: datetime
    source: Literal["subscription", "boundaries", "month"]


class UsageMoment(NamedTuple):
    """A moment of a customer's usage of a meter. `price` is that of a meter told by usage records, else None."""

    customer: str | None
    event_name: str
    at: datetime
    price: str | None = None


async def find_period(
    connection: AsyncConnection, customer: str | None, event_name: str, at: datetime, *, price: str | None = None
) -> Period:
    """The period of a customer's usage of a meter at an instant; of a reference that is not linked (None), the month.

    `price`: that of the meter's rules, if it has one. Such usage has no meter at Stripe to be known by.
    """
    (period,) = await find_periods(connection, [UsageMoment(customer, event_name, at, price)])
    return period


async def find_periods(connection: AsyncConnection, wanted: Sequence[UsageMoment]) -> list[Period]:
    """The same for many, in their order and with one query."""
    rows = [{"number": number, **usage._asdict(), "at": usage.at.isoformat()} for number, usage in enumerate(wanted)]
    found = await connection.execute(FIND_PERIODS, {"rows": json.dumps(rows)})
    return [
        _choose(usage.at, start, end, before, after)
        for usage, (start, end, before, after) in zip(wanted, found, strict=True)
    ]


def _choose(
    at: datetime, start: datetime | None, end: datetime | None, before: datetime | None, after: datetime | None
) -> Period:
    if start is not None and end is not None:
        return Period(start, end, "subscription")
    if before is not None and after is not None:
        return Period(before, after, "boundaries")
    month = at.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    next_month = month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)
    return Period(max(month, before or month), min(next_month, after or next_month), "month")
