"""Sealing: what a total has gathered since its last seal becomes a delivery, written down before anyone calls Stripe.

When a total is due:

    its bucket has ended        hourly by default (`TALLYSTICK_SEAL_EVERY_SECONDS`); at once when its period has
                                ended too
    a threshold is reached      `TALLYSTICK_SEAL_THRESHOLD`, in the bucket that is still open
    many events wait one by one those of a `count` meter, of which each is a delivery
    its period ends soon        usage records only, which Stripe takes in the present period and not later
    Stripe drafted an invoice   a row in `seal_requests`, written in the webhook's own transaction
    by command                  `tallystick flush`

A delivery's identifier is made of the total's key and the seal's number, so sealing twice cannot make two deliveries
of one quantity: the number and the quantity move together in one transaction.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.redis_client import REDIS_ERRORS
from tallystick.resources import Resources
from tallystick.rules import MeterRules
from tallystick.stripe_limits import METER_EVENT_MAX_AGE
from tallystick.usage.aggregations import NO_RULES
from tallystick.usage.cuts import cut_totals
from tallystick.usage.drain import drain
from tallystick.usage.events import plain
from tallystick.usage.meters import read_meters
from tallystick.usage.parking import announce_parked
from tallystick.usage.parts import COUNTED_PER_SEAL, Part, Total, list_parts, make_identifier
from tallystick.usage.sealing_requests import forget_requests, read_requests

# To find what is due costs a look at all that is open, so it is done once for many; it is sealed in transactions of a
# bounded size: a running value takes a lock for each customer and meter, of which PostgreSQL has room for some
# thousands, and the drain waits for what is locked.
FOUND_AT_ONCE = 50_000
TOTALS_PER_TRANSACTION = 1_000
# Of totals that PostgreSQL refuses, one after the other; after more of them it is not they that are wrong.
FAILURES_AT_MOST = 10

# Usage of an hour that has just ended may still be on its way through Redis.
HOUR_SETTLES_IN = timedelta(seconds=60)

# Usage records of a period are taken until it ends, so that its last ones must be told before: the nearer its end the
# less is left out, and each telling is a call.
RECORDS_BEFORE_END = timedelta(minutes=15)
RECORDS_EVERY = timedelta(seconds=60)

# A total without a linked customer or without a meter that it fits stays open. One whose customer has no subscription
# waits a while for it: the subscription's start may cut the bucket, and without one there is no invoice to be in time
# for.
DUE = """
      FROM usage_totals t
      JOIN {customers}
      JOIN unnest(CAST(:meters AS text[]), CAST(:formulas AS text[])) AS m(meter, formula)
        ON m.meter = t.meter
       AND m.formula = CASE WHEN t.aggregation IN ('max', 'unique_count') THEN 'last' ELSE t.aggregation END
     WHERE t.events <> t.sealed_events AND ({{due}})
"""
IN_ORDER = "ORDER BY t.customer_ref, t.meter, t.bucket_start"
FIND_DUE = f"""
    SELECT t.id, t.customer_ref {DUE.format(customers="customer_references r ON r.ref = t.customer_ref")}
    {IN_ORDER} LIMIT :limit
"""
# A reference may have been linked to another customer since, and another worker may have sealed some of the totals.
# Who is who is looked up for these alone: joined with the totals, PostgreSQL reads all customers, or each reference for
# each total, by what it thinks how many there are.
FIND_CUSTOMERS = text("SELECT ref, customer FROM customer_references WHERE ref = ANY(:refs)")
_FOUND = "unnest(CAST(:ids AS bigint[]), CAST(:customers AS text[])) AS r(id, customer) ON r.id = t.id"
LOCK_DUE = f"""
    SELECT t.id, t.customer_ref, t.meter, t.bucket_start, t.bucket_end, t.aggregation, t.quantity,
           t.quantity - t.sealed AS unsealed, t.events - t.sealed_events AS unsealed_events, t.seal, r.customer
    {DUE.format(customers=_FOUND)}
    {IN_ORDER} FOR UPDATE OF t {{locked}}
"""

# By time, a total is due for any one of these reasons, if its customer has a subscription or was waited for.
THRESHOLD_REACHED = "t.quantity - t.sealed >= :threshold"
MANY_COUNTED = "t.aggregation = 'count' AND t.events - t.sealed_events >= :counted"
PERIOD_ENDS_SOON = """
    t.meter = ANY(:recorded) AND (t.sealed_at IS NULL OR t.sealed_at <= :recorded_before)
    AND EXISTS (SELECT FROM period_boundaries b WHERE b.customer = r.customer AND b.at > :now AND b.at <= :ending)
