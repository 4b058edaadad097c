"""Replay: fetch events from Stripe by their ids and run them through the flow again, recorded or not.

It is safe for every event, in any order: marks decide again what each of them writes, so an old event stays stale. It
is of use for those in quarantine, once the code that failed on them is mended, and for types that were ignored before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import quote

import structlog
from sqlalchemy import text

from tallystick import db
from tallystick.logs import describe_error
from tallystick.resources import Resources
from tallystick.webhooks.inbox import record_events
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.recovery import to_event
from tallystick.webhooks.verification import StripeEvent

log = structlog.get_logger()

FORGET = text("DELETE FROM stripe_events WHERE id = :id RETURNING verdict, received_at")

# An event that was applied finds its own mark in the row, and so writes nothing: it stays what it was.
REMEMBER = text("""
    UPDATE stripe_events
       SET received_at = :received_at,
           verdict = CASE WHEN :verdict = 'applied' AND verdict = 'stale' THEN 'applied' ELSE verdict END,
           superseded_by = nullif(superseded_by, id)
     WHERE id = :id
    RETURNING verdict
""")

FIND_QUARANTINED = text("SELECT id FROM stripe_events WHERE verdict = 'quarantined' ORDER BY received_at, id")


@dataclass(frozen=True)
class Replayed:
    """What became of an event: its verdict before, if it was recorded, and now; or why it was not replayed."""

    id: str
    before: str | None
    now: str | None
    problem: str | None = None

    def as_json(self) -> dict[str, str | None]:
        return vars(self)


async def find_quarantined(resources: Resources) -> list[str]:
    """The ids of the events in quarantine, oldest first."""
    async with db.transaction(resources.engine) as connection:
        return list((await connection.execute(FIND_QUARANTINED)).scalars())


async def replay(reader: Reader, event_id: str, now: datetime) -> Replayed:
    """Fetch one event and run it through the flow again, in one transaction with the removal of its old record.

    An event that our own code still fails on keeps its old record, and `problem` names the error. Raises Stripe's
    errors, but for 404, and what SQLAlchemy raises when PostgreSQL failed.
    """
    event = await _fetch(reader, event_id)
    if event is None:
        return Replayed(event_id, None, None, "Stripe does not have it; it keeps events for 30 days")
    if event.livemode is not reader.resources.settings.livemode:
        return Replayed(event_id, None, None, "it is of the other mode, live or test")
    try:
        return await _record_again(reader.resources, event, now)
    # The row's edge: the others are replayed all the same.
    except Exception as error:
        if db.is_storage_failure(error):
            raise
        log.error("replay_failed", event_id=event_id, type=event.type, **describe_error(error))
        return Replayed(event_id, None, None, f"our own code failed on it: {type(error).__name__}")


async def _record_again(resources: Resources, event: StripeEvent, now: datetime) -> Replayed:
    async with db.transaction(resources.engine) as connection:
        before = (await connection.execute(FORGET, {"id": event.id})).one_or_none()
        rules = resources.rules.current(now).access
        verdicts: Sequence[str] = await record_events(
            connection, [event], resources.settings.customer_reference_key, rules, now
        )
        verdict = verdicts[0]
        if before is not None:
            kept = {"id": event.id, "received_at": before.received_at, "verdict": before.verdict}
            verdict = (await connection.execute(REMEMBER, kept)).scalar_one()
    log.info("event_replayed", event_id=event.id, type=event.type, before=before and before.verdict, verdict=verdict)
    return Replayed(event.id, before.verdict if before is not None else None, verdict)


async def _fetch(reader: Reader, event_id: str) -> StripeEvent | None:
    found = await reader.find(f"/v1/events/{quote(event_id, safe='')}")
    return to_event(found) if found is not None else None
