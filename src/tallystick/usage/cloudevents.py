"""CloudEvents 1.0 as usage: which attribute becomes what (docs/decisions/0010-cloudevents.md).

    source, id     the event's id: both, with a space between them
    subject        the customer
    type           the meter
    time           the timestamp; without it, when the event is received
    data.value     the value; without `data`, 1
    data.…         those properties that the meter declares; other members are other consumers' business

https://github.com/cloudevents/spec/tree/v1.0.2/cloudevents: `spec.md`, `formats/json-format.md` and
`bindings/http-protocol-binding.md`.
"""

import re
from collections.abc import Mapping, Set
from datetime import datetime
from decimal import Decimal
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers

from tallystick.usage.events import (
    MAX_TEXT,
    BadEvent,
    Properties,
    Unreadable,
    UsageEvent,
    read_properties,
    read_text,
    read_timestamp,
    read_value,
    require_object,
)

HEADER_PREFIX = "ce-"
CORE = frozenset({"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "data"})
REQUIRED_HEADERS = frozenset({b"ce-specversion", b"ce-id", b"ce-source", b"ce-type"})

# spec.md: names consist of lower-case ASCII letters and digits.
_NAME = re.compile(r"[a-z0-9]+")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_ESCAPED = re.compile(r"\\(.)")
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def read_cloudevent(candidate: Any, source: str, now: datetime, *, declared: Mapping[str, Set[str]]) -> UsageEvent:
    """The usage that a CloudEvent describes; `source` is the API key's. Raises `BadEvent`.

    `declared`: the properties of each meter that has some.
    """
    event = require_object(candidate)
    if event.get("specversion") != "1.0":
        raise BadEvent("invalid_field", "The field 'specversion' must be '1.0': this is read as a CloudEvent.")
    _check_extensions(event)
    content_type = event.get("datacontenttype")
    if content_type is not None and not (isinstance(content_type, str) and is_json(content_type)):
        raise BadEvent("invalid_field", "The field 'datacontenttype' must be application/json or absent.")
    time = event.get("time")
    if isinstance(time, Decimal):
        raise BadEvent("invalid_timestamp", "The field 'time' must be RFC 3339 text.")
    timestamp = None if time is None else read_timestamp(time, "time", now)
    meter = read_text(event, "type")
    value, properties = _read_data(event, declared.get(meter, frozenset()))
    return UsageEvent(
        source=source,
        id=_read_id(event),
        customer_ref=read_text(event, "subject"),
        meter=meter,
        value=value,
        timestamp=timestamp or now,
        stamped=timestamp is None,
        received_at=now,
        properties=properties,
    )


def find_cloudevent_id(candidate: Any) -> str | None:
    """The id of a CloudEvent that was refused, if it has one that can be shown."""
    if not isinstance(candidate, dict):
        return None
    try:
        return _read_id(candidate)
    except BadEvent:
        return None


def _read_id(event: Mapping[str, Any]) -> str:
    """One string for what identifies a CloudEvent. A source has no space, so no two pairs give the same string."""
    source, id = read_text(event, "source"), read_text(event, "id")
    if " " in source:
        raise BadEvent("invalid_field", "The field 'source' must be a URI reference, which has no spaces.")
    return f"{source} {id}"


def _read_data(event: Mapping[str, Any], declared: Set[str]) -> tuple[Decimal, Properties]:
    if "data" not in event:
        return Decimal(1), ()
    data = event["data"]
    if isinstance(data, Unreadable):
        raise BadEvent(data.code, f"In the field 'data': {data.message}")
    if not isinstance(data, dict):
        raise BadEvent("invalid_field", "The field 'data' must be an object with a 'value', or absent.")
    if data.get("value") is None:
        # Other members are other consumers' business, but one of them may be a misspelt value: this must not bill 1.
        raise BadEvent("missing_field", "The field 'data.value' is missing; leave 'data' out altogether to count 1.")
    value = read_value(data["value"], "data.value")
    return value, read_properties({name: data[name] for name in declared & data.keys() if name != "value"}, "data")


def _check_extensions(event: Mapping[str, Any]) -> None:
    """Refuse what cannot be an extension attribute, or is a quantity in the wrong place; it would be billed as 1."""
    for name in event.keys() - CORE:
        if name == "data_base64":
            raise BadEvent("invalid_field", "The field 'data_base64' is not supported; send JSON in 'data'.")
        if name == "value":
            raise BadEvent("unknown_field", "The field 'value' of a CloudEvent belongs into 'data'.")
        if not _NAME.fullmatch(name):
            raise BadEvent(
                "unknown_field", f"There is no field {name[:MAX_TEXT]!a}; names are lower case in CloudEvents."
            )
        if not isinstance(event[name], str | bool | Decimal | None):
            raise BadEvent("invalid_field", f"The field {name[:MAX_TEXT]!a} must be a string, a number or a boolean.")


def is_json(media_type: str) -> bool:
    """Whether a media type says JSON: its subtype is `json` or ends with `+json` (json-format.md, 3.1.1)."""
    subtype = media_type.partition(";")[0].strip().lower().partition("/")[2]
    return subtype == "json" or subtype.endswith("+json")


def is_binary_mode(headers: Headers) -> bool:
    """Whether the headers are a CloudEvent's. One that is required is enough: those that are missing are named then."""
    return not REQUIRED_HEADERS.isdisjoint([name for name, _ in headers.raw])


def read_binary_mode(headers: Headers, data: dict[str, Any]) -> dict[str, Any] | Unreadable:
    """The CloudEvent of the HTTP binding's binary mode: attributes in `ce-…` headers, `data` as already read.

    `data` is `{"data": …}`, or empty when there was no body.
    """
    event: dict[str, Any] = {}
    for header, value in headers.items():
        if not header.startswith(HEADER_PREFIX):
            continue
        name = header.removeprefix(HEADER_PREFIX)
        shown = header[:MAX_TEXT]
        if name in event:
            return Unreadable("duplicate_field", f"The header {shown!a} is given twice.")
        if name in ("data", "datacontenttype"):
            return Unreadable("unknown_field", f"There is no header {shown!a}: data goes into the body.")
        try:
            event[name] = _decode(value)
        except ValueError:
            return Unreadable("invalid_field", f"The header {shown!a} must be percent-encoded UTF-8.")
    return event | data


def _decode(value: str) -> str:
    """Undo the encoding of a header's value (http-protocol-binding.md, 3.1.3.2). Raises `ValueError`."""
    if not value.isascii():
        raise ValueError("not percent-encoded")  # bytes of some encoding; a guess could bill another customer
    value = value.strip()
    if _QUOTED.fullmatch(value):
        value = _ESCAPED.sub(r"\1", value[1:-1])
    if _STRAY_PERCENT.search(value):
        raise ValueError("a percent sign that encodes nothing")
    return unquote_to_bytes(value).decode()