"""
BUCKET_ENDED = """
    t.bucket_end <= :settled
    AND (t.sealed_at IS NULL
         OR t.sealed_at <= :sealed_before
         OR EXISTS (SELECT FROM period_boundaries b
                     WHERE b.customer = r.customer AND b.at >= t.bucket_end AND b.at <= :now))
"""
SUBSCRIBED_OR_WAITED_FOR = """
    (EXISTS (SELECT FROM subscriptions s WHERE s.customer = r.customer) OR t.opened_at <= :held_until)
"""

INSERT_DELIVERIES = text("""
    INSERT INTO usage_deliveries
           (total_id, opened_seal, seal, events, customer, event_name, identifier, payload, value, timestamp, state,
            reason, aggregation, sender, next_attempt_at, settled_at)
    SELECT total_id, opened_seal, seal, events, customer, event_name, identifier, CAST(payload AS jsonb),
           CAST(value AS numeric), timestamp, state, reason, aggregation, sender, :now,
           CASE WHEN state <> 'pending' THEN CAST(:now AS timestamptz) END
      FROM unnest(CAST(:total_id AS bigint[]), CAST(:opened_seal AS integer[]), CAST(:seal AS integer[]),
                  CAST(:events AS bigint[]), CAST(:customer AS text[]), CAST(:event_name AS text[]),
                  CAST(:identifier AS text[]), CAST(:payload AS text[]), CAST(:value AS text[]),
                  CAST(:timestamp AS bigint[]), CAST(:state AS text[]), CAST(:reason AS text[]),
                  CAST(:aggregation AS text[]), CAST(:sender AS text[]))
        AS r(total_id, opened_seal, seal, events, customer, event_name, identifier, payload, value, timestamp, state,
             reason, aggregation, sender)
""")

# The totals are locked, so what is open is still what was read. One of which a part stays open remains due. What is
# sealed is no longer found as open usage, so it is written down where a threshold may have been reached by it.
CLOSE_SEALS = text("""
    WITH closed AS (
        UPDATE usage_totals t
           SET sealed = t.sealed + CAST(r.quantity AS numeric), sealed_events = t.sealed_events + r.events,
               seal = r.next_seal,
               sealed_at = CASE WHEN t.events = t.sealed_events + r.events THEN :now ELSE t.sealed_at END
          FROM unnest(CAST(:id AS bigint[]), CAST(:next_seal AS integer[]), CAST(:quantity AS text[]),
                      CAST(:events AS bigint[])) AS r(id, next_seal, quantity, events)
         WHERE t.id = r.id
        RETURNING t.customer_ref, t.meter, t.bucket_start
    )
    INSERT INTO usage_threshold_looks (customer_ref, meter, at)
    SELECT c.customer_ref, c.meter, c.bucket_start FROM closed c JOIN usage_threshold_meters m ON m.meter = c.meter
""")


@dataclass(frozen=True)
class Route:
    """How a meter's usage is told to Stripe: by which sender, and what its payload is made of."""

    event_name: str
    formula: str
    sender: str
    customer_key: str
    value_key: str
    price: str | None

    def payload(self, customer: str, value: Decimal) -> dict[str, str]:
        """What is sent, word for word. A usage record's quantity is that of the whole bucket when it is sent."""
        if self.price is not None:
            return {"price": self.price}
        return {self.customer_key: customer, self.value_key: plain(value)}


async def seal_due(resources: Resources, now: datetime) -> int:
    """Seal every total that is due by time or threshold; how many. Other workers' totals are left to them."""
    settings = resources.settings
    reasons = [MANY_COUNTED, PERIOD_ENDS_SOON, BUCKET_ENDED]
    asked: dict[str, object] = {
        "now": now,
        "settled": now - HOUR_SETTLES_IN,
        "sealed_before": now - timedelta(seconds=settings.seal_every_seconds),
        "held_until": now - timedelta(hours=settings.hold_without_subscription_hours),
        "counted": COUNTED_PER_SEAL,
        "recorded": sorted(
            name for name, meter in resources.rules.current(now).meters.items() if meter.sender == "usage_records"
        ),
        "recorded_before": now - RECORDS_EVERY,
        "ending": now + RECORDS_BEFORE_END,
    }
    if settings.seal_threshold is not None:
        reasons.insert(0, THRESHOLD_REACHED)
        asked["threshold"] = settings.seal_threshold
    due = f"{SUBSCRIBED_OR_WAITED_FOR} AND ({' OR '.join(f'({reason})' for reason in reasons)})"
    return await _seal_all(resources, now, due, asked, locked="SKIP LOCKED")


