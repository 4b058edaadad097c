"""Each format that usage comes in: JSON, NDJSON, the three modes of CloudEvents; and what is none of them."""

import asyncio
import json
import os
import re
import subprocess
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from tallystick.app import create_app
from tallystick.config import Settings
from tallystick.errors import InvalidRequest, Problem, Unsupported
from tallystick.resources import Resources
from tallystick.usage.events import Rejection, UsageEvent
from tallystick.usage.formats import MEDIA_TYPES, parse_events
from tests.serving import serve
from tests.usage.making import make_meter

NOW = datetime(2026, 3, 31, 12, 0, 0, 123456, tzinfo=UTC)
AN_HOUR_AGO = datetime(2026, 3, 31, 11, 0, 0, tzinfo=UTC)

NDJSON = "application/x-ndjson"
CLOUDEVENT = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

EVENT = {"id": "e1", "customer": "acme", "meter": "api_requests"}
ATTRIBUTES = {
    "specversion": "1.0",
    "id": "e1",
    "source": "/eu/gateway",
    "type": "api_requests",
    "subject": "acme",
    "time": "2026-03-31T11:00:00Z",
}
USAGE = UsageEvent(
    "tests", "/eu/gateway e1", "acme", "api_requests", Decimal("2.5"), AN_HOUR_AGO, stamped=False, received_at=NOW
)


def read(raw: bytes, content_type: str | None, **headers: str) -> tuple[list[tuple[int, UsageEvent]], list[Rejection]]:
    given = {"content-type": content_type} if content_type is not None else {}
    return parse_events(raw, Headers(given | headers), "tests", NOW, {})


def read_structured(**changed: Any) -> UsageEvent | Rejection:
    """Of the good event above with other attributes; `...` takes one out."""
    members = ATTRIBUTES | {"data": {"value": "2.5"}} | changed
    raw = json.dumps({name: value for name, value in members.items() if value is not ...}).encode()
    events, rejections = read(raw, CLOUDEVENT)
    return events[0][1] if events else rejections[0]


def read_binary(body: bytes = b'{"value": "2.5"}', content_type: str = "application/json", **changed: Any) -> Any:
    attributes = {name: value for name, value in (ATTRIBUTES | changed).items() if value is not ...}
    events, rejections = read(body, content_type, **{f"ce-{name}": value for name, value in attributes.items()})
    return events[0][1] if events else rejections[0]


# JSON


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "Application/JSON; charset=UTF-8",
        'application/json;charset="utf-8"',
        "application/x-www-form-urlencoded",  # curl -d
    ],
)
def test_json_is_the_default(content_type: str | None) -> None:
    events, rejections = read(json.dumps([EVENT, EVENT | {"id": "e2"}]).encode(), content_type)
    assert [event.id for _, event in events] == ["e1", "e2"]
    assert not rejections


def test_a_byte_order_mark_is_skipped() -> None:
    events, _ = read(b"\xef\xbb\xbf" + json.dumps(EVENT).encode(), "application/json")
    assert events[0][1].id == "e1"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/xml",
        "multipart/form-data; boundary=x",
        "application/cloudevents+avro",
        "json",
        "/",
        "application/json; charset=utf-16",
        "application/x-ndjson; charset=latin-1",
    ],
)
def test_other_types_are_refused_with_those_that_are_taken(content_type: str) -> None:
    with pytest.raises(Unsupported) as refused:
        read(json.dumps(EVENT).encode(), content_type)
    assert refused.value.status == 415
    assert refused.value.headers()["Accept"].split(", ") == list(MEDIA_TYPES)


# NDJSON


