"""`POST /v1/usage` and `GET /v1/usage` as a product service sees them."""

import asyncio
import gzip
import json
import os
import signal
import tracemalloc
import zlib
from collections.abc import MutableMapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tallystick import db
from tallystick.auth import create_key
from tallystick.config import Settings
from tallystick.dev.embedded import EmbeddedValkey
from tallystick.resources import Resources, open_resources
from tallystick.usage.buffer import Buffer
from tallystick.usage.drain import drain
from tallystick.usage.ingest import Breaker
from tallystick.usage.meters import MeterCache, find_meters
from tallystick.usage.restored import MARK_KEY
from tests.conftest import FakeStripe, Servers, open_client
from tests.slow import started
from tests.usage.making import (
    METER,
    conservation,
    last_hour,
    make_boundaries,
    make_customer,
    make_event,
    make_meter,
    read_all,
)

NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
async def meter(resources: Resources) -> None:
    await make_meter(resources)


def event(id: str = "e1", **changed: object) -> dict[str, object]:
    return {
        "id": id,
        "customer": "acme",
        "meter": METER,
        "value": "1.5",
        "timestamp": last_hour().isoformat(),
    } | changed


async def test_one_event_or_many_are_accepted_and_repeats_are_counted(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    answer = await client.post("/v1/usage", json=event("a"))
    assert (answer.status_code, answer.json()) == (202, {"accepted": 1, "duplicates": 0, "rejected": []})
    answer = await client.post("/v1/usage", json=[event("a"), event("b"), event("c")])
    assert (answer.status_code, answer.json()) == (202, {"accepted": 2, "duplicates": 1, "rejected": []})
    await drain(resources, NOW)
    assert (await conservation(resources)).accepted == Decimal("4.5")


async def test_bad_events_are_named_by_index_and_the_good_ones_count(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/v1/usage", json=[event("a", value="x"), event("b"), event("c", meter="unheard_of"), event("b", value=2)]
    )
    assert answer.status_code == 202
    body = answer.json()
    assert (body["accepted"], body["duplicates"]) == (1, 0)
    assert [(bad["index"], bad["id"], bad["code"]) for bad in body["rejected"]] == [
        (0, "a", "invalid_value"),
        (2, "c", "unknown_meter"),
        (3, "b", "conflict"),
    ]


async def test_only_bad_events_are_a_422(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/usage", json=[event("a", value="x")])
    assert answer.status_code == 422
    assert answer.json()["rejected"][0]["code"] == "invalid_value"


async def test_a_meter_made_at_stripe_a_moment_ago_is_found(client: httpx.AsyncClient, fake_stripe: FakeStripe) -> None:
    await fake_stripe.client.v1.billing.meters.create_async(
        {"display_name": "New", "event_name": "new_meter", "default_aggregation": {"formula": "sum"}}
    )
    assert (await client.post("/v1/usage", json=event(meter="new_meter"))).status_code == 202


async def test_a_meter_that_another_request_is_just_learning_of_is_not_called_unknown(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await fake_stripe.client.v1.billing.meters.create_async(
        {"display_name": "New", "event_name": "new_meter", "default_aggregation": {"formula": "sum"}}
    )
    cache = MeterCache()
    found = await asyncio.gather(*(find_meters(cache, resources, {"new_meter"}, NOW) for _ in range(3)))
    assert [meters.keys() for meters in found] == [{"new_meter"}] * 3


async def test_a_name_that_nobody_knows_does_not_make_a_new_meter_unknown(
    client: httpx.AsyncClient, fake_stripe: FakeStripe
) -> None:
    """Only a name that Stripe was asked for is refused."""
    assert (await client.post("/v1/usage", json=event(meter="misspelt"))).status_code == 422
    await fake_stripe.client.v1.billing.meters.create_async(
        {"display_name": "New", "event_name": "new_meter", "default_aggregation": {"formula": "sum"}}
    )
    assert (await client.post("/v1/usage", json=event(meter="misspelt"))).status_code == 422
    assert (await client.post("/v1/usage", json=event(meter="new_meter"))).status_code == 202


async def test_a_redis_that_hangs_is_left_alone_from_the_end_of_the_call_on(
    resources: Resources, api_key: str, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time-out is longer than it is left alone: counted from the call's begin, each request would wait for it."""
    monkeypatch.setattr("tallystick.redis_client.SOCKET_TIMEOUT_SECONDS", 0.6)
    monkeypatch.setattr("tallystick.usage.ingest.LEAVE_REDIS_ALONE_NS", 5 * 10**8)
    assert servers.valkey.pid is not None
    async with started(resources) as app, open_client(app, api_key) as client:
        assert (await client.post("/v1/usage", json=event("a"))).status_code == 202
        os.kill(servers.valkey.pid, signal.SIGSTOP)
        try:
            assert (await client.post("/v1/usage", json=event("b"))).status_code == 202
            assert app.state.breaker.is_open()
        finally:
            os.kill(servers.valkey.pid, signal.SIGCONT)


async def test_while_stripe_cannot_be_asked_an_unknown_meter_is_not_refused_but_to_be_sent_again(
    client: httpx.AsyncClient, fake_stripe: FakeStripe
) -> None:
    await fake_stripe.control.post(
        "/_fake/faults", json={"method": "GET", "path": "/v1/billing/meters", "kind": "error_500", "times": None}
    )
    answer = await client.post("/v1/usage", json=event(meter="new_meter"))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["type"] == "urn:tallystick:problem:stripe-unavailable"


MIDNIGHT = NOW.replace(hour=0, minute=0, second=0, microsecond=0)


@pytest.mark.parametrize(
    ("sent", "sent_again"),
    [
        (MIDNIGHT - timedelta(hours=5), MIDNIGHT - timedelta(hours=5) + timedelta(seconds=3)),
        (MIDNIGHT - timedelta(seconds=1), MIDNIGHT + timedelta(seconds=1)),
    ],
    ids=["within a day", "across midnight"],
)
async def test_what_was_buffered_before_redis_stopped_and_sent_again_directly_counts_once(
    settings: Settings,
    resources: Resources,
    api_key: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    sent: datetime,
    sent_again: datetime,
) -> None:
    """The hard case: buffered, the answer lost, Redis stopped, the retry taken directly, Redis back and drained."""
    from tallystick.app import create_app

    clock = StoppedClock(sent)
    monkeypatch.setattr("tallystick.usage.ingest.datetime", clock)
    at = (sent - timedelta(hours=1)).isoformat()
    valkey = EmbeddedValkey(tmp_path_factory.mktemp("own") / "valkey")
    await asyncio.to_thread(valkey.start)
    try:
        own = settings.model_copy(update={"redis_url": valkey.url})
        application = create_app(own)
        async with application.router.lifespan_context(application), open_client(application, api_key) as client:
            batch = [event("a", timestamp=at), event("without timestamp", timestamp=None)]
            assert (await client.post("/v1/usage", json=batch)).json()["accepted"] == 2
            await asyncio.to_thread(valkey.kill)

            clock.stands_at = sent_again
            answer = await client.post("/v1/usage", json=[*batch, event("b", timestamp=at)])
            assert (answer.status_code, answer.json()["accepted"]) == (202, 3)
            answer = await client.post("/v1/usage", json=[*batch, event("b", timestamp=at, value="7")])
            assert answer.json()["duplicates"] == 2
            assert answer.json()["rejected"][0]["code"] == "conflict"

            await asyncio.to_thread(valkey.start)
            application.state.breaker = Breaker()
            again: Resources = application.state.resources
            await drain(again, NOW, reclaim_after=timedelta(0))
            # Redis knows the batch, and not what went past it; the ledger knows both.
            answer = await client.post("/v1/usage", json=[*batch, event("b", timestamp=at), event("c", timestamp=at)])
            assert (answer.json()["accepted"], answer.json()["duplicates"]) == (2, 2)
            await drain(again, NOW)
    finally:
        await asyncio.to_thread(valkey.stop)
    assert (await conservation(resources)).accepted == Decimal("6.0")
    assert await read_all(resources, "SELECT * FROM usage_conflicts") == []


class StoppedClock:
    """Stands in for `datetime` where only `datetime.now(UTC)` is called."""

    def __init__(self, at: datetime) -> None:
        self.stands_at = at

    def now(self, zone: object) -> datetime:
        assert zone is UTC
        return self.stands_at


async def test_with_neither_redis_nor_postgres_the_answer_is_503_and_says_when_to_come_back(
    settings: Settings, resources: Resources, app: FastAPI, client: httpx.AsyncClient
) -> None:
    assert (await client.post("/v1/usage", json=event("before"))).status_code == 202
    nowhere = settings.model_copy(
        update={"database_url": "postgresql+asyncpg://127.0.0.1:1/none", "redis_url": "redis://127.0.0.1:1/0"}
    )
    working, buffer = app.state.resources, app.state.buffer
    async with open_resources(nowhere, application_name="tests") as app.state.resources:
        app.state.buffer = Buffer(app.state.resources.redis, nowhere)
        answer = await client.post("/v1/usage", json=event("during"))
    app.state.resources, app.state.buffer = working, buffer
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["content-type"] == "application/problem+json"


def ndjson(*events: dict[str, object]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in events)


NDJSON = {"Content-Type": "application/x-ndjson"}
GZIP = {"Content-Encoding": "gzip"}


async def test_in_ndjson_a_broken_line_is_rejected_and_the_others_go_on(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    body = ndjson(event("a")) + b'\n{"id": "b", "cus\n' + ndjson(event("c"), event("a"))
    answer = await client.post("/v1/usage", content=body, headers=NDJSON)
    assert answer.status_code == 202
    assert (answer.json()["accepted"], answer.json()["duplicates"]) == (2, 1)
    assert [(bad["index"], bad["id"], bad["code"]) for bad in answer.json()["rejected"]] == [(1, None, "invalid_json")]
    answer = await client.post("/v1/usage", content=b"{\n}\n", headers=NDJSON)
    assert (answer.status_code, len(answer.json()["rejected"])) == (422, 2)
    await drain(resources, NOW)
    assert (await conservation(resources)).accepted == Decimal("3.0")


async def test_a_cloudevent_counts_once_in_whatever_mode_it_comes(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    attributes = {"specversion": "1.0", "id": "1", "source": "/eu", "type": METER, "subject": "acme"}
    structured = attributes | {"data": {"value": 2.5}}
    of_another = structured | {"source": "/us"}
    for content, headers, expected in (
        (json.dumps(structured), {"Content-Type": "application/cloudevents+json"}, (1, 0)),
        ('{"value": "2.50"}', {f"ce-{name}": value for name, value in attributes.items()}, (0, 1)),
        (json.dumps([structured, of_another]), {"Content-Type": "application/cloudevents-batch+json"}, (1, 1)),
        (json.dumps(event("/us 1", value="2.5", timestamp=None)), {"Content-Type": "application/json"}, (0, 1)),
        ("[]", {"Content-Type": "application/cloudevents-batch+json"}, (0, 0)),
    ):
        answer = await client.post("/v1/usage", content=content, headers=headers)
        assert (answer.status_code, answer.json()["accepted"], answer.json()["duplicates"]) == (202, *expected)
    await drain(resources, NOW)
    assert await read_all(resources, "SELECT source, id, customer_ref, meter FROM usage_events ORDER BY id") == [
        ("tests", "/eu 1", "acme", METER),
        ("tests", "/us 1", "acme", METER),
    ]


async def test_every_event_can_be_named_with_what_became_of_it(client: httpx.AsyncClient) -> None:
    await client.post("/v1/usage", json=[event("known"), event("other")])
    batch = [event("new"), event("known"), 7, event("other", value=9), event("bad", value="x"), event("new")]
    answer = await client.post("/v1/usage?results=all", json=batch)
    assert answer.status_code == 202
    results = answer.json()["results"]
    assert [(one["index"], one["id"], one["result"], one.get("code")) for one in results] == [
        (0, "new", "accepted", None),
        (1, "known", "duplicate", None),
        (2, None, "rejected", "not_an_object"),
        (3, "other", "conflict", "conflict"),
        (4, "bad", "rejected", "invalid_value"),
        (5, "new", "duplicate", None),
    ]
    assert "results" not in (await client.post("/v1/usage", json=batch)).json()
    answer = await client.post("/v1/usage?results=some", json=event("unsent"))
    assert (answer.status_code, answer.json()["field"]) == (422, "results")
    assert (await client.post("/v1/usage", json=event("unsent"))).json()["accepted"] == 1


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity, gzip"])
async def test_a_gzip_body_is_read(client: httpx.AsyncClient, encoding: str) -> None:
    raw = ndjson(*(event(str(n)) for n in range(1000)))
    joined = gzip.compress(raw[:50_000]) + gzip.compress(raw[50_000:])  # as `cat a.gz b.gz` joins them
    for content, expected in ((gzip.compress(raw), (1000, 0)), (joined, (0, 1000))):
        answer = await client.post("/v1/usage", content=content, headers=NDJSON | {"Content-Encoding": encoding})
        assert (answer.json()["accepted"], answer.json()["duplicates"]) == expected


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"[]", "is damaged"),
        (zlib.compress(b"[]"), "is damaged"),
        (gzip.compress(b"[{}]")[:-1], "ends early"),
        (gzip.compress(b"[{}]")[:15], "ends early"),
        (gzip.compress(b"[{}]")[:-8] + bytes(8), "is damaged"),
        (gzip.compress(b"[{}]") + b"more", "is damaged"),
        (gzip.compress(b"") * 1001, "members"),
    ],
    # The bytes hold the time at which they were made, which two test processes must not name a test by.
    ids=["json", "zlib", "without its last byte", "cut", "wrong checksum", "with more behind", "too many members"],
)
async def test_a_broken_gzip_stream_is_a_400(client: httpx.AsyncClient, content: bytes, detail: str) -> None:
    answer = await client.post("/v1/usage", content=content, headers=GZIP)
    assert (answer.status_code, answer.json()["type"]) == (400, "urn:tallystick:problem:invalid-gzip")
    assert detail in answer.json()["detail"]


async def test_a_bomb_is_stopped_early_and_the_limit_is_that_of_the_decompressed_body(
    client: httpx.AsyncClient,
) -> None:
    mebibyte = json.dumps([event()]).encode().ljust(1024 * 1024)
    assert (await client.post("/v1/usage", content=gzip.compress(mebibyte), headers=GZIP)).status_code == 202
    answer = await client.post("/v1/usage", content=gzip.compress(mebibyte + b" "), headers=GZIP)
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:tallystick:problem:too-large")
    in_parts = gzip.compress(mebibyte[: 1024 * 1000]) * 2
    assert (await client.post("/v1/usage", content=in_parts, headers=GZIP)).status_code == 413

    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    tracemalloc.start()
    try:
        answer = await client.post("/v1/usage", content=bomb, headers=GZIP)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.status_code == 413
    assert most < 8 * 1024 * 1024


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "gzip, br", "é", "*"])
async def test_other_encodings_are_refused_with_the_one_that_is_taken(client: httpx.AsyncClient, encoding: str) -> None:
    headers = {b"Content-Encoding": encoding.encode("latin-1")}
    answer = await client.post("/v1/usage", content=b"x", headers=headers)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, identity")
    assert answer.json()["type"] == "urn:tallystick:problem:unsupported-encoding"


async def test_another_content_type_is_refused_with_those_that_are_taken(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/usage", json=event(), headers={"Content-Type": "text/csv"})
    assert (answer.status_code, answer.headers["content-type"]) == (415, "application/problem+json")
    assert "application/x-ndjson" in answer.headers["accept"]
    assert answer.json()["type"] == "urn:tallystick:problem:unsupported-media-type"


WORDS = st.sampled_from(["1.0", "gzip", "acme", METER, "9" * 5000, "application/cloudevents+json", *NDJSON.values()])
HEADER_NAMES = ["content-type", "content-encoding", "content-length", "ce-specversion", "ce-id", "ce-source", "ce-type"]
HEADERS = st.dictionaries(
    st.sampled_from([*HEADER_NAMES, "ce-subject", "ce-time", "ce-data"]),
    WORDS | st.text(st.characters(max_codepoint=255), max_size=20),
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=100)  # lone surrogates too
NAMED = st.dictionaries(
    st.sampled_from(["value", "timestamp", "id", "customer", "meter"]) | TEXT,
    st.floats() | st.integers() | TEXT | st.none(),
    max_size=2,
)
DOCUMENTS = st.lists(NAMED.map(lambda changed: event() | changed) | NAMED, max_size=3).map(
    lambda some: json.dumps(some)
)
BODIES = st.binary(max_size=50) | DOCUMENTS.map(str.encode)
BODIES |= BODIES.map(gzip.compress)


@hypothesis_settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.reuse, Phase.generate],  # the examples are small as they are, and shrinking takes minutes here
)
@given(body=BODIES, headers=HEADERS, query=st.sampled_from([b"", b"results=all", b"results=%ff%00"]))
async def test_whatever_the_bytes_the_answer_is_never_a_5xx(
    app: FastAPI, api_key: str, body: bytes, headers: dict[str, str], query: bytes
) -> None:
    fields = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    status, answer = await call(app, api_key, body, fields, query)
    assert status in (202, 400, 413, 415, 422), answer
    json.loads(answer)


