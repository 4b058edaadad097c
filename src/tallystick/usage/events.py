"""A usage event: its form, and the one pass that turns JSON into events or into named rejections."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn

from tallystick.errors import InvalidRequest

MAX_EVENTS = 1_000
MAX_TEXT = 100
# Stripe takes a value of at most 15 significant digits, and an invoice line shows at most 12 decimal places.
MAX_DIGITS = 15
MAX_DECIMALS = 12
# Stripe takes meter events up to 35 days old. The day in between is for what may still have to happen to an accepted
# event: wait for the end of its hour, for a customer to be linked, for Stripe to come back.
MAX_AGE = timedelta(days=34)
MAX_AHEAD = timedelta(minutes=5)

FIELDS = frozenset({"id", "customer", "meter", "value", "timestamp"})


Key = tuple[str, str]


class UsageEvent(NamedTuple):
    """One use of a meter by a customer. `(source, id)` identifies it; `stamped`: it came without a timestamp."""

    source: str
    id: str
    customer_ref: str
    meter: str
    value: Decimal
    timestamp: datetime
    stamped: bool
    received_at: datetime

    @property
    def key(self) -> Key:
        return self.source, self.id

    def id_digest(self) -> bytes:
        """10 bytes for `(source, id)`: among 10⁹ ids, two share one with a chance of 10⁻⁶."""
        return hashlib.blake2b(f"{self.source}\0{self.id}".encode(), digest_size=10).digest()

    def body_digest(self) -> bytes:
        """6 bytes for all else that the sender chose; a stamped time is not the sender's, so it is left out."""
        at = "" if self.stamped else self.timestamp.isoformat()
        body = f"{self.customer_ref}\0{self.meter}\0{plain(self.value)}\0{at}"
        return hashlib.blake2b(body.encode(), digest_size=6).digest()


@dataclass(frozen=True)
class Rejection:
    """Why the event at `index` of the request was not taken. `code` is stable; `message` is for people."""

    index: int
    id: str | None
    code: str
    message: str

    def body(self) -> dict[str, object]:
        return {"index": self.index, "id": self.id, "code": self.code, "message": self.message}


class _Bad(Exception):
    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message


def parse_events(raw: bytes, source: str, now: datetime) -> tuple[list[tuple[int, UsageEvent]], list[Rejection]]:
    """Read a JSON object or array of at most `MAX_EVENTS` events.

    Returns the good events with their index in the request, and a rejection for each of the others. Raises
    `InvalidRequest` when the body as a whole cannot be read: nothing of it was taken then.
    """
    try:
        document = json.loads(raw, parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse_constant)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise InvalidRequest("The body is not valid JSON.", type="invalid-json", status=400) from error
    candidates = document if isinstance(document, list) else [document]
    if not candidates:
        raise InvalidRequest("The array of events is empty.", type="no-events")
    if len(candidates) > MAX_EVENTS:
        raise InvalidRequest(
            f"{len(candidates)} events in one request; at most {MAX_EVENTS} are taken.",
            type="too-many-events",
            status=413,
        )
    events: list[tuple[int, UsageEvent]] = []
    rejections: list[Rejection] = []
    for index, candidate in enumerate(candidates):
        try:
            events.append((index, _read_event(candidate, source, now)))
        except _Bad as bad:
            given = candidate.get("id") if isinstance(candidate, dict) else None
            known_id = given if isinstance(given, str) and len(given) <= MAX_TEXT and _is_clean(given) else None
            rejections.append(Rejection(index, known_id, bad.code, bad.message))
    return events, rejections


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # RFC 8259 has no NaN and no Infinity


def _read_event(candidate: Any, source: str, now: datetime) -> UsageEvent:
    if not isinstance(candidate, dict):
        raise _Bad("not_an_object", "An event is a JSON object.")
    if not candidate.keys() <= FIELDS:
        # A misspelt "value" that was ignored would bill 1.
        unknown = min(candidate.keys() - FIELDS)[:MAX_TEXT]
        raise _Bad("unknown_field", f"There is no field {unknown!a}; there are: {', '.join(sorted(FIELDS))}.")
    timestamp = _read_timestamp(candidate.get("timestamp"), now)
    return UsageEvent(
        source=source,
        id=_read_text(candidate, "id"),
        customer_ref=_read_text(candidate, "customer"),
        meter=_read_text(candidate, "meter"),
        value=_read_value(candidate.get("value")),
        timestamp=timestamp or now,
        stamped=timestamp is None,
        received_at=now,
    )


