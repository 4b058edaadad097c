"""What usage tests need to exist: a linked customer, a meter, events; written straight into the tables."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.conservation import Conservation, count_conservation
from tallystick.usage.events import UsageEvent
from tests.waiting import wait_until

METER = "api_requests"
CUSTOMER = "cus_acme"
REF = "acme"


def make_event(id: str = "e1", *, at: datetime | None = None, value: str = "1", **changed: object) -> UsageEvent:
    now = datetime.now(UTC)
    event = UsageEvent("tests", id, REF, METER, Decimal(value), at or now, at is None, now)
    return event._replace(**changed)  # type: ignore[arg-type]


async def make_customer(
    resources: Resources,
    *,
    ref: str = REF,
    customer: str = CUSTOMER,
    boundaries: tuple[datetime, ...] = (),
    subscribed: bool = True,
) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("INSERT INTO customers (id, ref) VALUES (:id, :ref)"), {"id": customer, "ref": ref}
        )
        if subscribed:
            await connection.execute(
                text("INSERT INTO subscriptions (id, customer, status) VALUES (:id, :customer, 'active')"),
                {"id": f"sub_{customer}", "customer": customer},
            )
    await make_boundaries(resources, *boundaries, customer=customer)


async def make_boundaries(resources: Resources, *boundaries: datetime, customer: str = CUSTOMER) -> None:
    async with db.transaction(resources.engine) as connection:
        for at in boundaries:
            await connection.execute(
                text("INSERT INTO period_boundaries (customer, at) VALUES (:customer, :at)"),
                {"customer": customer, "at": at},
            )


async def make_meter(resources: Resources, event_name: str = METER, **changed: str) -> None:
    values = {"formula": "sum", "status": "active", "event_time_window": None} | changed
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("""
                INSERT INTO meters (id, event_name, formula, customer_key, value_key, event_time_window, status)
                VALUES (:id, :event_name, :formula, 'stripe_customer_id', 'value', :event_time_window, :status)
            """),
            {"id": f"mtr_{event_name}", "event_name": event_name, **values},
        )


async def run(resources: Resources, statement: str, **values: object) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text(statement), values)


async def make_period(
    resources: Resources, start: datetime, end: datetime, *, customer: str = CUSTOMER, meter: str = METER
) -> None:
    """A billing period of the customer's subscription, whose price is of the meter."""
    await run(
        resources,
        "INSERT INTO prices (id, meter) SELECT 'price_' || id, id FROM meters WHERE event_name = :meter"
        " ON CONFLICT DO NOTHING",
        meter=meter,
    )
    await run(
        resources,
        "INSERT INTO billing_periods (item, price, period_start, period_end, subscription, customer)"
        " SELECT 'si_1', 'price_' || id, :start, :end, 'sub_' || CAST(:customer AS text), :customer"
        "   FROM meters WHERE event_name = :meter",
        start=start,
        end=end,
        customer=customer,
        meter=meter,
    )


async def make_invoice(resources: Resources, *, customer: str = CUSTOMER, finalized_at: datetime | None = None) -> None:
    """The invoice of the customer's only billing period: a draft, or finalized."""
    await run(
        resources,
        "INSERT INTO invoices (id, customer, subscription, status, billing_reason, period_start, period_end, created,"
        " finalized_at)"
        " SELECT 'in_1', customer, subscription, :status, 'subscription_cycle', period_start, period_end, period_end,"
        " :finalized_at FROM billing_periods WHERE customer = :customer",
        customer=customer,
        status="open" if finalized_at else "draft",
        finalized_at=finalized_at,
    )


async def read_all(resources: Resources, query: str) -> list[tuple[object, ...]]:
    async with db.transaction(resources.engine) as connection:
        return [tuple(row) for row in await connection.execute(text(query))]


async def conservation(resources: Resources) -> Conservation:
    async with db.transaction(resources.engine) as connection:
        counted = await count_conservation(connection)
    assert counted.holds
    return counted


def last_hour(minutes: int = 30) -> datetime:
    """A whole minute within the last full hour: its bucket has ended."""
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(minutes=60 - minutes)


def nodes_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes of a plan, as EXPLAIN gives it in JSON."""
    return [plan, *(node for part in plan.get("Plans", []) for node in nodes_of(part))]


async def count_looks(connection: AsyncConnection, statement: str, parameters: dict[str, Any]) -> int:
    """How many rows the busiest node looks at when a statement runs with its generic plan.

    That is the plan for whatever parameters come, which PostgreSQL mostly goes over to after five times.
    """
    compiled = text(statement).compile(dialect=connection.dialect)
    names = getattr(compiled, "positiontup")  # noqa: B009  of compiled SQL only, which it is
    await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
    await connection.exec_driver_sql(f"PREPARE looked_at AS {compiled}")
    values = ", ".join(_literal(parameters[name]) for name in names)
    explained = await connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE looked_at({values})")
    await connection.exec_driver_sql("DEALLOCATE looked_at")
    (explanation,) = explained.scalar_one()
    return max(int(node["Actual Rows"] * node["Actual Loops"]) for node in nodes_of(explanation["Plan"]))


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return "'{" + ",".join("NULL" if each is None else str(each) for each in value) + "}'"
    return f"'{value}'"


async def wait_until_blocked(resources: Resources) -> None:
    """Return once some connection to this database waits for a lock."""
    blocked = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    async def is_blocked() -> bool:
        return await read_all(resources, blocked) != []

    await wait_until(is_blocked)