async def call(
    app: FastAPI, api_key: str, body: bytes, headers: list[tuple[bytes, bytes]], query: bytes = b""
) -> tuple[int, bytes]:
    """The application called as a server calls it, with bytes that no HTTP client would send."""
    parts = [{"type": "http.request", "body": body, "more_body": False}] if body != b"hung up" else []
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await app(
        {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/usage",
            "raw_path": b"/v1/usage",
            "query_string": query,
            "root_path": "",
            "headers": [(b"authorization", f"Bearer {api_key}".encode()), *headers],
        },
        receive,
        send,
    )
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    ("declared", "status"), [(b"9" * 5000, 413), (b"1048577", 413), (b"-1", 400), (b"1e3", 400), (b"\xb2", 400)]
)
async def test_a_declared_length_is_checked_before_the_body_is_read(
    app: FastAPI, api_key: str, declared: bytes, status: int
) -> None:
    assert (await call(app, api_key, b"hung up", [(b"content-length", declared)]))[0] == status


async def test_a_sender_that_hangs_up_in_the_middle_is_not_our_failure(app: FastAPI, api_key: str) -> None:
    status, _ = await call(app, api_key, b"hung up", [])
    assert status == 400


async def test_a_body_over_a_mebibyte_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/usage", content=b" " * (1024 * 1024 + 1))
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:tallystick:problem:too-large")

    async def drip() -> object:
        for _ in range(20):
            yield b" " * 100_000

    answer = await client.post("/v1/usage", content=drip())  # type: ignore[arg-type]
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer x", "Bearer tsk_ab_cd", "Basic dXNlcjpwYXNz", "Bearer tsk_é_é"]
)
async def test_without_a_valid_key_nothing_is_taken(anonymous: httpx.AsyncClient, header: str) -> None:
    answer = await anonymous.post("/v1/usage", json=event(), headers={b"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["type"] == "urn:tallystick:problem:unauthorized"


async def test_a_key_without_the_scope_is_refused_by_name(app: FastAPI, resources: Resources) -> None:
    async with db.transaction(resources.engine) as connection:
        key = await create_key(connection, name="reader", source="reader", scopes=["usage:read"])
    async with open_client(app, key) as reader:
        answer = await reader.post("/v1/usage", json=event())
        assert answer.status_code == 403
        assert "usage:write" in answer.json()["detail"]
        assert (await reader.get("/v1/usage", params={"customer": "acme"})).status_code == 200


async def record(resources: Resources, *events: object) -> None:
    from tallystick.usage.ledger import record_events

    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)  # type: ignore[arg-type]


async def test_usage_is_shown_by_window_under_every_name_of_the_customer(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await make_customer(resources)
    day = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=2)
    await record(
        resources,
        make_event("a", at=day, value="1.5"),
        make_event("b", at=day + timedelta(hours=23, minutes=59), value="2", customer_ref="cus_acme"),
        make_event("c", at=day + timedelta(days=1), value="4"),
        make_event("d", at=day, value="100", customer_ref="globex"),
    )
    window = {"from": day.isoformat(), "to": (day + timedelta(days=2)).isoformat()}
    for name in ("acme", "cus_acme"):
        answer = await client.get("/v1/usage", params={"customer": name, "meter": METER, "window": "day"} | window)
        body = answer.json()
        assert body["customer"] == "cus_acme"
        assert [(row["start"], row["quantity"], row["events"]) for row in body["data"]] == [
            (day.isoformat().replace("+00:00", "Z"), "3.5", 2),
            ((day + timedelta(days=1)).isoformat().replace("+00:00", "Z"), "4", 1),
        ]
    by_hour = await client.get("/v1/usage", params={"customer": "acme", "window": "hour"} | window)
    assert [row["quantity"] for row in by_hour.json()["data"]] == ["1.5", "2", "4"]


async def test_a_window_ends_at_a_whole_hour_or_a_period_boundary_and_nowhere_else(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await make_customer(resources)
    boundary = last_hour(17) + timedelta(seconds=23)
    await make_boundaries(resources, boundary)
    await record(
        resources,
        make_event("a", at=boundary - timedelta(seconds=1), value="1"),
        make_event("b", at=boundary, value="2"),
    )
    start = last_hour(0)
    answer = await client.get(
        "/v1/usage", params={"customer": "acme", "from": start.isoformat(), "to": boundary.isoformat()}
    )
    assert [row["quantity"] for row in answer.json()["data"]] == ["1"]
    answer = await client.get(
        "/v1/usage",
        params={"customer": "acme", "from": start.isoformat(), "to": (boundary + timedelta(seconds=1)).isoformat()},
    )
    assert (answer.status_code, answer.json()["field"]) == (422, "to")


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({}, "customer"),
        ({"customer": "acme", "from": "yesterday"}, "from"),
        ({"customer": "acme", "from": "2026-01-01T00:00:00"}, "from"),
        ({"customer": "acme", "window": "week"}, "window"),
        ({"customer": "acme", "from": "2026-02-01T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, "to"),
        ({"customer": "acme", "from": "0001-01-01T00:00:00Z", "to": "9999-01-01T00:00:00Z"}, "to"),
    ],
)
async def test_a_wrong_parameter_is_named(client: httpx.AsyncClient, parameters: dict[str, str], field: str) -> None:
    answer = await client.get("/v1/usage", params=parameters)
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("where", ["id", "customer", "properties"])
async def test_a_card_number_is_refused_wherever_it_would_be_kept(
    client: httpx.AsyncClient, resources: Resources, where: str
) -> None:
    number = "4242 4242 4242 4242"
    sent = event() | {where: {"user": number} if where == "properties" else number}
    answer = await client.post("/v1/usage", json=sent)
    ((rejected,), status) = answer.json()["rejected"], answer.status_code
    assert (status, rejected["code"]) == (422, "card_number")
    assert where in rejected["message"]
    assert (await client.put("/v1/customers/4242424242424242", json={"customer": "cus_1"})).status_code == 422
    assert await resources.redis.keys("*") in ([], [MARK_KEY.encode()])  # where the API began with an empty Redis