def _read_text(candidate: Mapping[str, Any], name: str) -> str:
    value = candidate.get(name)
    if value is None:
        raise _Bad("missing_field", f"The field {name!r} is missing.")
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not _is_clean(value):
        raise _Bad(
            "invalid_field",
            f"The field {name!r} must be a string of 1 to {MAX_TEXT} characters without control characters.",
        )
    return value


def _is_clean(value: str) -> bool:
    # Control characters do not belong in names (PostgreSQL refuses NUL); lone surrogates cannot be written as UTF-8.
    return value.isprintable() or not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in value)


def _read_value(value: Any) -> Decimal:
    if value is None:
        return Decimal(1)
    if isinstance(value, str):
        # Decimal() also takes "1_000", " 1 ", "NaN" and other scripts' digits; a quantity is plain ASCII.
        if not 0 < len(value) <= 40 or not set(value) <= set("0123456789+-.eE"):
            raise _Bad("invalid_value", "The field 'value' must be a decimal number.")
        try:
            value = Decimal(value)
        except ArithmeticError:
            raise _Bad("invalid_value", "The field 'value' must be a decimal number.") from None
    if not isinstance(value, Decimal):
        raise _Bad("invalid_value", "The field 'value' must be a decimal number.")
    # Bounded before anything is written out: the plain form of 1E+999999 has a million digits.
    if abs(value.adjusted()) < 40 and len(value.as_tuple().digits) < 40:
        written = plain(value)
        whole, _, decimals = written.lstrip("-").partition(".")
        if len((whole + decimals).lstrip("0")) <= MAX_DIGITS and len(decimals) <= MAX_DECIMALS:
            return Decimal(written)
    elif value == 0:
        return Decimal(0)
    raise _Bad(
        "value_out_of_range",
        f"The field 'value' may have at most {MAX_DIGITS} digits, at most {MAX_DECIMALS} of them after the point.",
    )


def plain(value: Decimal) -> str:
    """A decimal without exponent and without zeros that say nothing: `1E+2` → `100`, `1.50` → `1.5`, `-0` → `0`."""
    written = f"{value:f}"
    if "." in written:
        written = written.rstrip("0").rstrip(".")
    return "0" if written in ("-0", "") else written


def _read_timestamp(value: Any, now: datetime) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, Decimal):
        timestamp = _from_unix(value)
    elif isinstance(value, str) and 0 < len(value) <= 40:
        timestamp = _from_text(value)
    else:
        raise _Bad("invalid_timestamp", "The field 'timestamp' must be RFC 3339 text or Unix seconds.")
    if timestamp > now + MAX_AHEAD:
        raise _Bad(
            "timestamp_in_future", f"The field 'timestamp' lies more than {MAX_AHEAD.seconds // 60} minutes ahead."
        )
    if timestamp < now - MAX_AGE:
        raise _Bad(
            "timestamp_too_old",
            f"The field 'timestamp' lies more than {MAX_AGE.days} days back; Stripe would refuse it.",
        )
    return timestamp


def _from_text(value: str) -> datetime:
    try:
        timestamp = datetime.fromisoformat(value)
        if timestamp.tzinfo is None:
            # Guessing a time zone would put usage into the wrong hour, and at a period's end on the wrong invoice.
            raise _Bad("invalid_timestamp", "The field 'timestamp' needs a time zone, as in 2026-01-31T23:59:59Z.")
        return timestamp.astimezone(UTC)
    except (ValueError, OverflowError):
        raise _Bad("invalid_timestamp", "The field 'timestamp' must be RFC 3339 text or Unix seconds.") from None


def _from_unix(value: Decimal) -> datetime:
    # Compared first: arithmetic on 1E+999999 would cost what an attacker likes.
    if not 0 <= value < Decimal("1e11"):
        raise _Bad("invalid_timestamp", "The field 'timestamp' must be RFC 3339 text or Unix seconds.")
    # Parsing already refused more digits than microseconds have a use for; the rest is cut, not rounded into the
    # future.
    microseconds = int(value * 1_000_000)
    return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=microseconds)
