"""Usage that comes too late for its invoice. Stripe takes it even so, and bills it nowhere.

    before it is sent   parked as `period_closed`, or carried into the open period (`[usage] late` in the rules file);
                        in the transaction of the claim, so that nothing is sent that is known to be too late, or whose
                        outcome only Stripe's summaries can tell
    after it was sent   marked `taken_late`, and the product is told: when it is settled, or when the invoice's end
                        becomes known later than that

Usage is too late when an invoice that covers it and bills its meter is final, and no draft and no other open period of
the customer would bill it. Which invoice that is, the mirror says (the view `metered_invoices`).
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.stripe_limits import IDENTIFIER_UNIQUE_FOR
from tallystick.usage.parking import announce_parked
from tallystick.usage.parts import OLDEST_TO_SEND

# When Stripe no longer recognises an identifier, saying it again could bill it again. The hour is for the try itself,
# and for clocks.
UNKNOWN_FOR_AT_MOST = IDENTIFIER_UNIQUE_FOR - timedelta(hours=1)

INVOICES_PER_TRANSACTION = 100

# The delivery `d` is of the meter of `m`, or is told by usage records of its price.
_BILLS = "(m.event_name = d.event_name OR m.price = CAST(:prices AS json) ->> d.event_name)"

# When the last invoice that covers a delivery became final; null while it may still be billed.
_CLOSED_AT = f"""
    SELECT max(m.finalized_at) AS finalized_at
      FROM metered_invoices m
     WHERE m.customer = d.customer AND {_BILLS}
       AND m.period_start <= to_timestamp(d.timestamp) AND m.period_end > to_timestamp(d.timestamp)
    HAVING bool_and(m.status <> 'draft')
       AND NOT EXISTS (SELECT FROM metered_periods m
                        WHERE m.customer = d.customer AND {_BILLS}
                          AND m.period_start <= to_timestamp(d.timestamp) AND m.period_end > to_timestamp(d.timestamp)
                          AND NOT EXISTS (SELECT FROM invoices i
                                           WHERE i.subscription = m.subscription AND NOT i.deleted
                                             AND i.period_start <= to_timestamp(d.timestamp)
                                             AND i.period_end > to_timestamp(d.timestamp)))
"""  # noqa: S608  put together from constants

# A cheap look first: most usage is younger than the customer's last invoice.
MAY_BE_CLOSED = """
    EXISTS (SELECT FROM invoices i
             WHERE i.customer = d.customer AND i.status <> 'draft' AND i.period_end > to_timestamp(d.timestamp))
"""

_IS_CLOSED = f"{MAY_BE_CLOSED} AND EXISTS ({_CLOSED_AT})"

FIND_CLOSED = text(f"SELECT d.id FROM usage_deliveries d WHERE d.id = ANY(:ids) AND {_IS_CLOSED}")  # noqa: S608

# The name has gone to a meter that was made anew, with another formula: a sum would be counted there as one event.
_HAS_ANOTHER_METER = """
    d.sender <> 'usage_records'
    AND CASE WHEN d.aggregation IN ('max', 'unique_count') THEN 'last' ELSE d.aggregation END
        <> (SELECT m.formula FROM meters m WHERE m.event_name = d.event_name AND m.status = 'active'
             ORDER BY m.refreshed_at DESC, m.id LIMIT 1)
"""

FIND_MISNAMED = text(f"SELECT d.id FROM usage_deliveries d WHERE d.id = ANY(:ids) AND {_HAS_ANOTHER_METER}")  # noqa: S608

# What was tried is left as it is: its bytes never change, and an earlier try may have been taken. Usage records are set
# and not added: saying one again is harmless however long ago the first try was.
FIND_UNFIT = text(f"""
    SELECT id, reason
      FROM (SELECT d.id,
                   CASE WHEN d.unknown_since <= :unknown_since AND d.sender <> 'usage_records' THEN 'outcome_unknown'
                        WHEN {_HAS_ANOTHER_METER}
                        THEN CASE WHEN d.unknown_since IS NULL THEN 'meter_changed' ELSE 'outcome_unknown' END
                        WHEN d.unknown_since IS NOT NULL THEN NULL
                        WHEN {_IS_CLOSED} THEN 'period_closed'
                        WHEN d.timestamp < :oldest THEN 'older_than_35_days' END AS reason
              FROM usage_deliveries d WHERE d.id = ANY(:ids)) looked_at
     WHERE reason IS NOT NULL
