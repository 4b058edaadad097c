"""Stripe's meters: which names usage may be posted for, and how each is told to Stripe."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from time import monotonic_ns
from typing import Any

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db, stripe_gateway
from tallystick.errors import Unavailable
from tallystick.resources import Resources
from tallystick.rules import MeterRules
from tallystick.stripe_limits import OBJECTS_PER_PAGE
from tallystick.usage.aggregations import NO_RULES

log = structlog.get_logger()

# How long a change in the table may take to be seen by a process.
READ_EVERY = timedelta(seconds=15)
# A name that nobody knows must not become a call to Stripe for each event that carries it: it is believed to be unknown
# for a while. Those who ask for different ones take turns.
BELIEVED_MISSING_NS = 10 * 10**9
MISSING_REMEMBERED = 1_000
# Of the requests that a process works on at once (crowd.py): a Stripe that hangs must not stop the rest of usage.
MAX_ASKING = 8

READ_VERSIONS = text("SELECT id, CAST(xmin AS text) AS version FROM meters")

# A meter that is new since the versions were read has none, and is left alone too.
WRITE_LISTED = text("""
    INSERT INTO meters AS t (id, event_name, formula, customer_key, value_key, event_time_window, status, refreshed_at)
    SELECT id, event_name, formula, customer_key, value_key, event_time_window, status, :now
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(id text, event_name text, formula text, customer_key text, value_key text, event_time_window text,
             status text)
     ORDER BY id
    ON CONFLICT (id) DO UPDATE SET
        event_name = excluded.event_name, formula = excluded.formula, customer_key = excluded.customer_key,
        value_key = excluded.value_key, event_time_window = excluded.event_time_window, status = excluded.status,
        needs_refresh = false, refreshed_at = excluded.refreshed_at
     WHERE CAST(t.xmin AS text) = CAST(:versions AS json) ->> t.id
""")

READ_METERS = text("""
    SELECT id, event_name, formula, customer_key, value_key, event_time_window, status
      FROM meters ORDER BY event_name, status = 'active' DESC, refreshed_at DESC, id
""")

# Those of Stripe's whose usage can be told in deliveries (docs/decisions/0011-aggregations.md).
FORMULAS = frozenset({"sum", "count", "last"})

LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Meter:
    """A meter as Stripe describes it. `customer_key` and `value_key` are the payload's keys."""

    id: str
    event_name: str
    formula: str
    customer_key: str
    value_key: str
    event_time_window: str | None
    status: str

    def refusal(self, rules: MeterRules = NO_RULES) -> str | None:
        """Why usage for this meter cannot be taken under these rules, or None."""
        if self.status != "active":
            return f"The meter {self.event_name!a} is not active at Stripe."
        if self.formula not in FORMULAS:
            return f"The meter {self.event_name!a} has the formula {self.formula!a}, which is not known here."
        if rules.aggregation is not None and self.formula != "last":
            return (
                f"The meter {self.event_name!a} has the formula {self.formula!a} at Stripe, and the rules file asks"
                f" for {rules.aggregation!a}, which only a meter with the formula 'last' can be told."
            )
        if self.event_time_window is not None:
            return (
                f"The meter {self.event_name!a} has a time window of a {self.event_time_window}: a later event would"
                " replace an earlier one instead of adding to it."
            )
        return None


@dataclass
class MeterCache:
    """The table of meters as last read by this process."""

    meters: dict[str, Meter] = field(default_factory=dict)
    read_at: datetime = LONG_AGO
    missing: dict[str, int] = field(default_factory=dict)  # name → until when, by `monotonic_ns`, it is believed to be
    asking: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def knows(self, names: Iterable[str]) -> bool:
        """Whether each name is an active meter's, or was asked for in vain a moment ago.

        Of a meter that was deactivated Stripe may have made a new one, of which no webhook has told yet.
        """
        now = monotonic_ns()
        return all(self._is_active(name) or now < self.missing.get(name, 0) for name in names)

    def note_missing(self, names: Iterable[str]) -> None:
        """Believe for a while that those of the names that are no active meter's were asked for in vain."""
        if len(self.missing) >= MISSING_REMEMBERED:
            self.missing.clear()
        missing = [name for name in names if not self._is_active(name)]
        self.missing |= dict.fromkeys(missing, monotonic_ns() + BELIEVED_MISSING_NS)

    def _is_active(self, name: str) -> bool:
        meter = self.meters.get(name)
        return meter is not None and meter.status == "active"


async def find_meters(cache: MeterCache, resources: Resources, names: set[str], now: datetime) -> dict[str, Meter]:
    """The meters of these names; a name that is missing in the answer is unknown at Stripe too.

    Raises `Unavailable` when a name is unknown here and Stripe could not be asked: the caller is to try again, since
    refusing the event might lose it. Of a meter that is not active, what is known is believed then.
    """
    if now - cache.read_at >= READ_EVERY:
        await _read_table(cache, resources, now)
    if not cache.knows(names):
        await _ask_stripe(cache, resources, names, now)
    return {name: cache.meters[name] for name in names & cache.meters.keys()}


