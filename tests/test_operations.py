"""What the operator is given: log lines, metrics, traces, alert rules and the dashboard, and that they fit together."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe
import structlog
import yaml
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import Info, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typer.testing import CliRunner

from tallystick import cli, db, tracing, worker
from tallystick.config import Settings
from tallystick.gauges import measure_buffer, measure_queues
from tallystick.loops import Loop, run_loops
from tallystick.metrics import REGISTRY
from tallystick.resources import Resources, open_resources
from tallystick.usage.meters import refresh_meters
from tallystick.webhooks.inbox import BATCH_SIZE
from tests.conftest import WEBHOOK_SECRET, FakeStripe, make_settings
from tests.notifications.receiving import endpoint, receiving, tell, with_endpoints
from tests.serving import serve_in_thread
from tests.usage.making import METER, make_customer, make_meter, run
from tests.waiting import wait_until

MADE_ID = re.compile(r"[0-9a-f]{16}")


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """The log lines of our own code, as they would be written."""
    caught: list[dict[str, Any]] = []
    before = structlog.get_config()

    def catch(_: object, __: str, line: Any) -> Any:
        caught.append(dict(line))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, catch], cache_logger_on_first_use=False)
    yield caught
    structlog.configure(**before)


def signed(**event: Any) -> dict[str, Any]:
    """A webhook as Stripe sends it: content and headers."""
    body = json.dumps({"object": "event", "livemode": False, "created": int(datetime.now(UTC).timestamp())} | event)
    header = stripe.WebhookSignature.generate_signature_header(body, WEBHOOK_SECRET)
    return {"content": body, "headers": {"Stripe-Signature": header}}


NEW_CUSTOMER = {"type": "customer.created", "data": {"object": {"id": "cus_1", "object": "customer"}}}


# Request ids


@pytest.mark.parametrize("given", ["01J9ZQ-a.b_c", "a" * 64])
async def test_a_clean_request_id_is_kept(anonymous: httpx.AsyncClient, given: str) -> None:
    assert (await anonymous.get("/healthz", headers={"X-Request-Id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 65, "two words", 'a"b', "-a", "a\tb"])
async def test_any_other_request_id_is_replaced(anonymous: httpx.AsyncClient, given: str) -> None:
    answer = await anonymous.get("/healthz", headers={"X-Request-Id": given})
    assert MADE_ID.fullmatch(answer.headers["x-request-id"])


async def test_refusals_have_a_request_id_too_and_each_request_its_own(anonymous: httpx.AsyncClient) -> None:
    answers = [await anonymous.get("/v1/usage"), await anonymous.get("/nowhere"), await anonymous.get("/nowhere")]
    assert [answer.status_code for answer in answers] == [401, 404, 404]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


async def test_every_line_of_a_webhook_has_its_request_id_and_its_event(
    anonymous: httpx.AsyncClient, lines: list[dict[str, Any]]
) -> None:
    answer = await anonymous.post("/webhooks/stripe", **signed(id="evt_1", **NEW_CUSTOMER))
    refused = await anonymous.post("/webhooks/stripe", content="{}")
    mine = [line for line in lines if line.get("request_id") == answer.headers["x-request-id"]]
    assert [(line["event"], line["event_id"]) for line in mine] == [("stripe_event", "evt_1")]
    # Nothing of the event before it: nobody knows what the refused one was.
    [line] = [line for line in lines if line.get("request_id") == refused.headers["x-request-id"]]
    assert line["event"] == "stripe_event_refused"
    assert "event_id" not in line


async def test_what_the_commit_says_of_an_event_has_its_request_id_too(
    anonymous: httpx.AsyncClient, resources: Resources, lines: list[dict[str, Any]]
) -> None:
    """The task that commits works for many requests, and began before any of them."""
    poor = {"type": "customer.created", "data": {"object": {"id": "cus_\x00", "object": "customer"}}}
    quarantined = await anonymous.post("/webhooks/stripe", **signed(id="evt_1", **poor))
    await run(resources, "ALTER TABLE customers ADD CONSTRAINT a_bug CHECK (id <> 'cus_1')")
    try:
        failed = await anonymous.post("/webhooks/stripe", **signed(id="evt_2", **NEW_CUSTOMER))
    finally:
        await run(resources, "ALTER TABLE customers DROP CONSTRAINT a_bug")
    assert [
        (line["event"], line["event_id"], line["request_id"]) for line in lines if line["event"].startswith("stripe_e")
    ] == [
        ("stripe_event_quarantined", "evt_1", quarantined.headers["x-request-id"]),
        ("stripe_event", "evt_1", quarantined.headers["x-request-id"]),
        ("stripe_event_failed", "evt_2", failed.headers["x-request-id"]),
        ("stripe_event_refused", "evt_2", failed.headers["x-request-id"]),
    ]


async def test_every_line_of_a_loop_names_it(resources: Resources, lines: list[dict[str, Any]]) -> None:
    stop = asyncio.Event()

    async def work(_: Resources, now: datetime) -> int:
        structlog.get_logger().info("deep_inside")
        stop.set()
        return 1

    await run_loops(resources, [Loop("works", 60, work)], stop)
    assert [(line["event"], line["loop"]) for line in lines] == [("deep_inside", "works"), ("loop_ran", "works")]


async def test_a_loop_that_has_failed_for_hours_goes_on(
    resources: Resources, monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr("tallystick.loops.MAX_PAUSE_SECONDS", 0.0)
    stop = asyncio.Event()
    failures = 0

    async def fail(_: Resources, now: datetime) -> int:
        nonlocal failures
        failures += 1
        if failures == 1_030:
            stop.set()
        raise ConnectionError

    await run_loops(resources, [Loop("fails", 0.0001, fail)], stop)
    assert lines[-1]["failures"] == 1_030


async def test_a_worker_that_waits_for_stripe_to_come_back_stops_at_once(
    resources: Resources, fake_stripe: FakeStripe, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tallystick.loops.STOP_WITHIN_SECONDS", 0.1)
    fault = {"kind": "error_500", "path": "/v1/events", "times": 1_000}
    (await fake_stripe.control.post("/_fake/faults", json=fault)).raise_for_status()
    [recover] = [loop for loop in worker.LOOPS if loop.name == "recover"]
    stop = asyncio.Event()

    async def was_asked() -> bool:
        return "/v1/events" in (await fake_stripe.control.get("/_fake/requests")).text

    running = asyncio.create_task(run_loops(resources, [recover], stop))
    await wait_until(was_asked)
    stop.set()
    await running
    assert [line["event"] for line in lines] == []


# What went wrong, without what was sent

ERIKA = "erika@reference.example"  # named, since lines of code are shown


async def test_an_error_is_told_by_its_class_and_code_and_never_by_its_text(
    client: httpx.AsyncClient, resources: Resources, lines: list[dict[str, Any]]
) -> None:
    """PostgreSQL and its driver repeat the values that they were given."""
    stop = asyncio.Event()

    async def ask_nonsense(_: Resources, now: datetime) -> int:
        stop.set()
        async with db.transaction(resources.engine) as connection:
            await connection.execute(text("SELECT CAST(:number AS integer)"), {"number": ERIKA})
        return 0

    await make_customer(resources)
    await run(resources, f"ALTER TABLE customer_links ADD CONSTRAINT a_bug CHECK (ref <> '{ERIKA}')")
    try:
        answer = await client.put(f"/v1/customers/{ERIKA}", json={"customer": "cus_acme"})
    finally:
        await run(resources, "ALTER TABLE customer_links DROP CONSTRAINT a_bug")
    await run_loops(resources, [Loop("asks", 60, ask_nonsense)], stop)

    assert answer.status_code == 500
    assert ERIKA not in str(lines)
    [request, loop] = [line for line in lines if line["event"] in ("request_failed", "loop_failed")]
    assert (request["error"], request["sqlstate"], loop["error"]) == ("IntegrityError", "23514", "DBAPIError")
    assert "CheckViolationError" in request["traceback"]
    assert "ask_nonsense" in loop["traceback"]


def test_errors_that_others_log_are_told_without_their_texts() -> None:
    program = """