""")  # noqa: S608

# A quantity that adds up may be billed in another period than it was used in; a latest or greatest value may not. Nor
# may many events of a meter that counts, of which one delivery says that they were too old: it would count them as one.
CARRY = text(f"""
    UPDATE usage_deliveries d
       SET timestamp = CAST(:second AS bigint), carried_from = coalesce(d.carried_from, t.bucket_start)
      FROM usage_totals t, (SELECT to_timestamp(CAST(:second AS bigint)) AS at) present
     WHERE d.id = ANY(:ids) AND t.id = d.total_id
       AND (d.aggregation = 'sum' OR d.aggregation = 'count' AND d.events = 1)
       AND EXISTS (SELECT FROM metered_periods m
                    WHERE m.customer = d.customer AND {_BILLS}
                      AND m.period_start <= present.at AND m.period_end > present.at
                      AND NOT EXISTS (SELECT FROM invoices i
                                       WHERE i.subscription = m.subscription AND NOT i.deleted AND i.status <> 'draft'
                                         AND i.period_start <= present.at AND i.period_end > present.at))
    RETURNING d.id
""")  # noqa: S608

PARK = text("""
    UPDATE usage_deliveries
       SET state = 'parked', reason = :reason, settled_at = :now, lease_until = NULL
     WHERE id = ANY(:ids) AND state IN ('pending', 'sending')
    RETURNING customer, identifier, event_name, timestamp, reason
""")

# `first`: the earliest moment at which Stripe may have taken it. When the invoice became final between that and the
# answer, nobody can tell on which side it was.
MARK_SETTLED = text(f"""
    WITH late AS (
        SELECT d.id, r.first > closed.finalized_at AS certain
          FROM json_to_recordset(CAST(:rows AS json)) AS r(id bigint, first timestamptz)
          JOIN usage_deliveries d USING (id)
         CROSS JOIN LATERAL ({_CLOSED_AT}) closed
         WHERE d.state IN ('sent', 'confirmed') AND NOT d.taken_late AND {MAY_BE_CLOSED}
           AND d.reason IS DISTINCT FROM 'taken_around_finalization' AND d.settled_at > closed.finalized_at
    )
    UPDATE usage_deliveries d
       SET taken_late = late.certain,
           reason = CASE WHEN late.certain THEN d.reason ELSE 'taken_around_finalization' END
      FROM late WHERE d.id = late.id
    RETURNING d.customer, d.identifier, d.event_name, d.timestamp,
              CASE WHEN late.certain THEN 'taken_after_finalization' ELSE 'taken_around_finalization' END AS reason
""")  # noqa: S608

# One whose customer has a delivery on its way waits for the next run: settled in this moment, it would be missed.
CLAIM_INVOICES = text("""
    SELECT id FROM invoices i
     WHERE finalized_at IS NOT NULL AND usage_checked_at IS NULL
       AND NOT EXISTS (SELECT FROM usage_deliveries d WHERE d.customer = i.customer AND d.state = 'sending')
     ORDER BY finalized_at LIMIT :limit
       FOR UPDATE SKIP LOCKED
""")

# A try whose worker died left no record; the first one that is recorded may not be the first. A first answer that was
# not "already exists" says that this try, and none before it, was taken.
FIND_TAKEN_SINCE = text("""
    SELECT d.id,
           CASE WHEN d.reason IS NULL AND d.sender = 'meter_events' THEN max(a.at) FILTER (WHERE a.outcome = 'sent')
                WHEN min(a.attempt) = 1 THEN min(a.at)
                ELSE d.created_at END AS first
      FROM metered_invoices m
      JOIN usage_deliveries d
        ON d.customer = m.customer
       AND (d.event_name = m.event_name OR m.price = CAST(:prices AS json) ->> d.event_name)
       AND d.timestamp >= extract(epoch FROM m.period_start) AND d.timestamp < extract(epoch FROM m.period_end)
      LEFT JOIN usage_delivery_attempts a ON a.delivery_id = d.id
     WHERE m.invoice = ANY(:invoices) AND d.state IN ('sent', 'confirmed') AND NOT d.taken_late
       AND d.settled_at > m.finalized_at
     GROUP BY d.id