async def seal_everything(resources: Resources, now: datetime) -> int:
    """Drain, then seal every total that a linked customer has. If the drain fails, that is raised at the end."""
    not_drained = await _drain_first(resources, now)
    sealed = await _seal_all(resources, now, "true", {}, locked="")
    if not_drained:
        raise not_drained
    return sealed


async def answer_seal_requests(resources: Resources, now: datetime) -> int:
    """For each customer with a freshly drafted invoice: drain, seal everything, and only then forget the request."""
    async with db.transaction(resources.engine) as connection:
        requests = await read_requests(connection)
    if not requests:
        return 0
    not_drained = await _drain_first(resources, now)
    customers = [request.customer for request in requests]
    await _seal_all(resources, now, "r.customer = ANY(:customers)", {"customers": customers}, locked="")
    if not_drained:
        # What is still in Redis belongs to the invoice too, so the requests stay.
        raise not_drained
    # Died here: the requests are still there, and sealing again finds nothing left to seal.
    async with db.transaction(resources.engine) as connection:
        await forget_requests(connection, requests)
    return len(requests)


async def _drain_first(resources: Resources, now: datetime) -> Exception | None:
    """Drain; what kept it from it. An invoice becomes final even while Redis is away."""
    try:
        await drain(resources, now)
    except (*REDIS_ERRORS, *db.STORAGE_ERRORS) as error:
        return error
    return None


async def _seal_all(
    resources: Resources, now: datetime, due: str, parameters: dict[str, object], *, locked: Literal["", "SKIP LOCKED"]
) -> int:
    rules = resources.rules.current(now).meters
    sealed = 0
    failures: list[DBAPIError] = []
    more = True
    while more:
        async with db.transaction(resources.engine) as connection:
            routes = await _find_routes(connection, rules, resources.settings.sender)
            asked = {"meters": list(routes), "formulas": [route.formula for route in routes.values()], **parameters}
            found = (await connection.execute(text(FIND_DUE.format(due=due)), asked | {"limit": FOUND_AT_ONCE})).all()
        run = _Run(resources, now, rules, routes, text(LOCK_DUE.format(due=due, locked=locked)), asked)
        before, more = sealed, False
        for at in range(0, len(found), TOTALS_PER_TRANSACTION):
            count, again = await _seal_or_seal_apart(run, found[at : at + TOTALS_PER_TRANSACTION], failures)
            sealed += count
            more |= again
        # Of what is sealed by another worker just now, that one takes care.
        more |= sealed > before and len(found) == FOUND_AT_ONCE
    if failures:
        raise failures[0]
    return sealed


@dataclass(frozen=True)
class _Run:
    """What all transactions of one look for what is due have in common; `asked` are the parameters of `lock`."""

    resources: Resources
    now: datetime
    rules: Mapping[str, MeterRules]
    routes: Mapping[str, Route]
    lock: TextClause
    asked: Mapping[str, object]


async def _seal_or_seal_apart(run: _Run, found: Sequence[Any], failures: list[DBAPIError]) -> tuple[int, bool]:
    """Seal together; when PostgreSQL refuses, one by one, so that a total which cannot be sealed holds up no other.

    What it refused goes into `failures`. It raises when the connection is lost, or many in a row are refused.
    """
    try:
        return await _seal_found(run, found)
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
    sealed, more, in_a_row = 0, False, 0
    # In another order each time: else the references behind one with many such totals would never have their turn.
    turns = {one.customer_ref: random.random() for one in found}
    for one in sorted(found, key=lambda one: turns[one.customer_ref]):
        try:
            count, again = await _seal_found(run, [one])
        except DBAPIError as refused:
            failures.append(refused)
            in_a_row += 1
            if refused.connection_invalidated or in_a_row == FAILURES_AT_MOST:
                raise
        else:
            sealed, more, in_a_row = sealed + count, more or again, 0
    return sealed, more


