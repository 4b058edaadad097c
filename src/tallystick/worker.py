"""The worker: one table of loops. Any number of workers may run; each loop is safe beside its twins."""

import asyncio
from datetime import datetime, timedelta

import structlog
from sqlalchemy import text

from tallystick import db
from tallystick.access.timeline import forget_timeline
from tallystick.access.upkeep import expire_grace, follow_rules
from tallystick.config import Settings
from tallystick.loops import Loop, run_loops
from tallystick.metrics import (
    BUFFER_BYTES,
    CONSERVATION_DIFFERENCE,
    DELIVERIES_BY_STATE,
    EVENTS_QUARANTINED,
    OLDEST_PENDING_SECONDS,
    UNLINKED_TOTALS,
    UNSEALED_TOTALS,
    USAGE_CONFLICTS,
)
from tallystick.notifications.delivery import deliver_notifications
from tallystick.notifications.history import measure_notifications, retire_notifications
from tallystick.resources import Resources, open_resources
from tallystick.usage.buffer import buffered_bytes
from tallystick.usage.conservation import count_conservation
from tallystick.usage.delivery import deliver_all
from tallystick.usage.drain import drain
from tallystick.usage.meters import refresh_meters
from tallystick.usage.partitions import keep_partitions
from tallystick.usage.sealing import answer_seal_requests, seal_due
from tallystick.webhooks.recovery import recover_events
from tallystick.webhooks.refresh import refresh_mirror

log = structlog.get_logger()

DELIVERY_STATES = ("pending", "sending", "sent", "confirmed", "parked", "voided")


async def measure_queues(resources: Resources, now: datetime) -> int:
    """Set the gauges: what waits where, and for how long."""
    BUFFER_BYTES.set(await buffered_bytes(resources.redis))
    async with db.transaction(resources.engine) as connection:
        unsealed, unlinked = (
            await connection.execute(
                text("""
                    SELECT count(*), count(*) FILTER (WHERE NOT EXISTS (
                               SELECT FROM customer_references r WHERE r.ref = t.customer_ref))
                      FROM usage_totals t WHERE events <> sealed_events
                """)
            )
        ).one()
        counted = await connection.execute(text("SELECT state, count(*) FROM usage_deliveries GROUP BY state"))
        states: dict[str, int] = {str(state): int(number) for state, number in counted}
        oldest = await connection.scalar(
            text("SELECT min(created_at) FROM usage_deliveries WHERE state IN ('pending', 'sending')")
        )
        EVENTS_QUARANTINED.set(
            await connection.scalar(text("SELECT count(*) FROM stripe_events WHERE verdict = 'quarantined'")) or 0
        )
        USAGE_CONFLICTS.set(await connection.scalar(text("SELECT count(*) FROM usage_conflicts")) or 0)
    UNSEALED_TOTALS.set(unsealed)
    UNLINKED_TOTALS.set(unlinked)
    for state in DELIVERY_STATES:
        DELIVERIES_BY_STATE.labels(state).set(states.get(state, 0))
    OLDEST_PENDING_SECONDS.set(max(timedelta(0), now - oldest).total_seconds() if oldest else 0)
    return 0


async def check_conservation(resources: Resources, now: datetime) -> int:
    """Compare the ledger with the states of what it holds (invariant I2); shout if they differ."""
    async with db.transaction(resources.engine) as connection:
        # The whole ledger is added up, which takes longer than any request may.
        await connection.execute(text("SET LOCAL statement_timeout = '5min'"))
        conservation = await count_conservation(connection)
    CONSERVATION_DIFFERENCE.set(float(conservation.difference))
    if conservation.difference:
        log.error("conservation_broken", difference=str(conservation.difference), at=now.isoformat())
    return 0


LOOPS = (
    Loop("drain", 0.5, drain),
    Loop("seal_requests", 1, answer_seal_requests),
    Loop("seal", 5, seal_due),
    Loop("deliver", 1, deliver_all),
    Loop("notifications", 0.5, deliver_notifications),
    Loop("refresh", 2, refresh_mirror),
    Loop("recover", 60, recover_events),
    Loop("grace", 5, expire_grace),
    Loop("access_rules", 5, follow_rules),
    Loop("timeline_retention", 3600, forget_timeline),
    Loop("meters", 300, refresh_meters),
    Loop("partitions", 3600, keep_partitions),
    Loop("queues", 15, measure_queues),
    Loop("notification_queues", 15, measure_notifications),
    Loop("notification_retention", 3600, retire_notifications),
    Loop("conservation", 900, check_conservation),
)


async def run_worker(settings: Settings, stop: asyncio.Event) -> None:
    """Run all loops until `stop` is set."""
    async with open_resources(settings, application_name="tallystick worker") as resources:
        log.info("worker_started", loops=[loop.name for loop in LOOPS])
        await run_loops(resources, LOOPS, stop)
        log.info("worker_stopped")
