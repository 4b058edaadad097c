"""Buckets: an hour, cut where a billing period of the customer begins or ends.

Stripe bills a meter event by its timestamp, period start included and period end excluded. A total that never spans a
boundary can be told to Stripe with one timestamp, its bucket's start, and lands on the invoice on which each of its
events belongs.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

HOUR = timedelta(hours=1)

# A reference that is not linked yet has no boundaries; sealing cuts its buckets again once it is.
FIND_BOUNDARIES = text("""
    SELECT r.ref, b.at
      FROM customer_references r JOIN period_boundaries b ON b.customer = r.customer
     WHERE r.ref = ANY(:refs) AND b.at > :earliest AND b.at < :latest
     ORDER BY r.ref, b.at
""")


async def find_boundaries(
    connection: AsyncConnection, refs: Iterable[str], earliest: datetime, latest: datetime
) -> Mapping[str, Sequence[datetime]]:
    """The period boundaries of customer references that may cut a bucket of a timestamp in `earliest … latest`."""
    rows = await connection.execute(
        FIND_BOUNDARIES, {"refs": sorted(set(refs)), "earliest": floor_hour(earliest), "latest": latest + HOUR}
    )
    boundaries: dict[str, list[datetime]] = {}
    for ref, at in rows:
        boundaries.setdefault(ref, []).append(at)
    return boundaries


def find_bucket(timestamp: datetime, boundaries: Sequence[datetime]) -> tuple[datetime, datetime]:
    """Start (included) and end (excluded) of the bucket of a timestamp, given the sorted boundaries around it."""
    start = floor_hour(timestamp)
    end = start + HOUR
    after = bisect_right(boundaries, timestamp)
    if after > 0:
        start = max(start, boundaries[after - 1])
    if after < len(boundaries):
        end = min(end, boundaries[after])
    return start, end


def floor_hour(at: datetime) -> datetime:
    """The whole hour in which an instant lies."""
    return at.replace(minute=0, second=0, microsecond=0)
