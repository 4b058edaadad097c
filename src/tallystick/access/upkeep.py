"""Upkeep: what changes access without an event. Grace runs out, and the rules are changed.

Each customer's row says when it must be decided again and by which rules it was decided, so both loops find what is due
by an index, start from what is committed, and need no memory of their own. Several workers only decide the same twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.access.policy import fingerprint
from tallystick.access.state import recompute_access
from tallystick.access.timeline import Cause
from tallystick.mirror.apply import lock_customers
from tallystick.resources import Resources

log = structlog.get_logger()

# Their webhooks wait while a batch is decided, so a batch is over in some tens of milliseconds.
CUSTOMERS_PER_TRANSACTION = 200
BATCHES_PER_RUN = 50

FIND_ENDED = text("""
    SELECT customer FROM customer_access WHERE decide_again_at <= :now ORDER BY decide_again_at, customer LIMIT :limit
""")

# Two ranges of the index, where `<>` would read all of the table again and again.
FIND_DECIDED_OTHERWISE = text("""
    (SELECT customer FROM customer_access WHERE rules < :rules ORDER BY rules, customer LIMIT :limit)
    UNION ALL
    (SELECT customer FROM customer_access WHERE rules > :rules ORDER BY rules, customer LIMIT :limit)
    LIMIT :limit
""")

FIND_NEXT = text("SELECT id FROM customers WHERE id > :after ORDER BY id LIMIT :limit")


@dataclass(frozen=True)
class Recomputed:
    """How many customers were decided anew, and for how many the answer changed."""

    customers: int
    changed: int


async def expire_grace(resources: Resources, now: datetime) -> int:
    """Decide anew for the customers whose grace has run out; how many."""
    done = 0
    for _ in range(BATCHES_PER_RUN):
        async with db.transaction(resources.engine) as connection:
            ended = await connection.scalars(FIND_ENDED, {"now": now, "limit": CUSTOMERS_PER_TRANSACTION})
            customers = list(ended)
            await _recompute(connection, resources, customers, now, "grace")
        done += len(customers)
        if len(customers) < CUSTOMERS_PER_TRANSACTION:
            break
    return done


async def follow_rules(resources: Resources, now: datetime) -> int:
    """Decide anew for the customers that other rules than the present ones decided; how many.

    After a change of the rules file, or a release with another policy, these are all. A process that reads the changed
    file some seconds late leaves rows behind that the next run finds.
    """
    rules = fingerprint(resources.rules.current(now).access)
    done = 0
    for _ in range(BATCHES_PER_RUN):
        async with db.transaction(resources.engine) as connection:
            found = await connection.scalars(
                FIND_DECIDED_OTHERWISE, {"rules": rules, "limit": CUSTOMERS_PER_TRANSACTION}
            )
            customers = list(found)
            await _recompute(connection, resources, customers, now, "rules")
        done += len(customers)
        if len(customers) < CUSTOMERS_PER_TRANSACTION:
            break
    if done:
        log.info("access_rules_followed", rules=rules, customers=done)
    return done


async def recompute_everybody(
    resources: Resources, now: datetime, report: Callable[[int], None] | None = None
) -> Recomputed:
    """Decide anew for every customer of the mirror, in batches; `report(customers)` is called after each of them."""
    done = changed = 0
    after = ""
    while True:
        async with db.transaction(resources.engine) as connection:
            customers = list(await connection.scalars(FIND_NEXT, {"after": after, "limit": CUSTOMERS_PER_TRANSACTION}))
            changed += await _recompute(connection, resources, customers, now, "rules")
        if not customers:
            return Recomputed(done, changed)
        done += len(customers)
        after = customers[-1]
        if report is not None:
            report(done)


async def count_customers(resources: Resources) -> int:
    """How many customers the mirror has."""
    async with db.transaction(resources.engine) as connection:
        return int(await connection.scalar(text("SELECT count(*) FROM customers")) or 0)


async def _recompute(
    connection: AsyncConnection, resources: Resources, customers: list[str], now: datetime, cause: Cause
) -> int:
    await lock_customers(connection, customers)
    rules = resources.rules.current(now).access
    return len(await recompute_access(connection, dict.fromkeys(customers), rules, now, cause=cause))
