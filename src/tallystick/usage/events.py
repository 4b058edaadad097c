"""A usage event: its form, and what each of its fields may be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple, TypeGuard

from tallystick.card_numbers import MESSAGE as CARD_NUMBER_MESSAGE
from tallystick.card_numbers import holds_card_number
from tallystick.stripe_limits import (
    INVOICE_LINE_DECIMALS,
    METER_EVENT_DIGITS,
    METER_EVENT_MAX_AGE,
    METER_EVENT_MAX_AHEAD,
)

MAX_EVENTS = 1_000
MAX_TEXT = 100
MAX_PROPERTIES = 10
MAX_DIGITS = METER_EVENT_DIGITS
MAX_DECIMALS = INVOICE_LINE_DECIMALS
# The day in between is for what may still have to happen to an accepted event: wait for the end of its hour, for a
# customer to be linked, for Stripe to come back.
MAX_AGE = METER_EVENT_MAX_AGE - timedelta(days=1)
MAX_AHEAD = METER_EVENT_MAX_AHEAD

FIELDS = frozenset({"id", "customer", "meter", "value", "timestamp", "properties"})
NUMBER_CHARACTERS = frozenset("0123456789+-.eE")

# As most quantities are written: within the limits, without an exponent and without zeros that say nothing.
SIMPLE_VALUE = re.compile(r"-?[1-9][0-9]{0,9}(?:\.[0-9]{0,4}[1-9])?")

Key = tuple[str, str]
Properties = tuple[tuple[str, str], ...]


class UsageEvent(NamedTuple):
    """One use of a meter by a customer. `(source, id)` identifies it; `stamped`: it came without a timestamp.

    `properties` are sorted by name.
    """

    source: str
    id: str
    customer_ref: str
    meter: str
    value: Decimal
    timestamp: datetime
    stamped: bool
    received_at: datetime
    properties: Properties = ()

    @property
    def key(self) -> Key:
        return self.source, self.id


@dataclass(frozen=True)
class Rejection:
    """Why the event at `index` of the request was not taken. `code` is stable; `message` is for people."""

    index: int
    id: str | None
    code: str
    message: str

    def body(self) -> dict[str, object]:
        return {"index": self.index, "id": self.id, "code": self.code, "message": self.message}


class BadEvent(Exception):
    """What is wrong with one event; the others of its request go on."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message


class Unreadable(NamedTuple):
    """Stands where an event's object should be: it could not be read, for this reason."""

    code: str
    message: str
    id: object = None


def read_event(candidate: Any, source: str, now: datetime) -> UsageEvent:
    """The event that an object of JSON describes (numbers as `Decimal`). Raises `BadEvent`."""
    event = require_object(candidate)
    if not event.keys() <= FIELDS:
        raise _name_unknown_field(event)
    value, given_time = event.get("value"), event.get("timestamp")
    timestamp = None if given_time is None else read_timestamp(given_time, "timestamp", now)
    return UsageEvent(
        source=source,
        id=read_text(event, "id"),
        customer_ref=read_text(event, "customer"),
        meter=read_text(event, "meter"),
        value=Decimal(1) if value is None else read_value(value, "value"),
        timestamp=timestamp or now,
        stamped=timestamp is None,
        received_at=now,
        properties=read_properties(event.get("properties"), "properties"),
    )


def find_id(candidate: Any) -> str | None:
    """The id of an event that was refused, if it can be shown."""
    given: Any = None
    if isinstance(candidate, dict):
        given = candidate.get("id")
    elif isinstance(candidate, Unreadable):
        given = candidate.id
    return given if is_text(given) else None


def require_object(candidate: Any) -> dict[str, Any]:
    """The candidate, if it is an object that could be read. Raises `BadEvent`."""
    if isinstance(candidate, dict):
        return candidate
    if isinstance(candidate, Unreadable):
        raise BadEvent(candidate.code, candidate.message)
    raise BadEvent("not_an_object", "An event is a JSON object.")


def _name_unknown_field(event: Mapping[str, Any]) -> BadEvent:
    # A misspelt "value" that was ignored would bill 1.
    if "specversion" in event:
        return BadEvent(
            "unknown_field", "This is a CloudEvent; send it as application/cloudevents+json (or -batch+json)."
        )
    unknown = min(event.keys() - FIELDS)[:MAX_TEXT]
    return BadEvent("unknown_field", f"There is no field {unknown!a}; there are: {', '.join(sorted(FIELDS))}.")


def read_text(fields: Mapping[str, Any], name: str) -> str:
    """The field of this name: a short string. Raises `BadEvent`."""
    value = fields.get(name)
    if is_text(value):
        if holds_card_number(value):
            raise BadEvent("card_number", f"The field {name!r}: {CARD_NUMBER_MESSAGE}")
        return value
    if value is None:
        raise BadEvent("missing_field", f"The field {name!r} is missing.")
    raise BadEvent(
        "invalid_field",
        f"The field {name!r} must be a string of 1 to {MAX_TEXT} characters without control characters.",
    )


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it can be an id, a reference or a name."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and (value.isprintable() or _is_clean(value))


