"""Billing periods: calendar months, weeks, days and years counted from a subscription's anchor.

Boundaries are counted from the anchor and not from the period before, so that an anchor on the 31st gives 28 February
and then 31 March again, as Stripe's documentation on the billing cycle says. All in UTC, to the anchor's second.
"""

from __future__ import annotations

import calendar
from datetime import UTC, datetime, timedelta


def boundary(anchor: int, interval: str, count: int, index: int) -> int:
    """The anchor moved by `index` periods of `count` intervals, as a Unix time. `index` may be negative."""
    start = datetime.fromtimestamp(anchor, UTC)
    steps = index * count
    if interval == "day":
        return int((start + timedelta(days=steps)).timestamp())
    if interval == "week":
        return int((start + timedelta(weeks=steps)).timestamp())
    months = start.year * 12 + start.month - 1 + steps * (12 if interval == "year" else 1)
    year, month = divmod(months, 12)
    day = min(start.day, calendar.monthrange(year, month + 1)[1])
    return int(start.replace(year=year, month=month + 1, day=day).timestamp())


def next_boundary(anchor: int, interval: str, count: int, after: int) -> int:
    """The first boundary later than `after`."""
    longest_seconds = {"day": 86_400, "week": 604_800, "month": 31 * 86_400, "year": 366 * 86_400}[interval] * count
    # Counting periods of the greatest length never overshoots, for times after the anchor; before it, step back once.
    index = (after - anchor) // longest_seconds
    while boundary(anchor, interval, count, index) > after:
        index -= 1
    while (end := boundary(anchor, interval, count, index)) <= after:
        index += 1
    return end
