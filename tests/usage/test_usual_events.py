"""The short way from a body to its events comes to the same as the whole way, or is not taken."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from tallystick.errors import InvalidRequest
from tallystick.usage import formats
from tallystick.usage.events import UsageEvent
from tallystick.usage.formats import parse_events
from tallystick.usage.usual_events import read_usual_events

NOW = datetime(2026, 5, 17, 12, 30, 5, 123456, tzinfo=UTC)
USUAL: dict[str, Any] = {
    "id": "e1",
    "customer": "acme",
    "meter": "calls",
    "value": "2.5",
    "timestamp": "2026-05-17T11:00Z",
}


def read_the_whole_way(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> list[UsageEvent] | None:
    """The events, or None if one was rejected or the body refused."""
    with monkeypatch.context() as patch:
        patch.setattr(formats, "read_usual_events", lambda *_: None)
        try:
            events, rejections = parse_events(raw, Headers({}), "tests", NOW, {})
        except InvalidRequest:
            return None
    return None if rejections else [event for _, event in events]


TEXTS: list[Any] = [
    *[
        "e1",
        "acme",
        "id",
        "value",
        "timestamp",
        "4242424242424242",
        "4242-4242-4242-4242",
        "1234567890123",
        "4242424242424241",
        "a|b",
    ],
    *("", " ", "\u00fc", "\u00ad", "\ud800", "\x00", "\x7f", "a\tb", "x" * 100, "x" * 101, None, 7),
]
VALUES: list[Any] = [
    *("1", "2.50", "1_0", "NaN", "1e3", "-0", "0", "\u0663", " 1", "", "9" * 15, "9" * 16, None, True, 0, -7),
    *(10**15, 10**15 - 1, -(10**15), 2.5, 1.0, 1e30, [], {}),
]
TIMES: list[Any] = [
    *["2026-05-17T11:00:00z", "2026-05-17T13:00:00+02:00", "2026-05-17T11:00:00", "2026-05-17", "20260517T110000Z"],
    *["2026-05-17T11:00:00.1234567Z", "2026-05-17T11:00:00.000000000000000000000Z", "0001-01-01T00:00:00+23:59"],
    *((NOW + timedelta(seconds=seconds)).isoformat() for seconds in (-34 * 86400 - 1, -34 * 86400, -1, 0, 299, 301)),
    *(int(NOW.timestamp()), int(NOW.timestamp()) - 35 * 86400, 0, -1, 10**11, 10**30, 1.5, None, "", " "),
]
OF_FIELD: dict[str, list[Any]] = {
    "id": TEXTS,
    "customer": TEXTS,
    "meter": TEXTS,
    "value": VALUES,
    "timestamp": TIMES,
    "properties": [None, {}, {"region": "eu"}],
    "extra": [None],
}
events = st.fixed_dictionaries({}, optional={name: st.sampled_from(some) for name, some in OF_FIELD.items()})
# Usual but for one field.
nearly_usual_events = st.sampled_from([USUAL | {name: one} for name, some in OF_FIELD.items() for one in some])
bodies: st.SearchStrategy[Any] = st.one_of(
    nearly_usual_events,
    st.lists(nearly_usual_events, min_size=1, max_size=2),
    events,
    st.lists(events, max_size=3),
    st.sampled_from([None, 1, "x", [[]]]),
)


@st.composite
def written(draw: st.DrawFn) -> bytes:
    """A body as JSON, mostly as it is, sometimes with something done to it."""
    raw = json.dumps(
        draw(bodies), ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([(",", ":"), (", ", " : ")]))
    )
    change = draw(st.sampled_from(["", "", "", "bom", "space", "twice", "escape", "tail", "cut", "bytes"]))
    match change:
        case "bom":
            raw = "\ufeff" + raw
        case "space":
            raw = f" \n{raw}\r\t "
        case "twice":
            raw = raw.replace("{", '{"id": "other",', 1)
        case "escape":
            raw = raw.replace('"id"', '"\\u0069d"', 1)
        case "tail":
            raw += "]"
        case "cut":
            raw = raw[:-1]
    encoded = raw.encode("utf-8", "surrogatepass")
    return encoded.replace(b"e", b"\xe9", 1) if change == "bytes" else encoded


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, some in OF_FIELD.items() for value in some])
def test_each_rule_by_itself_decides_what_is_usual(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = [USUAL | {"id": "e0"}, USUAL | {name: value}]
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert read_usual_events(raw, "tests", NOW) in (None, read_the_whole_way(raw, monkeypatch))


TWICE = json.dumps(USUAL).replace("{", '{"id": "other", ')


@given(written())
@example(TWICE.encode())
@example(TWICE.replace('"id"', '"\\u0069d"', 1).encode())
@settings(max_examples=500)
def test_the_short_way_is_the_whole_way_or_none(raw: bytes) -> None:
    short = read_usual_events(raw, "tests", NOW)
    with pytest.MonkeyPatch.context() as monkeypatch:
        whole = read_the_whole_way(raw, monkeypatch)
    if short is not None:
        assert short == whole
        assert all(
            str(a.value) == str(b.value) and a.timestamp.tzinfo is UTC for a, b in zip(short, whole, strict=True)
        )


@pytest.mark.parametrize(
    "body",
    [
        USUAL,
        [USUAL, USUAL | {"id": "e2", "value": 3}, {"id": "e3", "customer": "a", "meter": "m"}],
        [USUAL | {"value": None, "timestamp": None}],
        [USUAL | {"timestamp": int(NOW.timestamp())}],
        [USUAL | {"timestamp": "2026-05-17T13:00:00+02:00"}],
        [USUAL | {"id": "0f8fad5b-d9cb-469f-a165-70867728950e"}],
    ],
)
def test_what_is_usual_takes_the_short_way(body: object, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps(body).encode()
    events = read_usual_events(raw, "tests", NOW)
    assert events is not None
    assert events == read_the_whole_way(raw, monkeypatch)
