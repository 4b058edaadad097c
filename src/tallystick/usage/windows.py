"""Windows of time: hours, days and months of a time zone, and billing periods, as instants between two ends."""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Literal
from zoneinfo import ZoneInfo

from tallystick.errors import InvalidRequest

Window = Literal["hour", "day", "month", "billing_period"]

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

# As in the IANA database. Anything else would be looked for among the files of the machine.
ZONE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(?:/[A-Za-z0-9_+-]+){0,2}")


def find_zone(name: str) -> tzinfo:
    """The time zone of an IANA name such as `Europe/Berlin`. Raises `InvalidRequest`."""
    if name == "UTC":
        return UTC
    try:
        if ZONE_NAME.fullmatch(name):
            return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # no such zone; a file that is none; a folder such as `Europe`
        pass
    raise InvalidRequest(f"There is no time zone {name!a}; name one as Europe/Berlin.", field="time_zone")


def list_starts(from_: datetime, to: datetime, window: Window, time_zone: str) -> list[datetime]:
    """`from_` and every instant before `to` at which an hour, day or month of the zone begins, in UTC.

    A day begins at its local midnight, or where the clock is put forward over it, at that moment.
    """
    zone = find_zone(time_zone)
    starts = [from_]
    local = from_.astimezone(zone)
    while True:
        if window == "hour":
            # Hours are counted as they pass: when the clock is put back, one of them comes twice.
            past = timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
            start = local.astimezone(UTC) - past + HOUR
            local = start.astimezone(zone)
        else:
            day = local.date()
            day = (day.replace(day=1) + timedelta(days=32)).replace(day=1) if window == "month" else day + DAY
            local = datetime(day.year, day.month, day.day, tzinfo=zone)
            start = local.astimezone(UTC)
        if start >= to:
            return starts
        if start > starts[-1]:  # a zone may have left out a whole day
            starts.append(start)


def start_of_month(now: datetime, time_zone: str) -> datetime:
    """The first midnight of the zone's present month, in UTC."""
    local = now.astimezone(find_zone(time_zone))
    return local.replace(day=1, hour=0, minute=0, second=0, microsecond=0, fold=0).astimezone(UTC)


def cut_at_periods(
    from_: datetime, to: datetime, periods: Sequence[tuple[datetime, datetime]], boundaries: Iterable[datetime]
) -> list[datetime]:
    """`from_` and every instant before `to` at which a billing period of a meter begins or ends.

    Where no subscription has billed the meter, the customer's other boundaries stand in; without any, the months
    of UTC.
    """
    edges = [edge for period in periods for edge in period] or list(boundaries)
    if not edges:
        return list_starts(from_, to, "month", "UTC")
    return sorted({from_, *(edge for edge in edges if from_ < edge < to)})