import asyncio, gc, logging, sys
from tallystick.logs import configure_logs

async def fail():
    try:
        raise KeyError(sys.argv[1])
    except KeyError as error:
        raise ExceptionGroup(sys.argv[1], [ValueError(sys.argv[1])]) from error

async def forget_a_task():
    asyncio.create_task(fail())
    await asyncio.sleep(0)

configure_logs("INFO")
asyncio.run(forget_a_task())
gc.collect()
try:
    raise ValueError(sys.argv[1])
except ValueError:
    logging.getLogger("uvicorn.error").exception("It failed")
"""
    ran = subprocess.run([sys.executable, "-c", program, ERIKA], capture_output=True, check=True, text=True)
    [forgotten, failed] = [json.loads(line) for line in ran.stdout.splitlines()]
    assert (forgotten["event"], forgotten["error"]) == ("Task exception was never retrieved", "ExceptionGroup")
    assert all(name in forgotten["traceback"] for name in ("KeyError", "ValueError", "in fail"))
    assert (failed["event"], failed["error"]) == ("It failed", "ValueError")
    assert ERIKA not in ran.stdout + ran.stderr


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(("command", "started"), [("serve", "uvicorn.error"), ("worker", "worker_started")])
async def test_every_line_of_a_process_is_json(
    resources: Resources, tmp_path: Path, command: str, started: str
) -> None:
    """Also those of the server, and what it says when it cannot do its work."""
    settings, log = resources.settings, tmp_path / "log"
    environment = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "HOME")},
        "DATABASE_URL": settings.database_url.replace("+asyncpg", ""),
        "REDIS_URL": settings.redis_url,
        "STRIPE_API_BASE": "http://127.0.0.1:1",
        "STRIPE_API_KEY": "sk_test_for_tests",
        "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET,
        "TALLYSTICK_PORT": free_port(),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tallystick", command], env=environment, stdout=output, stderr=output
        )

    async def ready() -> bool:
        return started in log.read_text() or process.poll() is not None

    try:
        await wait_until(ready)
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 30)
    written = [json.loads(line) for line in log.read_text().splitlines()]
    assert process.returncode in (0, -signal.SIGTERM)
    assert all(line.keys() >= {"event", "level", "timestamp"} for line in written)
    assert any(started in (line["event"], line.get("logger")) for line in written)


# Metrics


def value_of(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None, (name, labels)
    return value


async def test_requests_are_counted_by_template_and_never_by_path(
    client: httpx.AsyncClient, anonymous: httpx.AsyncClient
) -> None:
    await client.get("/v1/customers/erika@reference.example/access")
    await anonymous.get("/nowhere/erika@reference.example")
    await anonymous.request("ERIKA", "/healthz")
    count = "tallystick_http_request_seconds_count"
    assert value_of(count, method="GET", route="/v1/customers/{ref}/access", status="4xx") >= 1
    assert value_of(count, method="GET", route="none", status="4xx") >= 1
    assert value_of(count, method="other", route="/healthz", status="4xx") >= 1
    assert "erika" not in generate_latest(REGISTRY).decode().lower()


async def test_each_queue_shows_its_length_and_the_age_of_its_oldest(
    resources: Resources, client: httpx.AsyncClient
) -> None:
    now = datetime.now(UTC)
    hour = now.replace(minute=0, second=0, microsecond=0)
    await make_customer(resources)
    await make_meter(resources)
    for total, ref in enumerate(("acme", "acme", "nobody")):
        await run(
            resources,
            "INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end, quantity, events, opened_at)"
            " VALUES (:ref, 'm', :start, :end, 1, 1, :at)",
            ref=ref,
            start=hour - timedelta(hours=2 * total),
            end=hour - timedelta(hours=2 * total - 1),
            at=now - timedelta(hours=2),
        )
    for identifier, state in (("a", "pending"), ("b", "sending"), ("c", "parked"), ("d", "confirmed")):
        await run(
            resources,
            "INSERT INTO usage_deliveries (total_id, seal, opened_seal, customer, event_name, identifier, payload,"
            " value, timestamp, state, created_at)"
            " SELECT min(id), :seal, 1, 'cus_acme', 'm', :identifier, '{}', 1, 0, :state, :at FROM usage_totals",
            seal=ord(identifier),
            identifier=identifier,
            state=state,
            at=now - timedelta(hours=2),
        )
    for statement in (
        "INSERT INTO seal_requests VALUES ('cus_acme', 'in_1', :at)",
        "INSERT INTO meter_error_reports (event, type, received_at, next_attempt_at) VALUES ('e', 't', :at, :at)",
        "INSERT INTO usage_conflicts VALUES ('s', 'i', 'acme', 'm', 1, :at, :at, :at)",
        "INSERT INTO stripe_event_failures (id, type, failures, error, first_at) VALUES ('e', 't', 1, 'E', :at)",
        "INSERT INTO stripe_events (id, type, livemode, created, verdict) VALUES ('e', 't', false, :at, 'quarantined')",
        "UPDATE stripe_events SET received_at = :at",
        "INSERT INTO products (id, needs_refresh, updated_at) VALUES ('prod_1', true, :at)",
    ):
        await run(resources, statement, at=now - timedelta(hours=2))
    for state in ("pending", "proposed", "done"):
        await run(
            resources,
            "INSERT INTO usage_corrections (source, id, event_id, event_day, action, delta, reason, method, state,"
            " requested_at)"
            " VALUES ('s', CAST(:state AS text), 'e', current_date, 'void', 1, 'r', 'cancel', :state, :at)",
            state=state,
            at=now - timedelta(hours=2),
        )
    await client.post("/v1/usage", json=[{"id": "u1", "customer": "acme", "meter": METER, "value": 1}])

    await measure_queues(resources, now)
    await measure_buffer(resources, now + timedelta(minutes=5))

    expected = {
        "open_usage": (1, hour - timedelta(hours=1)),
        "unlinked_usage": (1, now - timedelta(hours=2)),
        "deliveries": (2, now - timedelta(hours=2)),
        "parked_deliveries": (1, now - timedelta(hours=2)),
        **dict.fromkeys(
            (
                *("seal_requests", "error_reports", "corrections", "proposed_corrections", "conflicts"),
                *("failing_events", "quarantined_events", "refresh"),
            ),
            (1, now - timedelta(hours=2)),
        ),
    }
    for queue, (length, since) in expected.items():
        assert value_of("tallystick_queue_length", queue=queue) == length, queue
        assert value_of("tallystick_queue_oldest_seconds", queue=queue) == pytest.approx(
            (now - since).total_seconds()
        ), queue
    assert value_of("tallystick_queue_length", queue="buffer") == 1
    assert 295 < value_of("tallystick_queue_oldest_seconds", queue="buffer") < 310
    assert value_of("tallystick_deliveries_by_state", state="pending") == 1

    await run(resources, "DELETE FROM seal_requests")
    await measure_queues(resources, now)
    assert value_of("tallystick_queue_oldest_seconds", queue="seal_requests") == 0


async def test_webhooks_that_wait_are_shown_with_the_age_of_the_oldest(
    anonymous: httpx.AsyncClient, resources: Resources
) -> None:
    async def some_wait() -> bool:
        return value_of("tallystick_webhooks_waiting") > 0

    async with resources.engine.begin() as connection:
        await connection.execute(text("LOCK TABLE stripe_events"))
        # More than the two batches take that wait for the lock.
        sent = [signed(id=f"evt_{number}", **NEW_CUSTOMER) for number in range(2 * BATCH_SIZE + 10)]
        posted = asyncio.gather(*(anonymous.post("/webhooks/stripe", **one) for one in sent))
        await wait_until(some_wait)
        first = value_of("tallystick_oldest_waiting_webhook_seconds")
        assert value_of("tallystick_oldest_waiting_webhook_seconds") > first > 0
    assert {answer.status_code for answer in await posted} == {200}
    assert value_of("tallystick_webhooks_waiting") == value_of("tallystick_oldest_waiting_webhook_seconds") == 0


async def test_the_pool_and_the_release_are_shown(settings: Settings) -> None:
    async with open_resources(settings, application_name="tests") as resources:
        async with resources.engine.connect(), resources.engine.connect():
            assert value_of("tallystick_database_connections") == 2
        assert value_of("tallystick_database_connections") == 0
        assert value_of("tallystick_database_pool_size") == settings.database_pool_size


# Traces

SECRETS = ("erika", "cus_", "sk_test", "whsec", "/hooks", "Bearer", "evt_", "127.0.0.1")


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    with tracing.record_spans(SimpleSpanProcessor(exporter), "tests"):
        yield exporter


async def run_once(resources: Resources, name: str) -> None:
    """One run of one of the worker's loops, as the worker does it."""
    [loop] = [loop for loop in worker.LOOPS if loop.name == name]
    stop = asyncio.Event()

    async def work(resources: Resources, now: datetime) -> int:
        stop.set()
        return await loop.run_once(resources, now)

    await run_loops(resources, [Loop(name, 60, work)], stop)