async def _seal_found(run: _Run, found: Sequence[Any]) -> tuple[int, bool]:
    async with db.transaction(run.resources.engine) as connection:
        refs = sorted({row.customer_ref for row in found})
        known = await connection.execute(FIND_CUSTOMERS, {"refs": refs})
        customers: dict[str, str] = {row.ref: row.customer for row in known}
        linked = [row for row in found if row.customer_ref in customers]
        these = {"ids": [row.id for row in linked], "customers": [customers[row.customer_ref] for row in linked]}
        return await _seal_some(connection, run, these)


async def _find_routes(
    connection: AsyncConnection, rules: Mapping[str, MeterRules], default_sender: str
) -> dict[str, Route]:
    """The meters whose usage can be told, by name."""
    routes = {}
    for name, meter in (await read_meters(connection)).items():
        its_rules = rules.get(name, NO_RULES)
        if meter.refusal(its_rules) is None:
            sender = its_rules.sender or default_sender
            routes[name] = Route(name, meter.formula, sender, meter.customer_key, meter.value_key, None)
    for name, its_rules in rules.items():
        if its_rules.sender == "usage_records":
            routes[name] = Route(name, "sum", "usage_records", "", "", its_rules.price)
    return routes


async def _seal_some(connection: AsyncConnection, run: _Run, these: Mapping[str, object]) -> tuple[int, bool]:
    """Seal some totals; how many, and whether there is more to find: pieces that were cut off, or what stayed open."""
    totals = [Total(*row) for row in await connection.execute(run.lock, {**run.asked, **these})]
    if not totals:
        return 0, False
    if await cut_totals(connection, totals, run.rules):
        # The locked rows have changed, and may not be due any more. They stay locked, so this ends.
        count, _ = await _seal_some(connection, run, these)
        return count, True
    now = run.now
    installation = str(await connection.scalar(text("SELECT id FROM installation")))
    parts = await list_parts(connection, totals, now)
    deliveries = [_write_delivery(installation, part, run.routes[part.total.meter], now) for part in parts]
    await connection.execute(INSERT_DELIVERIES, {"now": now, **db.to_columns(_Delivery._fields, deliveries)})
    await announce_parked(connection, [delivery._asdict() for delivery in deliveries if delivery.state == "parked"])
    seals = _close(parts)
    await connection.execute(CLOSE_SEALS, {"now": now, **db.to_columns(_Seal._fields, seals)})
    left_open = sum(total.unsealed_events for total in totals) > sum(part.events for part in parts)
    return len(seals), bool(parts) and left_open


class _Delivery(NamedTuple):
    """A row to be of `usage_deliveries`, as INSERT_DELIVERIES takes it."""

    total_id: int
    opened_seal: int
    seal: int
    events: int
    customer: str
    event_name: str
    identifier: str
    payload: str
    value: str
    timestamp: int
    state: str
    reason: str | None
    aggregation: str
    sender: str


class _Seal(NamedTuple):
    """What a total's seal is closed with, as CLOSE_SEALS takes it."""

    id: int
    next_seal: int
    quantity: str
    events: int


def _close(parts: Sequence[Part]) -> list[_Seal]:
    """What the seal of each total is closed with. Of counted events each part closes its own."""
    seals: dict[int, _Seal] = {}
    for part in parts:
        total, closed = part.total, seals.get(part.total.id)
        events = part.events + (closed.events if closed else 0)
        quantity = Decimal(events) if part.of_event else total.unsealed
        # A counted event has a seal of its own; the open one stays.
        next_seal = total.seal if part.of_event else part.seal + 1
        seals[total.id] = _Seal(total.id, next_seal, str(quantity), events)
    return list(seals.values())


def _write_delivery(installation: str, part: Part, route: Route, now: datetime) -> _Delivery:
    total = part.total
    state, reason = "pending", None
    if part.at < now - METER_EVENT_MAX_AGE:
        state, reason = "parked", "older_than_35_days"
    elif part.parked is not None:
        state, reason = "parked", part.parked
    elif not part.says_something:
        state, reason = "voided", "superseded"
    return _Delivery(
        total.id,
        part.opened_seal,
        part.seal,
        part.events,
        total.customer,
        route.event_name,
        make_identifier(installation, part),
        msgspec.json.encode(route.payload(total.customer, part.value)).decode(),
        str(part.value),
        int(part.at.timestamp()),
        state,
        reason,
        total.aggregation,
        route.sender,
    )
