"""Failures of our own code to handle an event: counted until it is set aside, forgotten once it is handled (inbox.py).

Stripe tries again within minutes at first, and recovery each minute. Failures count an hour apart, so that a release
that is mended or taken back in time sets nothing aside.
"""

from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.webhooks.verification import StripeEvent

FAILURES_BEFORE_QUARANTINE = 5
FAILURES_APART = timedelta(hours=1)

COUNT_FAILURE = text("""
    INSERT INTO stripe_event_failures AS t (id, type, failures, error) VALUES (:id, :type, 1, :error)
    ON CONFLICT (id) DO UPDATE SET failures = t.failures + 1, error = excluded.error, last_at = now()
     WHERE t.last_at <= now() - CAST(:apart AS interval)
    RETURNING failures
""")


async def count_failure(connection: AsyncConnection, event: StripeEvent, error: str) -> bool:
    """Count a failure to handle an event, if it is time to; true when it is the last that is put up with."""
    values = {"id": event.id, "type": event.type, "error": error, "apart": FAILURES_APART}
    failures: int | None = await connection.scalar(COUNT_FAILURE, values)  # None: the last one is not an hour ago
    return failures is not None and failures >= FAILURES_BEFORE_QUARANTINE