async def test_spans_say_what_was_done_and_never_for_whom(
    resources: Resources,
    client: httpx.AsyncClient,
    fake_stripe: FakeStripe,
    spans: InMemorySpanExporter,
    tmp_path: Path,
) -> None:
    customer = await fake_stripe.client.v1.customers.create_async({"metadata": {"tallystick_ref": "erika"}})
    await fake_stripe.client.v1.billing.meters.create_async(
        {"display_name": "m", "event_name": METER, "default_aggregation": {"formula": "sum"}}
    )
    await make_customer(resources, ref="erika", customer=customer.id)
    await refresh_meters(resources, datetime.now(UTC))
    at = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    usage = [{"id": "erika-1", "customer": "erika", "meter": METER, "value": 1, "timestamp": at}]
    parent = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    assert (await client.post("/v1/usage", json=usage, headers=parent)).status_code == 202
    await client.get("/v1/usage?customer=erika")
    await client.get("/v1/customers/erika/access")
    updated = {"id": customer.id, "object": "customer", "metadata": {"tallystick_ref": "erika"}}
    await client.post("/webhooks/stripe", **signed(id="evt_1", type="customer.updated", data={"object": updated}))

    await tell(resources, customer.id)
    async with receiving() as product:
        told = with_endpoints(resources, tmp_path, endpoint("product", product.url))
        for name in ("drain", "seal", "deliver_meter_events", "notifications"):
            await run_once(told, name)

    finished = spans.get_finished_spans()
    assert {span.name for span in finished} >= {
        *("POST /v1/usage", "GET /v1/customers/{ref}/access", "POST /webhooks/stripe", "webhook batch"),
        *("drain", "seal", "deliver_meter_events", "notifications", "notification", "Stripe"),
    }
    [post] = [span for span in finished if span.name == "POST /v1/usage"]
    assert post.context.trace_id == int("ab" * 16, 16)
    assert (post.attributes or {})["http.response.status_code"] == 202
    said = "\n".join(str(span.to_json()) for span in finished)
    assert [secret for secret in SECRETS if secret in said] == []


