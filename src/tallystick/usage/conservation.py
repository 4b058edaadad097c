"""Conservation: what was accepted is somewhere. The ledger equals the sum of all named states (invariant I2).

Events are counted for every meter. Quantities are added up for the meters whose quantities add up, `sum` and `count`:
of the others a delivery says a latest, greatest or distinct value, and adding those would mean nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.usage.events import plain

STATES = ("open", "pending", "sending", "sent", "confirmed", "parked", "voided")

# Whoever adds up the whole ledger waits for it; the limits of a request would end it.
WHOLE_LEDGER_TIMEOUT = timedelta(minutes=30)

# {delivered}: both numbers of each state. An event without a total would be in no state, and so a difference.
COUNT = """
    WITH ledger AS (
        SELECT coalesce(sum(quantity), 0) AS quantity, coalesce(sum(events), 0)::bigint AS events
          FROM (SELECT sum(e.value) FILTER (WHERE t.aggregation IN ('sum', 'count')) AS quantity, count(*) AS events
                  FROM usage_events e LEFT JOIN usage_totals t ON t.id = e.total_id
                UNION ALL SELECT sum(quantity), sum(events) FROM usage_retired) held
    ), totals AS (
        SELECT coalesce(sum(quantity - sealed) FILTER (WHERE aggregation IN ('sum', 'count')), 0) AS open,
               coalesce(sum(events - sealed_events), 0)::bigint AS open_events
          FROM usage_totals
    ), deliveries AS (
        SELECT {delivered}
          FROM usage_deliveries d JOIN usage_totals t ON t.id = d.total_id
    )
    SELECT ledger.quantity AS accepted, ledger.events AS accepted_events, totals.*, deliveries.*
      FROM ledger, totals, deliveries
"""

# The same, by reference and meter, for some of the totals. Each is in one hour, so its events are of one day.
COUNT_SLICES = """
    WITH chosen AS (
        SELECT id, customer_ref, meter, aggregation IN ('sum', 'count') AS additive,
               quantity - sealed AS open, events - sealed_events AS open_events
          FROM usage_totals t WHERE {chosen}
    ), ledger AS (
        SELECT t.customer_ref, t.meter, t.additive, sum(e.value) AS accepted, count(*) AS accepted_events
          FROM chosen t JOIN usage_events e ON e.total_id = t.id AND {days}
         GROUP BY 1, 2, 3
    ), totals AS (
        SELECT customer_ref, meter, additive, sum(open) AS open, sum(open_events)::bigint AS open_events
          FROM chosen GROUP BY 1, 2, 3
    ), deliveries AS (
        SELECT t.customer_ref, t.meter, t.additive, {delivered}
          FROM chosen t JOIN usage_deliveries d ON d.total_id = t.id
         GROUP BY 1, 2, 3
    )
    SELECT coalesce(r.customer, t.customer_ref) AS customer, t.meter, t.additive,
           {summed}
      FROM totals t
      LEFT JOIN ledger USING (customer_ref, meter, additive)
      LEFT JOIN deliveries USING (customer_ref, meter, additive)
      LEFT JOIN customer_references r ON r.ref = t.customer_ref
     GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""

FIND_FIRST_DAY = text("SELECT max(day) + 1 FROM usage_retired")

_BOTH = [f"{state}{events}" for state in STATES for events in ("", "_events")]


def _delivered(additive: str) -> str:
    return ", ".join(
        f"coalesce(sum(d.value) FILTER (WHERE d.state = '{state}' AND {additive}), 0) AS {state},"
        f" coalesce(sum(d.events) FILTER (WHERE d.state = '{state}'), 0)::bigint AS {state}_events"
        for state in STATES[1:]
    )


_COUNT = COUNT.format(delivered=_delivered("t.aggregation IN ('sum', 'count')"))
_SUMMED = ", ".join(f"coalesce(sum({name}), 0) AS {name}" for name in ("accepted", "accepted_events", *_BOTH))