@pytest.mark.parametrize(
    "content_type", ["application/x-ndjson", "application/jsonl", "application/jsonl; charset=utf-8"]
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_each_line_is_an_event_and_a_broken_one_costs_only_itself(content_type: str, end: bytes) -> None:
    lines = [
        json.dumps(EVENT).encode(),
        b"",
        b'{"id": "cut", "cust',
        b"  \t",
        b'{"id": "nan", "customer": "c", "meter": "m", "value": NaN}',
        '{"id": "é", "customer": "c", "meter": "m"}'.encode("latin-1"),
        json.dumps([EVENT]).encode(),
        b"[" * 100_000,
        b'{"id": "much", "customer": "c", "meter": "m", "value": 1e99999999999999999999}',
        # Unicode's own line separators belong to the text.
        json.dumps(EVENT | {"id": "a\u2028b"}, ensure_ascii=False).encode(),
    ]
    events, rejections = read(end.join(lines), content_type)
    assert [(index, event.id) for index, event in events] == [(0, "e1"), (7, "a\u2028b")]
    assert [(rejection.index, rejection.code) for rejection in rejections] == [
        (1, "invalid_json"),
        (2, "invalid_json"),
        (3, "invalid_json"),
        (4, "not_an_object"),
        (5, "invalid_json"),
        (6, "invalid_json"),
    ]
    assert [word for word in ("NaN", "UTF-8", "deep", "bounds") if word in "".join(r.message for r in rejections)] == [
        "NaN",
        "UTF-8",
        "deep",
        "bounds",
    ]


@pytest.mark.parametrize(
    ("raw", "status", "type"),
    [
        (b"", 422, "no-events"),
        (b"\n \r\n\n", 422, "no-events"),
        (b"{}\n" * 1001, 413, "too-many-events"),
        (b"\n{}" * 1000, None, None),
    ],
)
def test_a_thousand_lines_are_taken_and_none_are_too_few(raw: bytes, status: int | None, type: str | None) -> None:
    if status is None:
        assert len(read(raw, NDJSON)[1]) == 1000
        return
    with pytest.raises(InvalidRequest) as refused:
        read(raw, NDJSON)
    assert (refused.value.status, refused.value.type) == (status, type)


# CloudEvents


def test_the_three_modes_say_the_same() -> None:
    event = ATTRIBUTES | {"data": {"value": "2.5"}}
    assert read(json.dumps(event).encode(), CLOUDEVENT) == ([(0, USAGE)], [])
    assert read(json.dumps([event]).encode(), BATCH) == ([(0, USAGE)], [])
    assert read_binary() == USAGE


def test_what_is_optional_has_its_default() -> None:
    expected = USAGE._replace(value=Decimal(1), timestamp=NOW, stamped=True)
    assert read_structured(data=..., time=...) == expected
    assert read_structured(data=..., time=None, datacontenttype=None, dataschema=None) == expected
    assert read_binary(b"", time=...) == expected


def test_source_and_id_together_identify_an_event() -> None:
    """Two producers behind one API key may both count 1, 2, 3."""
    ids = {
        (event := read_structured(source=source, id=id)) and getattr(event, "id", None)
        for source, id in (("/a", "b c"), ("/a", "c"), ("/b", "c"), ("/a/b", "c"), ("/a", "b%20c"))
    }
    assert len(ids) == 5
    refused = read_structured(source="/a b", id="c")  # or it would be ("/a", "b c")
    assert isinstance(refused, Rejection)
    assert "'source'" in refused.message
    longest = read_structured(source="s" * 100, id="i" * 100)
    assert isinstance(longest, UsageEvent)


@pytest.mark.parametrize(
    ("changed", "code", "named"),
    [
        ({"specversion": ...}, "invalid_field", "'specversion'"),
        ({"specversion": "0.3"}, "invalid_field", "'specversion'"),
        ({"specversion": 1.0}, "invalid_field", "'specversion'"),
        ({"id": ...}, "missing_field", "'id'"),
        ({"id": "x" * 101}, "invalid_field", "'id'"),
        ({"source": ...}, "missing_field", "'source'"),
        ({"source": ""}, "invalid_field", "'source'"),
        ({"subject": ...}, "missing_field", "'subject'"),
        ({"subject": 7}, "invalid_field", "'subject'"),
        ({"subject": "a\x00b"}, "invalid_field", "'subject'"),
        ({"type": "\ud800"}, "invalid_field", "'type'"),
        ({"time": "2026-03-31T11:00:00"}, "invalid_timestamp", "'time'"),
        ({"time": 1774954800}, "invalid_timestamp", "'time'"),
        ({"time": "2026-01-01T00:00:00Z"}, "timestamp_too_old", "'time'"),
        ({"data": {}}, "missing_field", "'data.value'"),
        ({"data": {"vaule": 5}}, "missing_field", "'data.value'"),
        ({"data": {"value": None}}, "missing_field", "'data.value'"),
        ({"data": {"value": "x"}}, "invalid_value", "'data.value'"),
        ({"data": {"value": "1e40"}}, "value_out_of_range", "'data.value'"),
        ({"data": None}, "invalid_field", "'data'"),
        ({"data": 5}, "invalid_field", "'data'"),
        ({"data": [{"value": 5}]}, "invalid_field", "'data'"),
        ({"data": ..., "value": 5}, "unknown_field", "'value'"),
        ({"data": ..., "Data": {"value": 5}}, "unknown_field", "'Data'"),
        ({"data": ..., "dat": {"value": 5}}, "invalid_field", "'dat'"),
        ({"data": ..., "data_base64": "eyJ2YWx1ZSI6IDV9"}, "invalid_field", "'data_base64'"),
        ({"datacontenttype": "text/xml"}, "invalid_field", "'datacontenttype'"),
        ({"datacontenttype": 7}, "invalid_field", "'datacontenttype'"),
    ],
)
def test_a_wrong_attribute_is_named_and_nothing_is_billed_by_mistake(
    changed: dict[str, Any], code: str, named: str
) -> None:
    rejection = read_structured(**changed)
    assert isinstance(rejection, Rejection)
    assert rejection.code == code
    assert named in rejection.message


@pytest.mark.parametrize(
    "changed",
    [
        {"traceparent": "00-0af7", "partitionkey": "acme", "sequence": 7, "sampled": True, "unset": None},
        {"dataschema": "https://example.com/usage.json"},
        {"datacontenttype": "application/vnd.acme.usage+json; charset=utf-8"},
        {"data": {"value": "2.5", "region": "eu", "more": {"a": [1]}}},
    ],
)
def test_extensions_and_other_consumers_data_are_allowed(changed: dict[str, Any]) -> None:
    assert read_structured(**changed) == USAGE


def test_a_field_given_twice_is_refused_in_the_event_and_in_its_data() -> None:
    whole = json.dumps(ATTRIBUTES | {"data": {"value": 1}})
    twice = [whole.replace('"value": 1', '"value": 1, "value": 2'), whole.replace("{", '{"subject": "globex", ', 1)]
    _, rejections = read(f"[{','.join(twice)}]".encode(), BATCH)
    assert [rejection.code for rejection in rejections] == ["duplicate_field", "duplicate_field"]
    assert [rejection.id for rejection in rejections] == ["/eu/gateway e1", None]
    assert "'value'" in rejections[0].message
    assert "'subject'" in rejections[1].message


def test_a_batch_is_an_array_and_may_be_empty() -> None:
    assert read(b"[]", BATCH) == ([], [])
    with pytest.raises(InvalidRequest, match="array"):
        read(json.dumps(ATTRIBUTES).encode(), BATCH)
    with pytest.raises(InvalidRequest, match="1001"):
        read(json.dumps([{}] * 1001).encode(), BATCH)
    events, rejections = read(json.dumps([ATTRIBUTES, EVENT, ATTRIBUTES | {"id": ""}]).encode(), BATCH)
    assert [index for index, _ in events] == [0]
    assert [(rejection.index, rejection.id) for rejection in rejections] == [(1, None), (2, None)]
    _, rejections = read(json.dumps([ATTRIBUTES]).encode(), CLOUDEVENT)
    assert rejections[0].code == "not_an_object"


@pytest.mark.parametrize(
    ("header", "customer"),
    [
        ("acme", "acme"),
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        ("%61%63me", "acme"),
        ("a%2fb", "a/b"),
        ('"acme corp"', "acme corp"),
        (r'"say \"hi\" \\ bye"', r'say "hi" \ bye'),
        ('"100%25"', "100%"),
        ("100%2525", "100%25"),  # one round of decoding
        ("a+b", "a+b"),
        ('ac"me', 'ac"me'),
    ],
)
def test_header_values_are_unquoted_and_percent_decoded(header: str, customer: str) -> None:
    assert read_binary(subject=header) == USAGE._replace(customer_ref=customer)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=100))