async def test_runs_that_find_nothing_leave_no_span_and_an_error_its_class_only(
    resources: Resources, spans: InMemorySpanExporter
) -> None:
    stop = asyncio.Event()
    ended: list[str] = []

    async def idle(_: Resources, now: datetime) -> int:
        ended.append("idle")
        return 0

    async def fail(_: Resources, now: datetime) -> int:
        stop.set()
        raise ValueError("erika")

    await run_loops(resources, [Loop("idle", 60, idle), Loop("fails", 60, fail)], stop)
    assert ended == ["idle"]
    [span] = spans.get_finished_spans()
    assert (span.name, span.status.description) == ("fails", "ValueError")
    assert "erika" not in span.to_json()


async def test_lines_name_their_trace(
    anonymous: httpx.AsyncClient, spans: InMemorySpanExporter, lines: list[dict[str, Any]]
) -> None:
    await anonymous.post("/webhooks/stripe", content="{}")
    [span] = spans.get_finished_spans()
    assert [line["trace_id"] for line in lines] == [f"{span.context.trace_id:032x}"]


async def test_the_frameworks_own_traces_stay_off(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """They carry paths and queries, and FastAPI would send them wherever the environment says."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    await client.get("/v1/customers/erika/access")
    assert exporter.get_finished_spans() == ()


async def test_traces_are_off_without_an_address_and_warn_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]]
) -> None:
    with tracing.export_spans(None, "tests"):
        assert not tracing.is_on()
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with tracing.export_spans("http://127.0.0.1:1", "tests"):
        assert not tracing.is_on()
    assert [line["event"] for line in lines] == ["traces_not_sent"]


async def test_spans_go_to_the_address_that_is_set() -> None:
    posted: list[str] = []

    async def collect(request: Request) -> Response:
        posted.append(request.url.path)
        return Response(media_type="application/x-protobuf")

    collector = Starlette(routes=[Route("/{path:path}", collect, methods=["POST"])])
    # In a thread of its own: what is left is sent while this one stops.
    with serve_in_thread(collector) as url:
        async with open_resources(make_settings(otel_endpoint=url), application_name="tests"):
            with tracing.span("work"):
                pass
    assert not tracing.is_on()
    assert posted == ["/v1/traces"]


# Alert rules and the dashboard


@pytest.fixture(scope="module")
def alerts(project_root: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load((project_root / "ops" / "alerts.yml").read_text())["groups"]
    assert all(group.keys() == {"name", "rules"} for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def panels(project_root: Path) -> list[dict[str, Any]]:
    dashboard = json.loads((project_root / "ops" / "dashboard.json").read_text())
    found: list[dict[str, Any]] = dashboard["panels"]
    return found


def series() -> dict[str, set[str]]:
    """Every name that Prometheus may see of this registry, with its labels."""
    known = {"up": {"job", "instance"}}
    for collector in REGISTRY._collector_to_names:
        assert isinstance(collector, MetricWrapperBase)
        labels = {*collector._labelnames, "instance", "job"}
        names = {collector._name + ending for ending in ENDINGS[str(collector._type)]}
        known |= {name: labels | ({"le"} if name.endswith("_bucket") else set()) for name in names}
        if isinstance(collector, Info):
            known[f"{collector._name}_info"] |= collector._value.keys()
    return known


ENDINGS = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
    "info": ("_info",),
}
SELECTOR = re.compile(r"\b(up|tallystick_\w+)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'^(\w+)(=|!=|=~|!~)"((?:[^"\\]|\\.)*)"$')
GROUPING = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")


def check_expression(expression: str) -> None:
    """Its names are metrics, its labels theirs, and its brackets close."""
    known = series()
    selected = SELECTOR.findall(expression)
    assert selected, expression
    for name, matchers in selected:
        assert name in known, f"{name} in {expression}"
        for matcher in filter(None, matchers.split(",")):
            label, _, value = MATCHER.match(matcher.strip()).groups()  # type: ignore[union-attr]
            assert label in known[name], f"{label} of {name}"
            re.compile(value)
            if label == "loop":
                assert set(value.split("|")) <= {loop.name for loop in worker.LOOPS}, value
    labels = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
    assert labels <= set().union(*(known[name] for name, _ in selected)), expression
    stripped = re.sub(r'"[^"]*"', "", expression)
    assert all(stripped.count(left) == stripped.count(right) for left, right in ("()", "{}", "[]"))


def test_every_alert_is_about_metrics_that_exist_and_is_well_formed(alerts: list[dict[str, Any]]) -> None:
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}, rule
        assert re.fullmatch(r"Tallystick[A-Za-z]+", rule["alert"])
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))
        assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
        assert rule["annotations"].keys() == {"summary", "runbook"}
        # A comparison is what makes it an alert: without one it would always fire.
        assert re.search(r" (==|>|>=|<) |^absent", rule["expr"])
        check_expression(rule["expr"])


def test_every_panel_is_about_metrics_that_exist(panels: list[dict[str, Any]]) -> None:
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            check_expression(target["expr"])


def test_gauges_of_queues_are_never_added_up(alerts: list[dict[str, Any]], panels: list[dict[str, Any]]) -> None:
    """Each worker exports the same ones."""
    expressions = [rule["expr"] for rule in alerts] + [each["expr"] for panel in panels for each in panel["targets"]]
    gauges = [c._name for c in REGISTRY._collector_to_names if isinstance(c, MetricWrapperBase) and c._type == "gauge"]
    own = {"tallystick_database_connections", "tallystick_database_pool_size"}
    for gauge in set(gauges) - own:
        for expression in expressions:
            uses = re.findall(rf"([\w)]*\s*)\(\s*(?:abs\()?{gauge}\b", expression)
            assert not [use for use in uses if use.strip() == "sum"], expression
            assert gauge not in expression or uses, expression


def test_every_alert_has_its_section_and_every_section_its_alert(
    alerts: list[dict[str, Any]], project_root: Path
) -> None:
    page = (project_root / "docs" / "operations.md").read_text()
    sections = re.findall(r"^### (Tallystick\w+)$", page, re.MULTILINE)
    assert sections == [rule["alert"] for rule in alerts]
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_metric_has_its_line_in_the_documentation(project_root: Path) -> None:
    page = (project_root / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"^\| `(tallystick_\w+)", page, re.MULTILINE))
    shown = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in series()} - {"up"}
    assert documented == shown


async def test_every_queue_has_its_line_in_the_documentation(resources: Resources, project_root: Path) -> None:
    await measure_queues(resources, datetime.now(UTC))
    await measure_buffer(resources, datetime.now(UTC))
    [queues] = [c for c in REGISTRY._collector_to_names if getattr(c, "_name", "") == "tallystick_queue_length"]
    measured = {sample.labels["queue"] for metric in queues.collect() for sample in metric.samples}
    page = (project_root / "docs" / "operations.md").read_text()
    table = page.partition("| queue |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == measured


COMMAND = re.compile(r"^tallystick ([a-z-]+(?: [a-z]+)?)(.*)$", re.MULTILINE)


def test_every_command_of_the_documentation_exists_with_its_options(project_root: Path) -> None:
    page = (project_root / "docs" / "operations.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
    found = COMMAND.findall(blocks) + COMMAND.findall("\n".join(re.findall(r"`(tallystick [^`]+)`", page)))
    assert len(found) > 10
    for command, rest in found:
        words = command.split()
        shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [*words, "--help"])
        if shown.exit_code:  # the second word is an argument
            shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [words[0], "--help"])
        assert shown.exit_code == 0, command
        for option in re.findall(r"--[a-z-]+", rest.partition("#")[0]):
            assert option in shown.stdout, f"{command} {option}"