async def _ask_stripe(cache: MeterCache, resources: Resources, names: set[str], now: datetime) -> None:
    are_all_there = names <= cache.meters.keys()
    if cache.asking >= MAX_ASKING:
        if are_all_there:
            return
        raise Unavailable(
            "A meter is not known here, and Stripe is being asked for others.",
            type="stripe-unavailable",
            retry_after_seconds=1,
        )
    cache.asking += 1
    try:
        async with cache.turn:
            if not cache.knows(names):
                await refresh_meters(resources, now)
                await _read_table(cache, resources, now)
                cache.note_missing(names)
    except stripe_gateway.STRIPE_ERRORS as error:
        if are_all_there:
            cache.note_missing(names)  # a Stripe that hangs must not be asked for them by each request
            return
        raise Unavailable(
            "A meter is not known here and Stripe could not be asked for it.",
            type="stripe-unavailable",
            retry_after_seconds=5,
        ) from error
    finally:
        cache.asking -= 1


async def refresh_meters(resources: Resources, now: datetime) -> int:
    """List the account's meters and keep what is needed of each; how many there are. Raises Stripe's errors.

    A row that has been written since before the list was asked for stays as it is: an event told it something newer.
    """
    async with db.transaction(resources.engine) as connection:
        versions = {row.id: row.version for row in await connection.execute(READ_VERSIONS)}
    page = await resources.stripe.v1.billing.meters.list_async({"limit": OBJECTS_PER_PAGE})
    rows = [vars(meter_of(listed.to_dict())) async for listed in page.auto_paging_iter()]
    async with db.transaction(resources.engine) as connection:
        await connection.execute(WRITE_LISTED, {"rows": json.dumps(rows), "versions": json.dumps(versions), "now": now})
    return len(rows)


def meter_of(listed: Mapping[str, Any]) -> Meter:
    """A meter from Stripe's own object of it (https://docs.stripe.com/api/billing/meter/object)."""
    return Meter(
        id=listed["id"],
        event_name=listed["event_name"],
        formula=listed["default_aggregation"]["formula"],
        customer_key=listed["customer_mapping"]["event_payload_key"],
        value_key=listed["value_settings"]["event_payload_key"],
        event_time_window=listed.get("event_time_window"),
        status=listed["status"],
    )


def list_unfit(meters: Mapping[str, Meter], rules: Mapping[str, MeterRules]) -> dict[str, str]:
    """Why usage is refused, for each meter that cannot be used and each rule that fits no meter; by name."""
    reasons = {}
    for name in sorted(meters.keys() | rules.keys()):
        meter, its_rules = meters.get(name), rules.get(name, NO_RULES)
        if its_rules.sender == "usage_records":
            if meter is not None and meter.status == "active":
                reasons[name] = (
                    f"The rules file sends the usage of {name!a} as usage records, but Stripe has a meter of this name,"
                    " which is told nothing."
                )
        elif meter is None:
            reasons[name] = f"The rules file has a meter {name!a}, which Stripe does not have."
        elif (refusal := meter.refusal(its_rules)) is not None and (meter.status == "active" or name in rules):
            reasons[name] = refusal
    return reasons


async def warn_of_unfit_meters(resources: Resources, now: datetime) -> None:
    """Log a warning for each meter whose usage is refused, by name. Without PostgreSQL there is nothing to say yet."""
    try:
        async with db.transaction(resources.engine) as connection:
            meters = await read_meters(connection)
    except db.STORAGE_ERRORS as error:
        log.warning("meters_not_read", error=type(error).__name__)
        return
    for reason in list_unfit(meters, resources.rules.current(now).meters).values():
        log.warning("meter_unfit", reason=reason)


async def read_meters(connection: AsyncConnection) -> dict[str, Meter]:
    """The table of meters by event name; where a name was used twice, the active meter has it."""
    return {name: meters[0] for name, meters in (await read_namesakes(connection)).items()}


async def read_namesakes(connection: AsyncConnection) -> dict[str, list[Meter]]:
    """All meters by event name, the one that has the name first. Of several, Stripe has at most one active."""
    namesakes: dict[str, list[Meter]] = {}
    for row in await connection.execute(READ_METERS):
        namesakes.setdefault(row.event_name, []).append(Meter(*row))
    return namesakes


async def _read_table(cache: MeterCache, resources: Resources, now: datetime) -> None:
    if cache.meters:
        cache.read_at = now  # PostgreSQL may hang for seconds; whoever comes meanwhile uses what is known
    try:
        async with db.transaction(resources.engine) as connection:
            cache.meters = await read_meters(connection)
    except db.STORAGE_ERRORS as error:
        # PostgreSQL is away: usage is still taken into Redis for the meters that this process knows.
        if not cache.meters:
            raise Unavailable("The list of meters cannot be read right now.", retry_after_seconds=2) from error
        log.warning("meters_not_read", error=type(error).__name__)
    cache.read_at = now
