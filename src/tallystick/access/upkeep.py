"""Upkeep: what changes access without an event. Grace runs out, and the rules are changed.

Each customer's row says when it must be decided again and by which rules it was decided, so both loops find what is due
by an index, start from what is committed, and need no memory of their own. Several workers only decide the same twice.
Those that have read other rules, as while a changed file reaches one machine after the other, would undo each other's
decisions for as long as that lasts, and tell the product of each: so only the rules that were read last are followed.

A customer on whom our own handling fails keeps its access, and no other waits for it: it is logged, passed over,
and tried again with the next run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import TextClause, text

from tallystick import db
from tallystick.access.policy import fingerprint
from tallystick.access.state import recompute_access
from tallystick.access.timeline import Cause
from tallystick.logs import describe_error
from tallystick.mirror.apply import lock_customers
from tallystick.resources import Resources

log = structlog.get_logger()

# Their webhooks wait while a batch is decided, so a batch is over in some tens of milliseconds.
CUSTOMERS_PER_TRANSACTION = 200
BATCHES_PER_RUN = 50

# Some runs, with the pauses after failures: then whoever held the rules is gone.
RULES_HELD_FOR = timedelta(minutes=1)

HOLD_RULES = text("""
    INSERT INTO access_rules AS h (rules, read_at, held_until) VALUES (:rules, :read_at, :held_until)
    ON CONFLICT (only_row) DO UPDATE SET
        rules = excluded.rules, held_until = excluded.held_until,
        read_at = CASE WHEN h.rules = excluded.rules THEN greatest(h.read_at, excluded.read_at)
                       ELSE excluded.read_at END
     WHERE h.rules = excluded.rules OR h.read_at < excluded.read_at OR h.held_until <= :now
    RETURNING true
""")

FIND_ENDED = text("""
    SELECT customer FROM customer_access WHERE decide_again_at <= :now AND NOT customer = ANY(:passed)
     ORDER BY decide_again_at, customer LIMIT :limit
""")

# Two ranges of the index, where `<>` would read all of the table again and again.
FIND_DECIDED_OTHERWISE = text("""
    (SELECT customer FROM customer_access WHERE rules < :rules AND NOT customer = ANY(:passed)
      ORDER BY rules, customer LIMIT :limit)
    UNION ALL
    (SELECT customer FROM customer_access WHERE rules > :rules AND NOT customer = ANY(:passed)
      ORDER BY rules, customer LIMIT :limit)
    LIMIT :limit
""")

FIND_NEXT = text("SELECT id FROM customers WHERE id > :after ORDER BY id LIMIT :limit")


@dataclass(frozen=True)
class Recomputed:
    """How many customers were decided anew, and for how many the answer changed."""

    customers: int
    changed: int


class TooManyFailures(Exception):
    """So many customers in one run could not be decided that it is no customer's fault."""


class OtherRulesHold(Exception):
    """Another worker has read other rules, later than we ours, and follows them."""


async def expire_grace(resources: Resources, now: datetime) -> int:
    """Decide anew for the customers whose grace has run out; how many."""
    return await _decide_due(resources, FIND_ENDED, {"now": now}, now, "grace")


async def follow_rules(resources: Resources, now: datetime) -> int:
    """Decide anew for the customers that other rules than the present ones decided; how many.

    After a change of the rules file, or a release with another policy, these are all. A process that reads the changed
    file some seconds late leaves rows behind that the next run finds. Raises `OtherRulesHold`.
    """
    rules = fingerprint(resources.rules.current(now).access)
    held = {"rules": rules, "read_at": resources.rules.read_at, "held_until": now + RULES_HELD_FOR, "now": now}
    async with db.transaction(resources.engine) as connection:
        if not await connection.scalar(HOLD_RULES, held):
            raise OtherRulesHold
    done = await _decide_due(resources, FIND_DECIDED_OTHERWISE, {"rules": rules}, now, "rules")
    if done:
        log.info("access_rules_followed", rules=rules, customers=done)
    return done


async def recompute_everybody(
    resources: Resources, now: datetime, report: Callable[[int], None] | None = None
) -> Recomputed:
    """Decide anew for every customer of the mirror, in batches; `report(customers)` is called after each of them."""
    done = failed = changed = 0
    after = ""
    while customers := await _find(resources, FIND_NEXT, {"after": after}):
        outcome = await _decide(resources, customers, now, "rules")
        changed += outcome.changed
        failed += len(outcome.failed)
        done += len(customers)
        after = customers[-1]
        if report is not None:
            report(done)
    return Recomputed(done - failed, changed)


async def count_customers(resources: Resources) -> int:
    """How many customers the mirror has."""
    async with db.transaction(resources.engine) as connection:
        return int(await connection.scalar(text("SELECT count(*) FROM customers")) or 0)


@dataclass(frozen=True)
class _Outcome:
    """For how many customers the answer changed, and those that could not be decided."""

    changed: int
    failed: list[str]


async def _decide_due(
    resources: Resources, find: TextClause, due: Mapping[str, object], now: datetime, cause: Cause
) -> int:
    """Decide, batch by batch, for the customers that a statement finds; how many were decided."""
    done = 0
    passed: list[str] = []
    for _ in range(BATCHES_PER_RUN):
        customers = await _find(resources, find, {**due, "passed": passed})
        passed += (await _decide(resources, customers, now, cause)).failed
        done += len(customers)
        if len(passed) >= CUSTOMERS_PER_TRANSACTION:
            raise TooManyFailures
        if len(customers) < CUSTOMERS_PER_TRANSACTION:
            break
    return done - len(passed)


async def _find(resources: Resources, find: TextClause, values: Mapping[str, object]) -> list[str]:
    async with db.transaction(resources.engine) as connection:
        return list(await connection.scalars(find, {**values, "limit": CUSTOMERS_PER_TRANSACTION}))


async def _decide(resources: Resources, customers: list[str], now: datetime, cause: Cause) -> _Outcome:
    """Decide for customers in one transaction; if our own handling fails, for each of them in one of its own."""
    try:
        async with db.transaction(resources.engine) as connection:
            await lock_customers(connection, customers)
            rules = resources.rules.current(now).access
            changed = await recompute_access(connection, dict.fromkeys(customers), rules, now, cause=cause)
    except Exception as error:  # the row's edge: one customer's data must not keep the others waiting
        if db.is_storage_failure(error):
            raise
        if len(customers) == 1:
            log.error("access_not_decided", customer=customers[0], cause=cause, **describe_error(error))
            return _Outcome(0, customers)
        alone = [await _decide(resources, [customer], now, cause) for customer in customers]
        return _Outcome(sum(one.changed for one in alone), [one for each in alone for one in each.failed])
    return _Outcome(len(changed), [])
