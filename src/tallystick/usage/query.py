"""Usage as the totals have it: quantities of a customer by hour, day, month or billing period.

Totals are exact to the bucket, which is an hour cut at the customer's period boundaries. So every window must begin and
end at a whole hour (UTC) or at such a boundary: anything else could only be answered approximately, and is refused.

    sum, count      the buckets' quantities add up
    max             the greatest of them
    last            that of the latest event
    unique_count    the different values in all of them, each counted once
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from typing import Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.errors import InvalidRequest
from tallystick.rules import Rules
from tallystick.usage.aggregations import Aggregation
from tallystick.usage.buckets import floor_hour
from tallystick.usage.windows import Window, cut_at_periods, list_starts

FIND_CUSTOMER = text("SELECT customer FROM customer_references WHERE ref = :ref")
FIND_REFS = text("SELECT ref FROM customer_references WHERE customer = :customer")

IS_CUSTOMER = text("""
    SELECT EXISTS (SELECT FROM customer_references WHERE ref = :ref)
           OR EXISTS (SELECT FROM usage_totals WHERE customer_ref = :ref)
""")
IS_METER = text("SELECT EXISTS (SELECT FROM meters WHERE event_name = :meter)")

# The first condition is that of the index of totals that are not sealed: there are few of them.
FIND_UNLINKED = text("""
    SELECT count(DISTINCT customer_ref) AS number, min(bucket_start) AS since,
           (array_agg(customer_ref ORDER BY bucket_start, customer_ref))[1] AS oldest
      FROM usage_totals t
     WHERE events <> sealed_events
       AND NOT EXISTS (SELECT FROM customer_references r WHERE r.ref = t.customer_ref)
""")

# `edges` are the windows' beginnings and the last one's end; width_bucket finds a total's place among them.
ADD_UP = text("""
    WITH chosen AS (
        SELECT t.id, t.meter, t.aggregation, t.quantity, t.events, t.last_at, t.last_key, t.bucket_start,
               width_bucket(t.bucket_start, CAST(:edges AS timestamptz[])) AS place
          FROM usage_totals t
         WHERE t.customer_ref = ANY(:refs)
           AND t.bucket_start >= :from AND t.bucket_start < :to
           AND (CAST(:meters AS text[]) IS NULL OR t.meter = ANY(:meters))
    ), uniques AS (
        SELECT c.meter, c.place, count(DISTINCT u.digest) AS quantity
          FROM chosen c JOIN usage_uniques u ON u.total_id = c.id
         WHERE c.aggregation = 'unique_count'
         GROUP BY 1, 2
    )
    SELECT c.meter, c.aggregation, c.place,
           CASE WHEN c.aggregation IN ('sum', 'count') THEN sum(c.quantity)
                WHEN c.aggregation = 'max' THEN max(c.quantity)
                WHEN c.aggregation = 'last' THEN
                     (array_agg(c.quantity ORDER BY c.last_at DESC NULLS LAST, c.last_key COLLATE "C" DESC,
                                                    c.bucket_start DESC))[1]
                ELSE coalesce(min(u.quantity), 0) END AS quantity,
           sum(c.events)::bigint AS events
      FROM chosen c LEFT JOIN uniques u USING (meter, place)
     WHERE c.events > 0
     GROUP BY c.meter, c.aggregation, c.place
     ORDER BY c.place, c.meter, c.aggregation
""")

# By the values of one property. What events without the property used is the rest of the totals, with no value.
ADD_UP_GROUPS = text("""
    WITH chosen AS (
        SELECT t.id, t.meter, t.aggregation, t.quantity, t.events,
               width_bucket(t.bucket_start, CAST(:edges AS timestamptz[])) AS place
          FROM usage_totals t
         WHERE t.customer_ref = ANY(:refs)
           AND t.bucket_start >= :from AND t.bucket_start < :to
           AND t.meter = ANY(:meters) AND t.aggregation IN ('sum', 'count') AND t.events > 0
    ), parts AS (
        SELECT c.meter, c.aggregation, c.place, g.value, g.quantity, g.events
          FROM chosen c JOIN usage_group_totals g ON g.total_id = c.id AND g.property = :property
        UNION ALL
        SELECT meter, aggregation, place, NULL, quantity, events FROM chosen
        UNION ALL
        SELECT c.meter, c.aggregation, c.place, NULL, -g.quantity, -g.events
          FROM chosen c JOIN usage_group_totals g ON g.total_id = c.id AND g.property = :property
    )
    SELECT meter, aggregation, place, sum(quantity) AS quantity, sum(events)::bigint AS events, value
      FROM parts
     GROUP BY meter, aggregation, place, value
    HAVING sum(events) <> 0
     ORDER BY place, meter, aggregation, value NULLS LAST
