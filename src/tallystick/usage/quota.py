"""`GET /v1/customers/{ref}/quota`: how much of a period's quota is used, from the same totals as everything else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.auth import bearer, require_scope
from tallystick.errors import NotFound
from tallystick.resources import Resources
from tallystick.rules import PLAIN_TEXT, MeterRules
from tallystick.usage.aggregations import Aggregation
from tallystick.usage.events import plain
from tallystick.usage.periods import UsageMoment, find_periods
from tallystick.usage.query import find_refs

router = APIRouter(dependencies=[bearer], tags=["customers"])

# What the customer used of each meter from `start` to `end`, over all of its references. If the meter's aggregation was
# changed within the period, what is counted now is what the newest total counts. Lateral, so that each span is read by
# the index, however many there are.
ADD_UP = text("""
    SELECT w.number, s.*
      FROM json_to_recordset(CAST(:rows AS json))
        AS w(number integer, refs text[], meter text, start timestamptz, "end" timestamptz)
     CROSS JOIN LATERAL (
           WITH chosen AS (
               SELECT * FROM usage_totals
                WHERE customer_ref = ANY(w.refs) AND meter = w.meter
                  AND bucket_start >= w.start AND bucket_start < w."end" AND events > 0
           )
           SELECT aggregation,
                  CASE WHEN aggregation IN ('sum', 'count') THEN sum(quantity)
                       WHEN aggregation = 'max' THEN max(quantity)
                       WHEN aggregation = 'last' THEN
                            (array_agg(quantity ORDER BY last_at DESC NULLS LAST, last_key COLLATE "C" DESC))[1]
                       ELSE (SELECT count(DISTINCT u.digest) FROM usage_uniques u
                              WHERE u.total_id IN (SELECT id FROM chosen WHERE aggregation = 'unique_count'))
                       END AS quantity,
                  sum(events)::bigint AS events
             FROM chosen
            WHERE aggregation = (SELECT aggregation FROM chosen ORDER BY bucket_start DESC, id DESC LIMIT 1)
            GROUP BY aggregation) s
""")

FIND_REACHED = text("""
    SELECT meter, threshold, reached_at
      FROM usage_thresholds
     WHERE customer = :customer AND (meter, period_start) IN (
               SELECT meter, start FROM json_to_recordset(CAST(:rows AS json)) AS r(meter text, start timestamptz))
     ORDER BY meter, threshold
""")


@dataclass(frozen=True)
class Span:
    """A meter of a customer, known by these references, from `start` (included) to `end` (excluded)."""

    refs: Sequence[str]
    meter: str
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Used:
    """What was used in a span; None as `aggregation` when nothing was."""

    aggregation: Aggregation | None
    quantity: Decimal
    events: int


class ReachedThreshold(BaseModel):
    """A declared quantity that was reached in this period."""

    threshold: str
    reached_at: datetime | None = Field(description="When it was announced; null: within the next seconds.")


class Quota(BaseModel):
    """One meter in its present billing period. Quantities are exact decimals, as text."""

    meter: str
    aggregation: Aggregation | None = Field(description="Null while nothing was used.")
    start: datetime
    end: datetime
    used: str
    events: int
    quota: str | None = Field(description="As the rules declare it.")
    remaining: str | None = Field(description="The quota less what was used, and never below 0.")
    next_threshold: str | None
    reached: list[ReachedThreshold]


class Quotas(BaseModel):
    """A customer's meters that have a quota or thresholds."""

    customer: str | None = Field(description="The Stripe customer, or null while the reference is not linked.")
    ref: str
    data: list[Quota]


@router.get(
    "/v1/customers/{ref}/quota",
    dependencies=[Depends(require_scope("usage:read"))],
    responses={404: {"description": "The rules declare nothing for this meter (`no-quota`)"}},
)
async def get_quota(
    request: Request,
    ref: Annotated[
        str,
        Path(
            min_length=1,
            max_length=100,
            pattern=PLAIN_TEXT,
            description="The product's own reference, or a `cus_…` id.",
            examples=["acme"],
        ),
    ],
    meter: Annotated[
        str | None,
        Query(min_length=1, max_length=100, pattern=PLAIN_TEXT, description="All with a quota or thresholds."),
    ] = None,
) -> Quotas:
    """What of each quota is used in the present billing period, within two seconds. Needs the scope `usage:read`."""
    now = datetime.now(UTC)
    resources: Resources = request.app.state.resources
    rules = resources.rules.current(now)
    declared = {
        name: rule
        for name, rule in sorted(rules.meters.items())
        if (rule.quota is not None or rule.thresholds) and meter in (None, name)
    }
    if meter is not None and not declared:
        raise NotFound(f"The rules declare neither a quota nor thresholds for the meter {meter!a}.", type="no-quota")
    async with db.transaction(resources.engine) as connection:
        customer, refs = await find_refs(connection, ref)
        periods = await find_periods(
            connection, [UsageMoment(customer, name, now, rule.price) for name, rule in declared.items()]
        )
        spans = [Span(refs, name, period.start, period.end) for name, period in zip(declared, periods, strict=True)]
        used = await add_up_spans(connection, spans)
        reached = await _find_reached(connection, customer, spans)
    return Quotas(
        customer=customer,
        ref=ref,
        data=[
            _show(span, declared[span.meter], each, reached.get(span.meter, {}))
            for span, each in zip(spans, used, strict=True)
        ],
    )


async def add_up_spans(connection: AsyncConnection, spans: Sequence[Span]) -> list[Used]:
    """What was used in each span, in their order and with one query."""
    rows = [
        {
            "number": number,
            "refs": list(span.refs),
            "meter": span.meter,
            "start": span.start.isoformat(),
            "end": span.end.isoformat(),
        }
        for number, span in enumerate(spans)
    ]
    found = {row.number: row for row in await connection.execute(ADD_UP, {"rows": json.dumps(rows)})}
    return [
        Used(found[number].aggregation, found[number].quantity, found[number].events)
        if number in found
        else Used(None, Decimal(0), 0)
        for number in range(len(spans))
    ]


async def _find_reached(
    connection: AsyncConnection, customer: str | None, spans: Sequence[Span]
) -> dict[str, dict[Decimal, datetime]]:
    rows = json.dumps([{"meter": span.meter, "start": span.start.isoformat()} for span in spans])
    reached: dict[str, dict[Decimal, datetime]] = {}
    for meter, threshold, at in await connection.execute(FIND_REACHED, {"customer": customer, "rows": rows}):
        reached.setdefault(meter, {})[threshold] = at
    return reached


def _show(span: Span, rule: MeterRules, used: Used, announced: dict[Decimal, Any]) -> Quota:
    # One that was reached stays so, even if a correction has gone below it since.
    reached = sorted({*announced, *(threshold for threshold in rule.thresholds if threshold <= used.quantity)})
    coming = [threshold for threshold in rule.thresholds if threshold > used.quantity and threshold not in announced]
    return Quota(
        meter=span.meter,
        aggregation=used.aggregation,
        start=span.start,
        end=span.end,
        used=plain(used.quantity),
        events=used.events,
        quota=None if rule.quota is None else plain(rule.quota),
        remaining=None if rule.quota is None else plain(max(rule.quota - used.quantity, Decimal(0))),
        next_threshold=plain(coming[0]) if coming else None,
        reached=[
            ReachedThreshold(threshold=plain(threshold), reached_at=announced.get(threshold)) for threshold in reached
        ],
    )