""")

CHECKED = text("UPDATE invoices SET usage_checked_at = :now WHERE id = ANY(:invoices)")


@dataclass(frozen=True)
class Taken:
    """A delivery that Stripe took: at `first` at the earliest."""

    id: int
    first: datetime


async def set_aside(connection: AsyncConnection, ids: Collection[int], rules: Rules, now: datetime) -> None:
    """Of deliveries that are about to be sent, park or carry what must not be sent as it is. The caller commits."""
    asked = {
        "ids": sorted(ids),
        "unknown_since": now - UNKNOWN_FOR_AT_MOST,
        "oldest": int((now - OLDEST_TO_SEND).timestamp()),
        "prices": prices_of(rules),
    }
    unfit: dict[str, set[int]] = {}
    for id, reason in await connection.execute(FIND_UNFIT, asked):
        unfit.setdefault(reason, set()).add(id)
    if rules.usage.late == "carry" and (closed := unfit.get("period_closed")):
        closed -= await carry(connection, closed, rules, now)
    for reason, some in unfit.items():
        await park(connection, some, reason, now)


async def find_closed(connection: AsyncConnection, ids: Collection[int], rules: Rules) -> set[int]:
    """Those of the deliveries that no invoice would bill any more."""
    if not ids:
        return set()
    found = await connection.execute(FIND_CLOSED, {"ids": sorted(ids), "prices": prices_of(rules)})
    return set(found.scalars())


async def find_misnamed(connection: AsyncConnection, ids: Collection[int]) -> set[int]:
    """Those of the deliveries whose meter's name another meter has by now, with another formula."""
    if not ids:
        return set()
    return set((await connection.execute(FIND_MISNAMED, {"ids": sorted(ids)})).scalars())


async def carry(connection: AsyncConnection, ids: Collection[int], rules: Rules, now: datetime) -> set[int]:
    """Move deliveries to the present second, in the open period; which ones could be moved.

    Not those of `last`, `max` and `unique_count`, not many events of `count` in one, and not those of a customer
    without an open period for the meter.
    """
    if not ids:
        return set()
    second = int(now.timestamp())
    moved = await connection.execute(CARRY, {"ids": sorted(ids), "second": second, "prices": prices_of(rules)})
    return set(moved.scalars())


async def park(connection: AsyncConnection, ids: Collection[int], reason: str, now: datetime) -> None:
    """Park deliveries that are waiting, and tell the product of it."""
    if ids:
        parked = await connection.execute(PARK, {"ids": sorted(ids), "reason": reason, "now": now})
        await announce_parked(connection, parked.mappings().all())


async def mark_taken_late(connection: AsyncConnection, taken: Collection[Taken], rules: Rules) -> None:
    """Mark deliveries that Stripe took after their invoice was final, and tell the product of each, once.

    Only one whose customer has a final invoice that ends after it can be (`MAY_BE_CLOSED`).
    """
    if not taken:
        return
    rows = [{"id": each.id, "first": each.first.isoformat()} for each in taken]
    marked = await connection.execute(MARK_SETTLED, {"rows": json.dumps(rows), "prices": prices_of(rules)})
    await announce_parked(connection, marked.mappings().all())


async def check_finalized(resources: Resources, now: datetime) -> int:
    """The worker's loop: look once at each invoice that is final for usage that was taken later; how many invoices.

    Stripe may tell of the end of an invoice after that of its usage was settled.
    """
    rules = resources.rules.current(now)
    checked = 0
    while True:
        async with db.transaction(resources.engine) as connection:
            found = await connection.execute(CLAIM_INVOICES, {"limit": INVOICES_PER_TRANSACTION})
            invoices = list(found.scalars())
            if invoices:
                rows = await connection.execute(FIND_TAKEN_SINCE, {"invoices": invoices, "prices": prices_of(rules)})
                await mark_taken_late(connection, [Taken(*row) for row in rows], rules)
                await connection.execute(CHECKED, {"invoices": invoices, "now": now})
        checked += len(invoices)
        if len(invoices) < INVOICES_PER_TRANSACTION:
            return checked


def prices_of(rules: Rules) -> str:
    """The prices of the meters that are told by usage records, as a JSON object by event name."""
    return json.dumps({name: meter.price for name, meter in rules.meters.items() if meter.price is not None})
