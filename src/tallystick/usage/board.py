"""The period board: draft invoices that bill metered usage, how long they are drafts, and what Stripe was not told yet.

Stripe keeps the invoice of a period's end a draft for at least an hour. What it is told in that time is on the invoice.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import text

from tallystick import db
from tallystick.metrics import DRIFTS_OPEN, LATE_USAGE_EVENTS, UNBILLED_EVENTS, UNCONFIRMED_DELIVERIES
from tallystick.resources import Resources
from tallystick.stripe_limits import INVOICE_DRAFT_AT_LEAST
from tallystick.usage.agreement import LAG
from tallystick.usage.events import plain

# A meter once for each invoice, however many of the subscription's items it bills.
FIND_DRAFTS = text("""
    SELECT DISTINCT i.invoice, i.customer, i.subscription, i.period_start, i.period_end, i.created,
           coalesce(i.event_name, o.name) AS meter
      FROM metered_invoices i
      LEFT JOIN unnest(CAST(:prices AS text[]), CAST(:names AS text[])) AS o(price, name) ON o.price = i.price
     WHERE i.status = 'draft' AND coalesce(i.event_name, o.name) IS NOT NULL
     ORDER BY i.created, i.invoice, meter
""")

# `quantity` of a meter whose quantities do not add up says nothing here; its events do.
COUNT_USAGE = text("""
    WITH asked AS (
        SELECT * FROM json_to_recordset(CAST(:rows AS json))
                   AS r(number integer, customer text, meter text, period_start timestamptz, period_end timestamptz)
    ), totals AS (
        SELECT a.number, sum(t.quantity - t.sealed) AS quantity, sum(t.events - t.sealed_events)::bigint AS events,
               bool_and(t.aggregation IN ('sum', 'count')) AS additive
          FROM asked a
          JOIN customer_references r ON r.customer = a.customer
          JOIN usage_totals t ON t.customer_ref = r.ref AND t.meter = a.meter
                             AND t.bucket_start >= a.period_start AND t.bucket_start < a.period_end
         WHERE t.events <> t.sealed_events
         GROUP BY 1
    ), deliveries AS (
        SELECT a.number, d.state, sum(d.value) AS quantity, sum(d.events)::bigint AS events,
               bool_and(d.aggregation IN ('sum', 'count')) AS additive
          FROM asked a
          JOIN usage_deliveries d ON d.customer = a.customer AND d.event_name = a.meter
                                 AND d.timestamp >= extract(epoch FROM a.period_start)
                                 AND d.timestamp < extract(epoch FROM a.period_end)
         GROUP BY 1, 2
    )
    SELECT number, 'open' AS state, quantity, events, additive FROM totals
    UNION ALL SELECT number, state, quantity, events, additive FROM deliveries
""")

FIND_CHECKS = text("""
    SELECT c.customer, c.event_name, c.checked_at
      FROM usage_checks c
     WHERE (c.customer, c.event_name) IN (SELECT customer, meter FROM json_to_recordset(CAST(:rows AS json))
                                              AS r(customer text, meter text))
""")

MEASURE = text("""
    SELECT (SELECT count(*) FROM usage_drifts WHERE resolved_at IS NULL) AS drifts,
           (SELECT count(*) FROM usage_deliveries
             WHERE state = 'sent' AND sender <> 'usage_records' AND settled_at < :confirmed_within)
               AS unconfirmed,
           (SELECT coalesce(sum(t.events - t.sealed_events), 0)
              FROM usage_totals t JOIN customer_references r ON r.ref = t.customer_ref
             WHERE t.events <> t.sealed_events
               AND EXISTS (SELECT FROM period_boundaries b
                            WHERE b.customer = r.customer AND b.at >= t.bucket_end AND b.at <= :now))
         + (SELECT coalesce(sum(d.events), 0)
              FROM usage_deliveries d JOIN usage_totals t ON t.id = d.total_id
             WHERE (d.state = 'pending' OR d.state = 'sending')
               AND EXISTS (SELECT FROM period_boundaries b
                            WHERE b.customer = d.customer AND b.at >= t.bucket_end AND b.at <= :now)) AS unbilled,
           (SELECT coalesce(sum(events), 0) FROM usage_deliveries
             WHERE state = 'parked' AND reason = 'period_closed') AS late_parked, late.carried AS late_carried,
           late.taken AS late_taken
      FROM (SELECT coalesce(sum(events) FILTER (WHERE NOT taken_late), 0) AS carried,
                   coalesce(sum(events) FILTER (WHERE taken_late), 0) AS taken
              FROM usage_deliveries WHERE carried_from IS NOT NULL OR taken_late) late