def _is_clean(value: str) -> bool:
    # Control characters do not belong in names (PostgreSQL refuses NUL); lone surrogates cannot be written as UTF-8.
    return not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in value)


def read_value(value: Any, name: str) -> Decimal:
    """An exact quantity from a number (as `Decimal`) or a string. Raises `BadEvent`, which calls it `name`."""
    if isinstance(value, str):
        if SIMPLE_VALUE.fullmatch(value):
            return Decimal(value)
        # Decimal() also takes "1_000", " 1 ", "NaN" and other scripts' digits; a quantity is plain ASCII.
        try:
            value = Decimal(value) if 0 < len(value) <= 40 and set(value) <= NUMBER_CHARACTERS else None
        except ArithmeticError:
            value = None
    if not isinstance(value, Decimal):
        raise BadEvent("invalid_value", f"The field {name!r} must be a decimal number.")
    # Bounded before anything is written out: the plain form of 1E+999999 has a million digits.
    if abs(value.adjusted()) < 40 and len(value.as_tuple().digits) < 40:
        written = plain(value)
        whole, _, decimals = written.lstrip("-").partition(".")
        if len((whole + decimals).lstrip("0")) <= MAX_DIGITS and len(decimals) <= MAX_DECIMALS:
            return Decimal(written)
    elif value == 0:
        return Decimal(0)
    raise BadEvent(
        "value_out_of_range",
        f"The field {name!r} may have at most {MAX_DIGITS} digits, at most {MAX_DECIMALS} of them after the point.",
    )


def read_properties(value: Any, name: str) -> Properties:
    """An event's properties from an object of strings, sorted; none from null. Raises `BadEvent`, which says `name`."""
    if value is None:
        return ()
    if isinstance(value, Unreadable):
        raise BadEvent(value.code, f"In the field {name!r}: {value.message}")
    if not isinstance(value, dict):
        raise BadEvent("invalid_field", f"The field {name!r} must be an object.")
    given = sorted((key, text) for key, text in value.items() if text is not None)
    if len(given) > MAX_PROPERTIES:
        raise BadEvent("invalid_field", f"The field {name!r} may have at most {MAX_PROPERTIES} members.")
    for key, text in given:
        if not is_text(key) or not is_text(text):
            shown = f"{name}.{key[:MAX_TEXT]}"
            raise BadEvent(
                "invalid_field",
                f"The field {shown!a} must be a string of 1 to {MAX_TEXT} characters without control characters.",
            )
        if holds_card_number(text):
            raise BadEvent("card_number", f"The field {f'{name}.{key}'!a}: {CARD_NUMBER_MESSAGE}")
    return tuple(given)


def plain(value: Decimal) -> str:
    """A decimal without exponent and without zeros that say nothing: `1E+2` → `100`, `1.50` → `1.5`, `-0` → `0`."""
    written = f"{value:f}"
    if "." in written:
        written = written.rstrip("0").rstrip(".")
    return "0" if written in ("-0", "") else written


def read_timestamp(value: Any, name: str, now: datetime) -> datetime:
    """A time from RFC 3339 text or Unix seconds that can still be billed. Raises `BadEvent`, which calls it `name`."""
    if isinstance(value, Decimal):
        timestamp = _from_unix(value, name)
    elif isinstance(value, str) and 0 < len(value) <= 40:
        timestamp = _from_text(value, name)
    else:
        raise _not_a_time(name)
    if timestamp > now + MAX_AHEAD:
        raise BadEvent(
            "timestamp_in_future", f"The field {name!r} lies more than {MAX_AHEAD.seconds // 60} minutes ahead."
        )
    if timestamp < now - MAX_AGE:
        raise BadEvent(
            "timestamp_too_old",
            f"The field {name!r} lies more than {MAX_AGE.days} days back; Stripe would refuse it.",
        )
    return timestamp


def _from_text(value: str, name: str) -> datetime:
    try:
        timestamp = datetime.fromisoformat(value.upper())  # RFC 3339 also knows "z"
        if timestamp.tzinfo is None:
            # Guessing a time zone would put usage into the wrong hour, and at a period's end on the wrong invoice.
            raise BadEvent("invalid_timestamp", f"The field {name!r} needs a time zone, as in 2026-01-31T23:59:59Z.")
        return timestamp.astimezone(UTC)
    except (ValueError, OverflowError):
        raise _not_a_time(name) from None


def _from_unix(value: Decimal, name: str) -> datetime:
    # Compared first: arithmetic on 1E+999999 would cost what an attacker likes.
    if not 0 <= value < Decimal("1e11"):
        raise _not_a_time(name)
    # What is finer than a microsecond is cut, not rounded into the future.
    microseconds = int(value // Decimal("0.000001"))
    return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=microseconds)


def _not_a_time(name: str) -> BadEvent:
    return BadEvent("invalid_timestamp", f"The field {name!r} must be RFC 3339 text or Unix seconds.")
