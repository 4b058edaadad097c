"""Parked deliveries: usage that Stripe will not be told as it is. The product hears of each."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.notifications.outbox import Notification, queue_notifications


async def announce_parked(connection: AsyncConnection, deliveries: Sequence[Mapping[Any, Any]]) -> None:
    """Queue `usage.parked` for deliveries that are being parked in the caller's transaction, given as their rows."""
    await queue_notifications(
        connection,
        [
            Notification(
                "usage.parked",
                delivery["customer"],
                {
                    "identifier": delivery["identifier"],
                    "meter": delivery["event_name"],
                    "timestamp": datetime.fromtimestamp(delivery["timestamp"], UTC).isoformat(),
                    "reason": delivery["reason"],
                },
            )
            for delivery in deliveries
        ],
    )