""")

FIND_METERS = text("""
    SELECT DISTINCT meter FROM usage_totals
     WHERE customer_ref = ANY(:refs) AND bucket_start >= :from AND bucket_start < :to
     ORDER BY 1
""")

FIND_NOT_ADDITIVE = text("""
    SELECT min(meter) FROM usage_totals
     WHERE customer_ref = ANY(:refs) AND bucket_start >= :from AND bucket_start < :to
       AND meter = ANY(:meters) AND aggregation NOT IN ('sum', 'count')
""")

# Usage records have no meter at Stripe: their price says which of the rules' meters they are.
FIND_PERIODS = text("""
    SELECT coalesce(p.event_name, o.name) AS meter, p.period_start, p.period_end
      FROM metered_periods p
      LEFT JOIN unnest(CAST(:prices AS text[]), CAST(:names AS text[])) AS o(price, name) ON o.price = p.price
     WHERE p.customer = :customer AND p.period_start < :to AND p.period_end > :from
       AND p.period_start < p.period_end
     ORDER BY 2
""")

FIND_BOUNDARIES = text("""
    SELECT at FROM period_boundaries WHERE customer = :customer AND at BETWEEN :from AND :to ORDER BY 1
""")

# Of all periods that run now and bill the usage in question the one that began first, so that none is shown in part.
# Where nothing bills it, the customer's other period that began last: a boundary at which its usage is cut, too.
FIND_PERIOD_START = text("""
    SELECT coalesce(min(period_start) FILTER (
                        WHERE event_name = :meter OR CAST(:meter AS text) IS NULL AND event_name IS NOT NULL
                              OR price = ANY(CAST(:prices AS text[]))),
                    max(period_start))
      FROM metered_periods
     WHERE customer = :customer AND period_start <= :now AND period_end > :now
""")


@dataclass(frozen=True)
class Unlinked:
    """Usage of so many references that belong to no customer, `since` the hour of the `oldest`, a reference."""

    number: int
    since: datetime
    oldest: str


@dataclass(frozen=True)
class Row:
    """What a customer used of a meter in the window from `start` (included) to `end` (excluded).

    `group` is the value of the property that was asked for; None: events without it. `subscribed`: a subscription
    bills this meter at some time of the window.
    """

    meter: str
    aggregation: Aggregation
    start: datetime
    end: datetime
    quantity: Decimal
    events: int
    group: str | None
    subscribed: bool


@dataclass(frozen=True)
class Question:
    """What is asked: of a customer, by its name; None as `meter` stands for all. `time_zone` is an IANA name."""

    ref: str
    meter: str | None
    from_: datetime
    to: datetime
    window: Window
    time_zone: str = "UTC"
    group_by: str | None = None


@dataclass(frozen=True)
class Periods:
    """What is known of a customer's billing: each meter's periods, and all instants at which one begins or ends."""

    of_meters: Sequence[tuple[str, datetime, datetime]]
    boundaries: Sequence[datetime]

    def of(self, meter: str) -> list[tuple[datetime, datetime]]:
        return [(start, end) for name, start, end in self.of_meters if name == meter]


async def find_refs(connection: AsyncConnection, ref: str) -> tuple[str | None, list[str]]:
    """The Stripe customer of a reference, if it is linked, and all references of that customer."""
    customer = await connection.scalar(FIND_CUSTOMER, {"ref": ref})
    if customer is None:
        return None, [ref]
    return customer, list(await connection.scalars(FIND_REFS, {"customer": customer}))


async def find_unknown(
    connection: AsyncConnection, customer: str | None, meter: str | None, rules: Rules
) -> Literal["customer", "meter"] | None:
    """Which of two names without usage is nobody's, misspelt perhaps; None when both mean something or are None."""
    if customer is not None and not await connection.scalar(IS_CUSTOMER, {"ref": customer}):
        return "customer"
    if meter is not None and meter not in rules.meters and not await connection.scalar(IS_METER, {"meter": meter}):
        return "meter"
    return None


async def find_unlinked(connection: AsyncConnection) -> Unlinked | None:
    """What waits because its references belong to no customer; None when nothing does."""
    found = Unlinked(*(await connection.execute(FIND_UNLINKED)).one())
    return found if found.number else None


