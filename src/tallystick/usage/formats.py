"""The formats that usage comes in, told apart by the request's headers, and read into events or named rejections."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any

from starlette.datastructures import Headers

from tallystick.errors import InvalidRequest, Unsupported
from tallystick.json_faults import explain, refuse_constant
from tallystick.usage.cloudevents import (
    find_cloudevent_id,
    is_binary_mode,
    is_json,
    read_binary_mode,
    read_cloudevent,
)
from tallystick.usage.events import MAX_EVENTS, BadEvent, Rejection, Unreadable, UsageEvent, find_id, read_event
from tallystick.usage.usual_events import read_usual_events

JSON = "application/json"
# What curl says about `-d` when it is not told better. No form is understood, so it can only be JSON.
FORM = "application/x-www-form-urlencoded"
NDJSON = frozenset({"application/x-ndjson", "application/jsonl"})
CLOUDEVENT = "application/cloudevents+json"
CLOUDEVENTS_BATCH = "application/cloudevents-batch+json"
MEDIA_TYPES = (JSON, *sorted(NDJSON), CLOUDEVENT, CLOUDEVENTS_BATCH)

Parsed = tuple[list[tuple[int, UsageEvent]], list[Rejection]]


def parse_events(raw: bytes, headers: Headers, source: str, now: datetime, declared: Mapping[str, Set[str]]) -> Parsed:
    """Read at most `MAX_EVENTS` events in the format that the headers name; `source` is the API key's.

    `declared`: the properties of each meter that has some. Of a CloudEvent, only those are read; whether an event of
    our own form has others is not looked at here.

    Returns the good events with their index in the request, and a rejection for each of the others. Raises
    `InvalidRequest` when the body as a whole cannot be read, `Unsupported` when its format is not known: nothing of
    it was taken then.
    """
    media_type = _read_media_type(headers)
    read_one = partial(read_cloudevent, declared=declared)
    candidates: Any
    if media_type == CLOUDEVENT:
        return _read_each([_parse_json(raw)], source, now, read_one, find_cloudevent_id)
    if media_type == CLOUDEVENTS_BATCH:
        candidates = _parse_json(raw)
        if not isinstance(candidates, list):
            raise InvalidRequest("A batch of CloudEvents is a JSON array.", type="not-an-array")
        return _read_each(candidates, source, now, read_one, find_cloudevent_id)  # none at all is a valid batch
    if is_binary_mode(headers):
        if media_type != FORM and not is_json(media_type):
            raise _not_supported(f"The Content-Type {media_type[:100]!a} of a CloudEvent's data")
        data = {"data": _parse_json(raw)} if raw else {}
        return _read_each([read_binary_mode(headers, data)], source, now, read_one, find_cloudevent_id)
    if media_type in (JSON, FORM):
        if (usual := read_usual_events(raw, source, now)) is not None:
            return list(enumerate(usual)), []
        document = _parse_json(raw)
        candidates = document if isinstance(document, list) else [document]
    elif media_type in NDJSON:
        candidates = _parse_lines(raw)
    else:
        raise _not_supported(f"The Content-Type {media_type[:100]!a}")
    if not candidates:
        raise InvalidRequest("There is no event in the body.", type="no-events")
    return _read_each(candidates, source, now, read_event, find_id)


def _read_media_type(headers: Headers) -> str:
    """The media type without its parameters, `application/json` where none is given. All formats are UTF-8."""
    media_type, _, parameters = headers.get("content-type", JSON).partition(";")
    for parameter in parameters.split(";"):
        name, _, charset = parameter.partition("=")
        if name.strip().lower() == "charset" and charset.strip(' \t"').lower() not in ("utf-8", "utf8", "us-ascii"):
            raise _not_supported(f"The charset {charset[:100]!a}")
    return media_type.strip().lower() or JSON


def _not_supported(what: str) -> Unsupported:
    return Unsupported(
        f"{what} is not supported; send one of these, in UTF-8: {', '.join(MEDIA_TYPES)}.",
        type="unsupported-media-type",
        header=("Accept", ", ".join(MEDIA_TYPES)),
    )


def _read_each(
    candidates: Sequence[Any],
    source: str,
    now: datetime,
    read: Callable[[Any, str, datetime], UsageEvent],
    find: Callable[[Any], str | None],
) -> Parsed:
    _refuse_too_many(len(candidates))
    events: list[tuple[int, UsageEvent]] = []
    rejections: list[Rejection] = []
    for index, candidate in enumerate(candidates):
        try:
            events.append((index, read(candidate, source, now)))
        except BadEvent as bad:
            rejections.append(Rejection(index, find(candidate), bad.code, bad.message))
    return events, rejections


def _refuse_too_many(number: int) -> None:
    if number > MAX_EVENTS:
        raise InvalidRequest(
            f"{number} events in one request; at most {MAX_EVENTS} are taken.", type="too-many-events", status=413
        )


def _parse_json(raw: bytes) -> Any:
    try:
        return _decode_json(raw)
    except InvalidJson as error:
        raise InvalidRequest(
            f"The body is not valid JSON: {error}.", field=error.field, type="invalid-json", status=400
        ) from error


def refuse_repeated_names(raw: bytes) -> None:
    """Raise `InvalidRequest` for a JSON object that gives a member twice, of which a parser keeps only the last."""
    if isinstance(document := _parse_json(raw), Unreadable):
        raise InvalidRequest(document.message)


def _parse_lines(raw: bytes) -> list[Any]:
    """NDJSON: a value a line, of which an unreadable one costs only itself. Lines without content are not counted."""
    lines = [line for line in raw.split(b"\n") if line.strip()]
    _refuse_too_many(len(lines))  # before any of them is read
    candidates: list[Any] = []
    for line in lines:
        try:
            candidates.append(_decode_json(line))
        except InvalidJson as error:
            candidates.append(Unreadable("invalid_json", f"The line is not valid JSON: {error}."))
    return candidates


class InvalidJson(Exception):
    """What is wrong with a JSON text, and in which field."""

    def __init__(self, reason: str, field: str | None) -> None:
        super().__init__(reason if field is None else f"{reason}, in the field {field!a}")
        self.field = field


def _decode_json(raw: bytes) -> Any:
    """A JSON text (RFC 8259) with every number a `Decimal`, and `Unreadable` for an object that repeats a name."""
    try:
        return _DECODER.decode(raw.decode("utf-8-sig"))
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise InvalidJson(*explain(raw, error)) from error


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unreadable:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    # Parsers differ in which of two values they keep, so nobody knows what the sender meant to be billed.
    repeated = {name for name, number in Counter(name for name, _ in pairs).items() if number > 1}
    id = None if "id" in repeated else members.get("id")
    return Unreadable("duplicate_field", f"The field {min(repeated)[:100]!a} is given twice.", id)


_DECODER = json.JSONDecoder(
    parse_float=Decimal, parse_int=Decimal, parse_constant=refuse_constant, object_pairs_hook=_read_object
)
