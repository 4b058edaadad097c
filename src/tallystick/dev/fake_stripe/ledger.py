"""The meter events that were accepted, and what they add up to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal

from tallystick.dev.fake_stripe.state import Object

# Stripe promises "at least 24 hours" of uniqueness and a day in which an event can be cancelled; the fake takes both
# exactly, so that a client which leans on more is found out.
IDENTIFIER_SECONDS = 86_400

WINDOW_SECONDS = {"hour": 3600, "day": 86_400}


class Ledger:
    """Finds meter events by identifier, and by meter and customer, without looking through all of them."""

    def __init__(self) -> None:
        self._by_identifier: dict[str, Object] = {}
        self._by_meter_and_customer: dict[tuple[str, str], list[Object]] = defaultdict(list)

    def add(self, event: Object) -> None:
        """Takes in an accepted event. One with an `error` is never billed and only keeps its identifier taken."""
        self._by_identifier[event["identifier"]] = event
        if event["error"] is None:
            self._by_meter_and_customer[event["meter"], event["customer"]].append(event)

    def taken(self, identifier: str, now: int) -> Object | None:
        """The event that was received under this identifier within the last 24 hours."""
        event = self._by_identifier.get(identifier)
        return event if event is not None and now - event["received"] < IDENTIFIER_SECONDS else None

    def between(self, meter: str, customer: str, start: int, end: int, received_by: int | None = None) -> list[Object]:
        """Events with start <= timestamp < end that are not cancelled, in order of receipt."""
        return [
            event
            for event in self._by_meter_and_customer.get((meter, customer), ())
            if start <= event["timestamp"] < end
            and not event["cancelled"]
            and (received_by is None or event["received"] <= received_by)
        ]


def aggregate(events: Iterable[Object], formula: str, window: str | None) -> Decimal:
    """What the events amount to: `sum`, `count`, or `last` (the latest by timestamp, then by receipt).

    With an `event_time_window` a later event of the same UTC hour or day replaces the earlier ones.
    """
    if window is not None:
        events = {event["timestamp"] // WINDOW_SECONDS[window]: event for event in events}.values()
    if formula == "count":
        return Decimal(sum(1 for _ in events))
    if formula == "last":
        latest: Object | None = None
        for event in events:
            if latest is None or event["timestamp"] >= latest["timestamp"]:
                latest = event
        return Decimal(latest["value"]) if latest is not None else Decimal(0)
    return sum((Decimal(event["value"]) for event in events), Decimal(0))