async def add_up_usage(connection: AsyncConnection, question: Question, rules: Rules) -> tuple[str | None, list[Row]]:
    """The customer of a reference and what it used in each window that has usage, in order of time.

    Raises `InvalidRequest` where a window begins or ends at an instant to which totals are not exact, and for a
    property that no meter in question declares.
    """
    customer, refs = await find_refs(connection, question.ref)
    periods = await _find_periods(connection, customer, question, rules)
    meters = _meters_of_group(question, rules)
    chosen: dict[str, object] = {"refs": refs, "from": question.from_, "to": question.to}
    await _check_group(connection, question, chosen, meters)
    if question.window != "billing_period":
        starts = list_starts(question.from_, question.to, question.window, question.time_zone)
        _check_ends(question, starts, periods.boundaries)
        return customer, await _add_up(connection, question, chosen, meters, starts, periods)
    rows: list[Row] = []
    for meter in meters if meters is not None else list(await connection.scalars(FIND_METERS, chosen)):
        starts = cut_at_periods(question.from_, question.to, periods.of(meter), periods.boundaries)
        _check_ends(question, starts, periods.boundaries)
        rows += await _add_up(connection, question, chosen, [meter], starts, periods)
    return customer, sorted(rows, key=lambda row: (row.start, row.meter, row.aggregation))


async def _add_up(
    connection: AsyncConnection,
    question: Question,
    chosen: dict[str, object],
    meters: list[str] | None,
    starts: list[datetime],
    periods: Periods,
) -> list[Row]:
    parameters = chosen | {"meters": meters, "edges": [*starts, question.to]}
    if question.group_by is None:
        found = await connection.execute(ADD_UP, parameters)
    else:
        found = await connection.execute(ADD_UP_GROUPS, parameters | {"property": question.group_by})
    windows = list(pairwise([*starts, question.to]))
    rows = []
    for meter, aggregation, place, quantity, events, *group in found:
        start, end = windows[place - 1]
        subscribed = any(begins < end and ends > start for begins, ends in periods.of(meter))
        rows.append(Row(meter, aggregation, start, end, quantity, events, group[0] if group else None, subscribed))
    return rows


async def _find_periods(connection: AsyncConnection, customer: str | None, question: Question, rules: Rules) -> Periods:
    priced = {meter.price: name for name, meter in rules.meters.items() if meter.price is not None}
    span = {"customer": customer, "from": question.from_, "to": question.to}
    found = await connection.execute(FIND_PERIODS, span | {"prices": list(priced), "names": list(priced.values())})
    of_meters = [(meter, start, end) for meter, start, end in found if meter is not None]
    return Periods(of_meters, list(await connection.scalars(FIND_BOUNDARIES, span)))


def _meters_of_group(question: Question, rules: Rules) -> list[str] | None:
    """The meters to be answered for, or None for all of them. A property is asked of the meters that declare it."""
    asked = None if question.meter is None else [question.meter]
    if question.group_by is None:
        return asked
    declared = {name: meter.properties for name, meter in rules.meters.items()}
    meters = [name for name in (asked or declared) if question.group_by in declared.get(name, ())]
    if not meters:
        who = "No meter" if question.meter is None else f"The meter {question.meter!a} is not one that"
        raise InvalidRequest(f"{who} declares the property {question.group_by!a}.", field="group_by")
    return meters


async def _check_group(
    connection: AsyncConnection, question: Question, chosen: dict[str, object], meters: list[str] | None
) -> None:
    if question.group_by is None:
        return
    meter = await connection.scalar(FIND_NOT_ADDITIVE, chosen | {"meters": meters})
    if meter is not None:
        raise InvalidRequest(
            f"The quantities of the meter {meter!a} do not add up, so they cannot be grouped; name another meter.",
            field="group_by",
        )


def _check_ends(question: Question, starts: list[datetime], boundaries: Sequence[datetime]) -> None:
    exact = set(boundaries)
    for at in (question.from_, question.to, *starts):
        if at == floor_hour(at) or at in exact:
            continue
        if at in (question.from_, question.to):
            raise InvalidRequest(
                "It must be a whole hour, or an instant at which one of the customer's billing periods begins or ends.",
                field="from" if at == question.from_ else "to",
            )
        raise InvalidRequest(
            f"A {question.window} of {question.time_zone} begins at {at:%H:%M} UTC, within an hour, and totals are"
            " exact to the hour of UTC. Ask in UTC, or by billing period.",
            field="time_zone",
        )


async def find_period_start(
    connection: AsyncConnection, ref: str, meter: str | None, rules: Rules, now: datetime
) -> datetime | None:
    """When the present billing periods of a customer began, of one meter or of any; None when no period runs."""
    customer, _ = await find_refs(connection, ref)
    prices = [its.price for name, its in rules.meters.items() if its.price is not None and meter in (None, name)]
    start: datetime | None = await connection.scalar(
        FIND_PERIOD_START, {"customer": customer, "meter": meter, "prices": prices, "now": now}
    )
    return start