""")


@dataclass
class MeterUsage:
    """Of one meter in one period: events, and for meters that add up quantities, by state (`open` is not sealed)."""

    meter: str
    events: dict[str, int] = field(default_factory=dict)
    quantities: dict[str, Decimal] = field(default_factory=dict)
    checked_at: datetime | None = None

    @property
    def unsent(self) -> int:
        return sum(self.events.get(state, 0) for state in ("open", "pending", "sending", "parked"))

    @property
    def confirmed(self) -> bool:
        """Whether all that there is was sent, and found again in Stripe's summaries."""
        return not self.unsent and not self.events.get("sent", 0)


@dataclass(frozen=True)
class OpenPeriod:
    """A draft invoice. `left` is for how long it is a draft at least; 0 means that it may be final any moment."""

    invoice: str
    customer: str
    subscription: str
    period_start: datetime
    period_end: datetime
    created: datetime
    left: timedelta
    meters: list[MeterUsage]

    @property
    def unsent(self) -> int:
        return sum(meter.unsent for meter in self.meters)

    @property
    def confirmed(self) -> bool:
        return all(meter.confirmed for meter in self.meters)

    def as_json(self) -> dict[str, Any]:
        """Times are UTC; `minutes_left` is a lower bound."""
        return {
            "invoice": self.invoice,
            "customer": self.customer,
            "subscription": self.subscription,
            "period_start": self.period_start.isoformat(),
            "period_end": self.period_end.isoformat(),
            "draft_at_least_until": (self.created + INVOICE_DRAFT_AT_LEAST).isoformat(),
            "minutes_left": self.left // timedelta(minutes=1),
            "unsent_events": self.unsent,
            "confirmed": self.confirmed,
            "meters": [
                {
                    "meter": meter.meter,
                    "events": meter.events,
                    "quantity": {state: plain(quantity) for state, quantity in meter.quantities.items()},
                    "confirmed": meter.confirmed,
                    "summary_checked_at": meter.checked_at and meter.checked_at.isoformat(),
                }
                for meter in self.meters
            ],
        }


async def list_open_periods(resources: Resources, now: datetime) -> list[OpenPeriod]:
    """All draft invoices that bill metered usage: those with something unsent first, then by the time that is left."""
    rules = resources.rules.current(now)
    priced = {meter.price: name for name, meter in rules.meters.items() if meter.price is not None}
    async with db.transaction(resources.engine) as connection:
        found = await connection.execute(FIND_DRAFTS, {"prices": list(priced), "names": list(priced.values())})
        drafts = found.mappings().all()
        rows = json.dumps([_asked(number, draft) for number, draft in enumerate(drafts)])
        counted = (await connection.execute(COUNT_USAGE, {"rows": rows})).all()
        checks = {
            (c.customer, c.event_name): c.checked_at for c in await connection.execute(FIND_CHECKS, {"rows": rows})
        }
    periods: dict[str, OpenPeriod] = {}
    meters: list[MeterUsage] = []
    for draft in drafts:
        left = max(draft["created"] + INVOICE_DRAFT_AT_LEAST - now, timedelta(0))
        names = ("invoice", "customer", "subscription", "period_start", "period_end", "created")
        period = periods.setdefault(
            draft["invoice"], OpenPeriod(**{name: draft[name] for name in names}, left=left, meters=[])
        )
        meters.append(MeterUsage(draft["meter"], checked_at=checks.get((draft["customer"], draft["meter"]))))
        period.meters.append(meters[-1])
    for number, state, quantity, events, additive in counted:
        meters[number].events[state] = events
        if additive:
            meters[number].quantities[state] = quantity
    return sorted(periods.values(), key=lambda period: (period.unsent == 0, period.confirmed, period.left))


async def measure_periods(resources: Resources, now: datetime) -> int:
    """The worker's loop that sets the gauges of what is not billed, not confirmed or late."""
    async with db.transaction(resources.engine) as connection:
        measured = (await connection.execute(MEASURE, {"now": now, "confirmed_within": now - LAG})).one()
    DRIFTS_OPEN.set(measured.drifts)
    UNCONFIRMED_DELIVERIES.set(measured.unconfirmed)
    UNBILLED_EVENTS.set(int(measured.unbilled))
    for kind in ("parked", "carried", "taken"):
        LATE_USAGE_EVENTS.labels(kind).set(int(getattr(measured, f"late_{kind}")))
    return 0


def _asked(number: int, draft: Mapping[Any, Any]) -> dict[str, object]:
    return {
        "number": number,
        "customer": draft["customer"],
        "meter": draft["meter"],
        "period_start": draft["period_start"].isoformat(),
        "period_end": draft["period_end"].isoformat(),
    }