def test_any_reference_survives_the_encoding_that_the_binding_asks_for(customer: str) -> None:
    printable = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
    assert read_binary(subject=quote(customer, safe=printable)) == USAGE._replace(customer_ref=customer)


@pytest.mark.parametrize("header", ["%C0%A0", "%ff", "100%", "%zz", "%2", "acmé", "%ED%A0%80"])
def test_header_values_that_are_not_percent_encoded_utf_8_are_refused(header: str) -> None:
    rejection = read_binary(subject=header)
    assert (rejection.code, rejection.id) == ("invalid_field", None)
    assert "'ce-subject'" in rejection.message


@pytest.mark.parametrize(
    ("changed", "code", "named"),
    [
        ({"subject": "%00"}, "invalid_field", "'subject'"),
        ({"specversion": ...}, "invalid_field", "'specversion'"),
        ({"id": ...}, "missing_field", "'id'"),
        ({"data": '{"value": 5}'}, "unknown_field", "'ce-data'"),
        ({"datacontenttype": "application/json"}, "unknown_field", "'ce-datacontenttype'"),
        ({"value": "5"}, "unknown_field", "'value'"),
        ({"body": b"null"}, "invalid_field", "'data'"),
        ({"body": b"5"}, "invalid_field", "'data'"),
        ({"body": b'{"value": 1, "value": 2}'}, "duplicate_field", "'value'"),
        ({"body": json.dumps(EVENT).encode()}, "missing_field", "'data.value'"),
    ],
)
def test_a_wrong_header_or_body_is_named(changed: dict[str, Any], code: str, named: str) -> None:
    rejection = read_binary(**changed)
    assert rejection.code == code
    assert named in rejection.message


