"""Thresholds: the product is told when a customer's usage of a meter reaches a declared quantity, once each a period.

What was announced and its notification are written in one transaction, so a crash announces it later and never twice.
What is to be looked at:

    usage that is not sealed    found at each run
    what was sealed             written down with the seal (usage/sealing.py), for as long as nobody has looked
    all running periods         when other thresholds are declared than at the last run
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
from tallystick.usage.periods import UsageMoment, find_periods
from tallystick.usage.quota import Span, add_up_spans
from tallystick.usage.sealing import FIND_CUSTOMERS

# A period of hourly totals is some 720 rows each.
SPANS_PER_TRANSACTION = 200

READ_DECLARED = text("SELECT meter, declared FROM usage_threshold_meters")

# Whoever finds another declaration has everybody looked at anew. Who finds it at the same time waits for the other's
# end, and then finds it declared.
DECLARE = """
    WITH changed AS (
        INSERT INTO usage_threshold_meters AS m (meter, declared)
        SELECT * FROM unnest(CAST($1 AS text[]), CAST($2 AS text[])) AS r(meter, declared) ORDER BY meter
        ON CONFLICT (meter) DO UPDATE SET declared = excluded.declared WHERE m.declared <> excluded.declared
        RETURNING meter
    )
    INSERT INTO usage_threshold_looks (customer_ref, meter, at)
    SELECT min(r.ref), c.meter, CAST($3 AS timestamptz)
      FROM changed c CROSS JOIN customer_references r
     WHERE EXISTS (SELECT FROM usage_totals t WHERE t.customer_ref = r.ref AND t.meter = c.meter)
     GROUP BY r.customer, c.meter
"""

# A hundred thousand customers take a second.
DECLARE_WITHIN = timedelta(minutes=1)

# What is sealed while a meter has no thresholds is not written down, so they count as new when they come back.
FORGET = text("""
    WITH forgotten AS (DELETE FROM usage_threshold_meters WHERE meter <> ALL(:meters))
    DELETE FROM usage_threshold_looks WHERE meter <> ALL(:meters)
""")

# Usage that came late is in the total of its own hour, so it counts in the period of that hour.
FIND_OPEN = text("""
    SELECT DISTINCT r.customer, t.meter, t.bucket_start
      FROM usage_totals t JOIN customer_references r ON r.ref = t.customer_ref
     WHERE t.meter = ANY(:meters) AND t.events <> t.sealed_events
     ORDER BY 1, 2, 3
""")

TAKE_LOOKS = text("""
    DELETE FROM usage_threshold_looks
     WHERE id = ANY(ARRAY(SELECT id FROM usage_threshold_looks ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED))
    RETURNING customer_ref, meter, at
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
    async with db.transaction(resources.engine) as connection:
        await _declare(connection, rules, meters, now)
    if not meters:
        return 0
    # After the declaration: what is sealed from here on is written down.
    async with db.transaction(resources.engine) as connection:
        found = await connection.execute(FIND_OPEN, {"meters": meters})
        usages = [UsageMoment(customer, meter, at, rules.meters[meter].price) for customer, meter, at in found]
    announced = 0
    for some in _cut(usages):
        async with db.transaction(resources.engine) as connection:
            announced += await _announce(connection, some, rules, now)
    taken = SPANS_PER_TRANSACTION
    while taken == SPANS_PER_TRANSACTION:
        async with db.transaction(resources.engine) as connection:
            # Died here: nothing was taken.
            taken, some = await _take_looks(connection, rules)
            announced += await _announce(connection, some, rules, now)
    return announced


async def _declare(connection: AsyncConnection, rules: Rules, meters: Sequence[str], now: datetime) -> None:
    """Have everybody looked at whose meter has other thresholds than at the last run."""
    known: dict[str, str] = {row.meter: row.declared for row in await connection.execute(READ_DECLARED)}
    declared = {meter: " ".join(map(plain, rules.meters[meter].thresholds)) for meter in meters}
    if known.keys() - declared.keys():
        await connection.execute(FORGET, {"meters": meters})
    new = {meter: said for meter, said in declared.items() if known.get(meter) != said}
    if new:
        await db.fetch_patiently(connection, DECLARE, [list(new), list(new.values()), now], DECLARE_WITHIN)


async def _take_looks(connection: AsyncConnection, rules: Rules) -> tuple[int, list[UsageMoment]]:
    """Take what is written down to be looked at: how much it was, and what of it is a customer's."""
    looks = (await connection.execute(TAKE_LOOKS, {"limit": SPANS_PER_TRANSACTION})).all()
    if not looks:
        return 0, []
    known = await connection.execute(FIND_CUSTOMERS, {"refs": sorted({look.customer_ref for look in looks})})
    customers: dict[str, str] = {row.ref: row.customer for row in known}
    usages = {
        UsageMoment(customers[look.customer_ref], look.meter, look.at, rules.meters[look.meter].price)
        for look in looks
        if look.customer_ref in customers and look.meter in rules.meters
    }
    return len(looks), sorted(usages, key=lambda usage: (usage.customer or "", usage.event_name, usage.at))


async def _announce(connection: AsyncConnection, usages: Sequence[UsageMoment], rules: Rules, now: datetime) -> int:
    if not usages:
        return 0
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


def _cut(usages: Sequence[UsageMoment]) -> Iterator[Sequence[UsageMoment]]:
    for first in range(0, len(usages), SPANS_PER_TRANSACTION):
        yield usages[first : first + SPANS_PER_TRANSACTION]
