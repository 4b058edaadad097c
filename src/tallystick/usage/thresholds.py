"""Thresholds: the product is told when a customer's usage of a meter reaches a declared quantity, once each a period.

What was announced and its notification are written in one transaction, so a crash announces it later and never twice.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.notifications.outbox import Notification, queue_notifications
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.usage.events import plain
from tallystick.usage.periods import Usage, find_periods
from tallystick.usage.quota import Span, add_up_spans

# Longer than a run and the pause after it: what was sealed between two runs is still looked at.
CHANGED_WITHIN = timedelta(minutes=1)

# A period of hourly totals is some 720 rows each.
SPANS_PER_TRANSACTION = 200

# Totals that have changed lately are those with something to seal, and those that were just sealed. Usage that came
# late is in the total of its own hour, so it counts in the period of that hour.
FIND_CHANGED = text("""
    SELECT DISTINCT r.customer, t.meter, t.bucket_start
      FROM usage_totals t JOIN customer_references r ON r.ref = t.customer_ref
     WHERE t.meter = ANY(:meters) AND (t.events <> t.sealed_events OR t.sealed_at > :sealed_after)
     ORDER BY 1, 2, 3
""")

FIND_NAMES = text("""
    SELECT a.customer, ARRAY(SELECT a.customer UNION SELECT unnest(n.refs)) AS refs
      FROM unnest(CAST(:customers AS text[])) AS a(customer) LEFT JOIN customer_names n ON n.customer = a.customer
""")

# Who announces at the same time waits for the other's end, and then finds that it was announced.
NOTE_REACHED = text("""
    INSERT INTO usage_thresholds (customer, meter, period_start, threshold, quantity, reached_at)
    SELECT customer, meter, period_start, threshold, quantity, :now
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(customer text, meter text, period_start timestamptz, threshold numeric, quantity numeric)
     ORDER BY customer, meter, period_start, threshold
    ON CONFLICT DO NOTHING
    RETURNING customer, meter, period_start, threshold, quantity
""")


async def announce_thresholds(resources: Resources, now: datetime) -> int:
    """Queue `usage.threshold_reached` for what was reached since; how many."""
    rules = resources.rules.current(now)
    meters = sorted(name for name, rule in rules.meters.items() if rule.thresholds)
    if not meters:
        return 0
    async with db.transaction(resources.engine) as connection:
        changed = await connection.execute(FIND_CHANGED, {"meters": meters, "sealed_after": now - CHANGED_WITHIN})
        usages = [Usage(customer, meter, at, rules.meters[meter].price) for customer, meter, at in changed]
    announced = 0
    for some in _cut(usages):
        async with db.transaction(resources.engine) as connection:
            announced += await _announce(connection, some, rules, now)
    return announced


async def _announce(connection: AsyncConnection, usages: Sequence[Usage], rules: Rules, now: datetime) -> int:
    periods = await find_periods(connection, usages)
    found = await connection.execute(FIND_NAMES, {"customers": sorted({str(usage.customer) for usage in usages})})
    names: dict[str, list[str]] = {row.customer: row.refs for row in found}
    spans: dict[tuple[str, str, datetime], Span] = {}
    for usage, period in zip(usages, periods, strict=True):
        customer = str(usage.customer)
        spans[customer, usage.event_name, period.start] = Span(
            names[customer], usage.event_name, period.start, period.end
        )
    used = dict(zip(spans, await add_up_spans(connection, list(spans.values())), strict=True))
    rows = [
        {
            "customer": customer,
            "meter": meter,
            "period_start": start.isoformat(),
            "threshold": str(threshold),
            "quantity": str(used[customer, meter, start].quantity),
        }
        for customer, meter, start in spans
        for threshold in rules.meters[meter].thresholds
        if threshold <= used[customer, meter, start].quantity
    ]
    if not rows:
        return 0
    reached = (await connection.execute(NOTE_REACHED, {"rows": json.dumps(rows), "now": now})).all()
    await queue_notifications(
        connection, [_tell(row, spans[row.customer, row.meter, row.period_start].end) for row in _in_order(reached)]
    )
    return len(reached)


def _tell(row: Any, end: datetime) -> Notification:
    return Notification(
        "usage.threshold_reached",
        row.customer,
        {
            "meter": row.meter,
            "threshold": plain(row.threshold),
            "quantity": plain(row.quantity),
            "period_start": row.period_start.astimezone(UTC).isoformat(),
            "period_end": end.astimezone(UTC).isoformat(),
        },
    )


def _in_order(reached: Sequence[Any]) -> list[Any]:
    return sorted(reached, key=lambda row: (row.customer, row.meter, row.period_start, row.threshold))


def _cut(usages: Sequence[Usage]) -> Iterator[Sequence[Usage]]:
    for first in range(0, len(usages), SPANS_PER_TRANSACTION):
        yield usages[first : first + SPANS_PER_TRANSACTION]
