"""Cancellations: corrections whose event went to Stripe by itself, and that Stripe is asked to forget.

    1. claim    what is due; attempts are counted before Stripe is asked, so that a later refusal can be read
    2. ask      Stripe cancels a meter event by its identifier
    3. settle   the delivery becomes `voided` and the correction `done`; after a refusal the next way is taken

A crash before 3 leaves the correction pending: Stripe is asked again after the lease, and says that the event is
cancelled already. If it says something else, nobody knows what became of the first call, and an operator has to look.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.corrections import (
    CANCEL_WITHIN,
    CHANGE_CORRECTION,
    Way,
    carry_out,
    choose_way,
    find_final_invoice,
    lock_event,
    void_delivery,
)
from tallystick.usage.senders.adjustments import cancel_meter_event
from tallystick.usage.senders.outcomes import Outcome

log = structlog.get_logger()

# Asked one after the other: corrections are rare, and these calls are outside of the deliveries' rate.
CORRECTIONS_PER_RUN = 20

# A delivery that is being sent is known of within seconds; a Stripe that does not answer is left alone for longer.
LOOK_AGAIN = timedelta(seconds=2)
ASK_AGAIN = timedelta(seconds=30)
# Beside all of a run's calls, which may each time out.
LEASE_MARGIN = timedelta(seconds=15)

FIND_DUE = text("""
    SELECT c.* FROM usage_corrections c
     WHERE c.state = 'pending' AND c.next_attempt_at <= :now
     ORDER BY c.requested_at LIMIT 1
       FOR UPDATE SKIP LOCKED
""")

FIND_DELIVERY = text("""
    SELECT id, state, attempts, event_name, identifier, created_at
      FROM usage_deliveries WHERE id = :delivery FOR UPDATE
""")

POSTPONE = text("""
    UPDATE usage_corrections SET attempts = attempts + :asked, next_attempt_at = :until
     WHERE source = :source AND id = :id
""")

# `attempts` fences: a worker that comes back after its lease was taken over no longer has a say.
FIND_ASKED = text("""
    SELECT * FROM usage_corrections
     WHERE source = :source AND id = :id AND state = 'pending' AND attempts = :attempts
       FOR UPDATE
""")


@dataclass(frozen=True)
class Asked:
    """A meter event that Stripe is to cancel. `attempts` counts the calls, with the one that is about to be made."""

    source: str
    id: str
    attempts: int
    event_name: str
    identifier: str


async def cancel_events(resources: Resources, now: datetime) -> int:
    """Bring corrections that are to be cancelled one step on; how many."""
    lease_until = (
        now + CORRECTIONS_PER_RUN * timedelta(seconds=resources.settings.stripe_timeout_seconds) + LEASE_MARGIN
    )
    done = 0
    while done < CORRECTIONS_PER_RUN and await _cancel_next(resources, lease_until, now):
        done += 1
    return done


async def _cancel_next(resources: Resources, lease_until: datetime, now: datetime) -> bool:
    """Take the next correction that is due; whether there was one."""
    # One a transaction: each locks its event's total, and several would be locked in another order than the drain's.
    async with db.transaction(resources.engine) as connection:
        correction = (await connection.execute(FIND_DUE, {"now": now})).one_or_none()
        if correction is None:
            return False
        asked = await _prepare(connection, resources, correction, lease_until, now)
    if asked is not None:
        outcome = await cancel_meter_event(resources.stripe, event_name=asked.event_name, identifier=asked.identifier)
        # Died here: Stripe has cancelled it, we do not know; the next try hears that it is cancelled already.
        async with db.transaction(resources.engine) as connection:
            await _settle(connection, resources, asked, outcome, now)
        if outcome.state != "sent":
            log.warning("event_not_cancelled", identifier=asked.identifier, reason=outcome.reason)
    return True


async def _prepare(
    connection: AsyncConnection, resources: Resources, correction: Any, lease_until: datetime, now: datetime
) -> Asked | None:
    """What to ask Stripe; None where nothing is to be asked now, or no longer."""
    event = await lock_event(connection, correction.source, correction.event_id, correction.event_day)
    delivery = (await connection.execute(FIND_DELIVERY, {"delivery": correction.delivery_id})).one()
    key = {"source": correction.source, "id": correction.id}
    if delivery.state == "pending" and delivery.attempts == 0:
        # Nobody was told yet, and nobody will be.
        await void_delivery(connection, event, delivery.id, now)
        await _change(connection, correction, Way("cancel", "done"), now)
    elif delivery.state in ("pending", "sending"):
        await connection.execute(POSTPONE, {**key, "asked": 0, "until": now + LOOK_AGAIN})
    elif (
        delivery.state in ("sent", "confirmed")
        and delivery.created_at > now - CANCEL_WITHIN
        and await find_final_invoice(connection, event, resources.rules.current(now)) is None
    ):
        await connection.execute(POSTPONE, {**key, "asked": 1, "until": lease_until})
        return Asked(
            correction.source, correction.id, correction.attempts + 1, delivery.event_name, delivery.identifier
        )
    else:
        await _take_next_way(connection, resources, correction, event, now, tried=correction.attempts > 0)
    return None


async def _settle(
    connection: AsyncConnection, resources: Resources, asked: Asked, outcome: Outcome, now: datetime
) -> None:
    found = await connection.execute(FIND_ASKED, {"source": asked.source, "id": asked.id, "attempts": asked.attempts})
    if (correction := found.one_or_none()) is None:
        return
    event = await lock_event(connection, correction.source, correction.event_id, correction.event_day)
    if outcome.state == "sent":
        await void_delivery(connection, event, correction.delivery_id, now)
        await _change(connection, correction, Way("cancel", "done"), now)
    elif outcome.state == "retry":
        # A call that may have been taken keeps its count; one that surely was not need not be remembered.
        key = {"source": asked.source, "id": asked.id}
        await connection.execute(POSTPONE, {**key, "asked": 0 if outcome.unknown else -1, "until": now + ASK_AGAIN})
    else:
        await _take_next_way(connection, resources, correction, event, now, tried=asked.attempts > 1)


async def _take_next_way(
    connection: AsyncConnection, resources: Resources, correction: Any, event: Any, now: datetime, *, tried: bool
) -> None:
    """Correct without Stripe's cancelling; `tried`: an earlier call may have cancelled it all the same."""
    rules = resources.rules.current(now)
    if tried:
        way = Way("propose", "proposed", "cancellation_not_known")
    else:
        way = await choose_way(connection, event, rules, now, alone=False)
        if way.why == "does_not_add_up":
            way = Way("propose", "proposed", "cancellation_refused")
    await _change(connection, correction, way, now)
    await carry_out(connection, event, way, correction, rules, now)


async def _change(connection: AsyncConnection, correction: Any, way: Way, now: datetime) -> None:
    await connection.execute(
        CHANGE_CORRECTION,
        {
            "source": correction.source,
            "id": correction.id,
            "method": way.method,
            "state": way.state,
            "why": way.why,
            "invoice": way.invoice,
            "now": now,
        },
    )
