import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from tallystick.errors import InvalidRequest
from tallystick.usage.events import UsageEvent, plain
from tallystick.usage.formats import parse_events

NOW = datetime(2026, 3, 31, 12, 0, 0, 123456, tzinfo=UTC)
JSON = Headers({"content-type": "application/json"})


def parse_one(**fields: object) -> UsageEvent | str:
    """The event, or the code of its rejection."""
    body = {"id": "e1", "customer": "acme", "meter": "api_requests"} | fields
    events, rejections = parse_events(json.dumps(body).encode(), JSON, "tests", NOW, {})
    return events[0][1] if events else rejections[0].code


def parse_value(literal: str) -> Decimal | str:
    raw = b'{"id": "e", "customer": "c", "meter": "m", "value": %s}' % literal.encode()
    events, rejections = parse_events(raw, JSON, "tests", NOW, {})
    return events[0][1].value if events else rejections[0].code


def test_an_event_without_value_and_timestamp_counts_one_now() -> None:
    event = parse_one()
    assert event == UsageEvent("tests", "e1", "acme", "api_requests", Decimal(1), NOW, stamped=True, received_at=NOW)


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("1.5", "1.5"),
        ('"0.000000000001"', "0.000000000001"),
        ("999999999999999", "999999999999999"),
        ("1e3", "1000"),
        ("-2.50", "-2.5"),
        ('"-0"', "0"),
        # As a binary float this would become 0.1000000000000000055…
        ("0.1", "0.1"),
        ("0e999999", "0"),
    ],
)
def test_values_are_exact_decimals(literal: str, value: str) -> None:
    parsed = parse_value(literal)
    assert isinstance(parsed, Decimal)
    assert plain(parsed) == value


@pytest.mark.parametrize(
    ("literal", "code"),
    [
        ("1000000000000000", "value_out_of_range"),
        ("0.0000000000001", "value_out_of_range"),
        ("12345678901234.56", "value_out_of_range"),
        ("1e999999", "value_out_of_range"),
        ("1e-999999", "value_out_of_range"),
        ("9" * 10_000, "value_out_of_range"),
        ('"NaN"', "invalid_value"),
        ('"1_000"', "invalid_value"),
        ('" 1"', "invalid_value"),
        ('"٣"', "invalid_value"),
        ('""', "invalid_value"),
        ("true", "invalid_value"),
        ("[1]", "invalid_value"),
        ('{"a": 1, "a": 2}', "invalid_value"),
    ],
)
def test_other_values_are_rejected(literal: str, code: str) -> None:
    assert parse_value(literal) == code


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**8), max_value=10**8))
def test_any_value_within_the_limits_is_taken_as_it_is(value: Decimal) -> None:
    assert parse_value(f'"{value:f}"') == value
    assert parse_value(f"{value:f}") == value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2026-03-31T11:59:59Z", datetime(2026, 3, 31, 11, 59, 59, tzinfo=UTC)),
        ("2026-03-31T13:30:00.5+02:00", datetime(2026, 3, 31, 11, 30, 0, 500_000, tzinfo=UTC)),
        ("2026-03-31t11:59:59z", datetime(2026, 3, 31, 11, 59, 59, tzinfo=UTC)),
        (1774958399, datetime(2026, 3, 31, 11, 59, 59, tzinfo=UTC)),
    ],
)
def test_timestamps_are_rfc_3339_or_unix_seconds(given: object, expected: datetime) -> None:
    event = parse_one(timestamp=given)
    assert isinstance(event, UsageEvent)
    assert event.timestamp == expected
    assert not event.stamped


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("2026-03-31T11:59:59", "invalid_timestamp"),
        ("yesterday", "invalid_timestamp"),
        ("0001-01-01T00:00:00+14:00", "invalid_timestamp"),
        (True, "invalid_timestamp"),
        (-1, "invalid_timestamp"),
        (1e300, "invalid_timestamp"),
        ((NOW + timedelta(minutes=5, seconds=1)).isoformat(), "timestamp_in_future"),
        ((NOW - timedelta(days=34, seconds=1)).isoformat(), "timestamp_too_old"),
    ],
)
def test_other_timestamps_are_rejected(given: object, code: str) -> None:
    assert parse_one(timestamp=given) == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"vaule": 5}, "unknown_field"),
        ({"specversion": "1.0"}, "unknown_field"),
        ({"id": ""}, "invalid_field"),
        ({"id": "x" * 101}, "invalid_field"),
        ({"customer": "a\x00b"}, "invalid_field"),
        ({"meter": "\ud800"}, "invalid_field"),
        ({"customer": None}, "missing_field"),
        ({"customer": 7}, "invalid_field"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, object], code: str) -> None:
    assert parse_one(**fields) == code
    body = {"id": "e1", "customer": "acme", "meter": "api_requests"} | fields
    _, (rejection,) = parse_events(json.dumps(body).encode(), JSON, "tests", NOW, {})
    assert (
        "application/cloudevents+json" if "specversion" in fields else f"'{next(iter(fields))}'"
    ) in rejection.message


def test_a_time_finer_than_a_microsecond_is_cut_and_not_moved_into_the_next_period() -> None:
    raw = b'{"id": "e", "customer": "c", "meter": "m", "timestamp": 1774958399.%s}' % (b"9" * 50)
    ((_, event),), _ = parse_events(raw, JSON, "tests", NOW, {})
    assert event.timestamp == datetime(2026, 3, 31, 11, 59, 59, 999_999, tzinfo=UTC)


@pytest.mark.parametrize(
    ("members", "field", "id"),
    [
        ('"id": "e", "customer": "c", "meter": "m", "value": 1, "value": 2', "value", "e"),
        ('"id": "e", "customer": "c", "meter": "m", "value": 1, "value": 1', "value", "e"),
        ('"id": "e", "id": "f", "customer": "c", "meter": "m"', "id", None),
    ],
)
def test_a_field_given_twice_is_refused_since_either_could_be_meant(members: str, field: str, id: str | None) -> None:
    good = '{"id": "good", "customer": "c", "meter": "m"}'
    events, (rejection,) = parse_events(f"[{{{members}}}, {good}]".encode(), JSON, "tests", NOW, {})
    assert [event.id for _, event in events] == ["good"]
    assert (rejection.index, rejection.id, rejection.code) == (0, id, "duplicate_field")
    assert f"'{field}'" in rejection.message


def test_a_bad_event_does_not_take_the_good_ones_with_it() -> None:
    body = [
        {"id": "a", "customer": "c", "meter": "m"},
        7,
        {"id": "b", "meter": "m"},
        {"id": "c", "customer": "c", "meter": "m"},
    ]
    events, rejections = parse_events(json.dumps(body).encode(), JSON, "tests", NOW, {})
    assert [(index, event.id) for index, event in events] == [(0, "a"), (3, "c")]
    assert [(rejection.index, rejection.id, rejection.code) for rejection in rejections] == [
        (1, None, "not_an_object"),
        (2, "b", "missing_field"),
    ]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"value": NaN}', 400),
        (b'{"value": 1e99999999999999999999}', 400),
        (b"\xff\xfe", 400),
        ('{"id": "é"}'.encode("latin-1"), 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (json.dumps([{}] * 1001).encode(), 413),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_whole(raw: bytes, status: int) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_events(raw, JSON, "tests", NOW, {})
    assert refused.value.status == status


@given(st.binary(max_size=200))
def test_no_body_crashes_the_parser(raw: bytes) -> None:
    try:
        events, rejections = parse_events(raw, JSON, "tests", NOW, {})
    except InvalidRequest:
        return
    assert len(events) + len(rejections) >= 1
