"""The worker: one table of loops. Any number of workers may run; each loop is safe beside its twins."""

import asyncio
from datetime import UTC, datetime
from functools import partial

import structlog

from tallystick import db
from tallystick.access.names import announce_names
from tallystick.access.timeline import forget_timeline
from tallystick.access.upkeep import expire_grace, follow_rules
from tallystick.config import Settings
from tallystick.gauges import measure_buffer, measure_queues
from tallystick.loops import Loop, run_loops
from tallystick.metrics import CONSERVATION_DIFFERENCE
from tallystick.notifications.delivery import deliver_notifications
from tallystick.notifications.history import measure_notifications, retire_notifications
from tallystick.resources import Resources, open_resources
from tallystick.usage.board import measure_periods
from tallystick.usage.cancellations import cancel_events
from tallystick.usage.conservation import count_conservation
from tallystick.usage.delivery import SENDERS, deliver_by
from tallystick.usage.drain import drain_on
from tallystick.usage.error_reports import fetch_error_reports, find_error_reports
from tallystick.usage.late import check_finalized
from tallystick.usage.meters import refresh_meters, warn_of_unfit_meters
from tallystick.usage.partitions import keep_partitions
from tallystick.usage.reconciliation import reconcile_sent
from tallystick.usage.restored import compare_marks
from tallystick.usage.sealing import answer_seal_requests, seal_due
from tallystick.usage.thresholds import announce_thresholds
from tallystick.webhooks.recovery import recover_events
from tallystick.webhooks.refresh import refresh_mirror
from tallystick.webhooks.retention import forget_events

log = structlog.get_logger()


async def check_conservation(resources: Resources, now: datetime) -> int:
    """Compare the ledger with the states of what it holds (invariant I2); shout if they differ."""
    async with db.transaction(resources.engine) as connection:
        conservation = await count_conservation(connection)
    CONSERVATION_DIFFERENCE.set(float(conservation.difference))
    if not conservation.holds:
        log.error(
            "conservation_broken",
            difference=str(conservation.difference),
            events=conservation.events_difference,
            at=now.isoformat(),
        )
    return 0


LOOPS = (
    Loop("drain", 0.2, drain_on),
    Loop("seal_requests", 1, answer_seal_requests),
    Loop("seal", 5, seal_due),
    *(Loop(f"deliver_{sender}", 1, partial(deliver_by, sender=sender)) for sender in SENDERS),
    Loop("finalized_invoices", 15, check_finalized),
    Loop("error_reports", 5, fetch_error_reports),
    Loop("missed_error_reports", 600, find_error_reports),
    Loop("corrections", 2, cancel_events),
    Loop("thresholds", 5, announce_thresholds),
    Loop("notifications", 0.5, deliver_notifications),
    Loop("refresh", 2, refresh_mirror),
    Loop("recover", 60, recover_events, stops_at_once=True),
    Loop("grace", 5, expire_grace),
    Loop("access_rules", 5, follow_rules),
    Loop("names", 2, announce_names),
    Loop("timeline_retention", 3600, forget_timeline),
    Loop("event_retention", 3600, forget_events),
    Loop("meters", 300, refresh_meters),
    Loop("partitions", 3600, keep_partitions),
    Loop("buffer", 15, measure_buffer),
    Loop("queues", 15, measure_queues),
    Loop("notification_queues", 15, measure_notifications),
    Loop("notification_retention", 3600, retire_notifications),
    Loop("restored", 60, compare_marks),
    Loop("conservation", 900, check_conservation),
    Loop("reconcile", 10, reconcile_sent),
    Loop("periods", 60, measure_periods),
)


async def run_worker(settings: Settings, stop: asyncio.Event) -> None:
    """Run all loops until `stop` is set."""
    async with open_resources(settings, application_name="tallystick worker") as resources:
        log.info("worker_started", loops=[loop.name for loop in LOOPS])
        await warn_of_unfit_meters(resources, datetime.now(UTC))
        await run_loops(resources, LOOPS, stop)
        log.info("worker_stopped")