def test_a_header_given_twice_is_refused() -> None:
    raw = [(f"ce-{name}".encode(), value.encode()) for name, value in ATTRIBUTES.items()] + [(b"ce-subject", b"globex")]
    _, (rejection,) = parse_events(b"", Headers(raw=raw), "tests", NOW, {})
    assert rejection.code == "duplicate_field"
    assert "'ce-subject'" in rejection.message


def test_in_binary_mode_the_content_type_is_that_of_the_data() -> None:
    assert read_binary(content_type="application/x-www-form-urlencoded") == USAGE
    assert read_binary(content_type="application/vnd.acme+json") == USAGE
    for content_type in ("text/plain", NDJSON):
        with pytest.raises(Unsupported):
            read_binary(content_type=content_type)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        read_binary(b"{")


def test_a_structured_event_may_repeat_its_attributes_as_headers() -> None:
    raw = json.dumps(ATTRIBUTES | {"data": {"value": "2.5"}}).encode()
    assert read(raw, CLOUDEVENT, **{"ce-id": "another", "ce-subject": "%ff"}) == ([(0, USAGE)], [])


# Anything


LEAVES = (
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.sampled_from(["1.0", "1e999"])
)
NAMES = st.sampled_from([*EVENT, *ATTRIBUTES, "value", "timestamp", "data", "data_base64"]) | st.text(max_size=3)
GOOD: list[dict[str, Any]] = [EVENT, ATTRIBUTES | {"data": {"value": 1}}]
ALMOST = st.sampled_from(GOOD).flatmap(
    lambda good: st.dictionaries(NAMES, LEAVES, max_size=2).map(lambda changed: good | changed)
)
DOCUMENTS = ALMOST | st.recursive(
    LEAVES | ALMOST,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=20,
)
BODIES = (
    st.binary(max_size=100)
    | DOCUMENTS.map(lambda document: json.dumps(document).encode())
    | st.lists(DOCUMENTS, max_size=4).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["content-type", "ce-x", *(f"ce-{name}" for name in (*ATTRIBUTES, "data", "value"))]),
        st.sampled_from([*MEDIA_TYPES, "1.0", "2026-03-31T11:00:00Z"]) | st.text(st.characters(max_codepoint=255)),
    ).map(lambda header: (header[0].encode(), header[1].encode("latin-1"))),
    max_size=6,
)


@given(BODIES, HEADERS)
def test_whatever_comes_is_events_rejections_or_a_problem(raw: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    refused = 400
    events: list[tuple[int, UsageEvent]] = []
    rejections: list[Rejection] = []
    try:
        events, rejections = parse_events(raw, Headers(raw=headers), "tests", NOW, {})
    except Problem as problem:
        refused = problem.status
    assert 400 <= refused < 500
    indexes = [index for index, _ in events] + [rejection.index for rejection in rejections]
    assert sorted(indexes) == list(range(len(indexes)))
    for _, event in events:
        texts = (event.id, event.customer_ref, event.meter, *sum(event.properties, ()))
        assert "".join(texts).encode()
    for rejection in rejections:
        assert json.dumps(rejection.body()).isascii()
        assert rejection.id is None or rejection.id.encode()


async def test_the_examples_of_the_page_run_as_printed(
    settings: Settings, resources: Resources, api_key: str, project_root: Path, tmp_path: Path
) -> None:
    await make_meter(resources)
    (tmp_path / ".tallystick").mkdir()
    (tmp_path / ".tallystick" / "api_key").write_text(api_key)
    page = (project_root / "docs" / "usage.md").read_text()
    blocks = re.findall(r"```sh\n(.+?)```(?:\n\n```json\n(.+?)```)?", page, re.DOTALL)
    assert len(blocks) >= 5
    async with serve(create_app(settings)) as url:
        for commands, printed in blocks:
            script = f"KEY=$(cat .tallystick/api_key)\n{commands}".replace("http://127.0.0.1:8080", url)
            done = await asyncio.to_thread(
                subprocess.run,
                ["sh", "-euc", script],
                cwd=tmp_path,
                env={"PATH": os.environ["PATH"]},
                capture_output=True,
                text=True,
                check=True,
                timeout=30,
            )
            answer = done.stdout or (tmp_path / "answer.json").read_text()
            if printed:
                assert json.loads(answer) == json.loads(printed)
            else:
                assert json.loads(answer)["duplicates"] == 2