@dataclass(frozen=True)
class Conservation:
    """What was accepted, and where it is: quantities of the meters that add up, and events of all meters.

    `open` is not sealed yet; the others are the states of deliveries. `events_by_state` has the same names.
    """

    accepted: Decimal
    events: int
    open: Decimal
    pending: Decimal
    sending: Decimal
    sent: Decimal
    confirmed: Decimal
    parked: Decimal
    voided: Decimal
    events_by_state: Mapping[str, int]

    @property
    def difference(self) -> Decimal:
        """Accepted less everything that is accounted for; anything but 0 is a bug."""
        with localcontext(prec=200):  # sums of many 15-digit values have more digits than the default context keeps
            return self.accepted - sum((getattr(self, state) for state in STATES), Decimal(0))

    @property
    def events_difference(self) -> int:
        """The same in events."""
        return self.events - sum(self.events_by_state.values())

    @property
    def holds(self) -> bool:
        """Whether nothing is missing and nothing is there twice."""
        return not self.difference and not self.events_difference

    @property
    def unsent_events(self) -> int:
        """How many events Stripe has not been told yet and will be."""
        return sum(self.events_by_state[state] for state in ("open", "pending", "sending"))

    def as_json(self) -> dict[str, dict[str, str | int]]:
        """`events` and `quantity`, each by state, accepted and difference; quantities as exact decimal text."""
        quantities = {name: plain(getattr(self, name)) for name in ("accepted", *STATES, "difference")}
        events = {"accepted": self.events, **self.events_by_state, "difference": self.events_difference}
        return {"events": dict(events), "quantity": dict(quantities)}


@dataclass(frozen=True)
class Slice:
    """Which totals: of some references, of a meter, of buckets that begin in `from_ … to`; None stands for all."""

    refs: Sequence[str] | None = None
    meter: str | None = None
    from_: datetime | None = None
    to: datetime | None = None


@dataclass(frozen=True)
class MeterConservation:
    """The conservation of one customer (a Stripe customer, or a reference that is not linked) and meter.

    `additive`: its quantities add up. A meter whose aggregation was changed has two parts.
    """

    customer: str
    meter: str
    additive: bool
    counted: Conservation


async def count_conservation(connection: AsyncConnection, patience: timedelta = WHOLE_LEDGER_TIMEOUT) -> Conservation:
    """Add up both sides of the whole ledger, in one statement and so from one snapshot."""
    (row,) = await db.fetch_patiently(connection, _COUNT, [], patience)
    return _read(row)


async def count_slices(connection: AsyncConnection, wanted: Slice, patience: timedelta) -> list[MeterConservation]:
    """Both sides of a slice by customer and meter, in one statement. Raises `TimeoutError` after `patience`.

    Of days whose single events are past the retention only the sums of all customers are left: a slice begins after
    them, at `find_first_day` or later.
    """
    conditions = {"customer_ref = ANY({})": wanted.refs, "meter = {}": wanted.meter}
    times = {"bucket_start >= {}": wanted.from_, "bucket_start < {}": wanted.to}
    days = {"e.day >= {}": wanted.from_ and wanted.from_.date(), "e.day <= {}": wanted.to and wanted.to.date()}
    parameters: list[Any] = []

    def where(conditions: Mapping[str, Any]) -> str:
        parts = ["true"]
        for condition, value in conditions.items():
            if value is not None:
                parameters.append(value)
                parts.append(condition.format(f"${len(parameters)}"))
        return " AND ".join(parts)

    statement = COUNT_SLICES.format(
        chosen=where(conditions | times), days=where(days), delivered=_delivered("t.additive"), summed=_SUMMED
    )
    rows = await db.fetch_patiently(connection, statement, parameters, patience)
    return [MeterConservation(row["customer"], row["meter"], row["additive"], _read(row)) for row in rows]


async def find_first_day(connection: AsyncConnection) -> datetime | None:
    """The first instant whose single events are all still there; None while no partition was dropped yet."""
    day = await connection.scalar(FIND_FIRST_DAY)
    return None if day is None else datetime.fromisoformat(f"{day}T00:00:00+00:00")


def _read(row: Mapping[str, Any]) -> Conservation:
    additive = row.get("additive", True)
    return Conservation(
        accepted=row["accepted"] if additive else Decimal(0),
        events=int(row["accepted_events"]),
        **{state: row[state] if additive else Decimal(0) for state in STATES},
        events_by_state={state: int(row[f"{state}_events"]) for state in STATES},
    )
