"""Requests made up from the OpenAPI document, valid and not: none is answered 5xx, and every refusal is a problem.

There is something to find: a customer who subscribes at the fake Stripe, a meter, usage that was sent, and usage that
is parked. Half of the requests name it, so that they get past "there is no such thing"; each operation must have
succeeded at least once.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tallystick import db
from tallystick.app import create_app
from tallystick.auth import SCOPES, create_key
from tallystick.config import Settings
from tallystick.resources import Resources, open_resources
from tallystick.stripe_gateway import API_VERSION
from tallystick.usage.delivery import deliver_all
from tallystick.usage.ledger import record_events
from tallystick.usage.meters import refresh_meters
from tallystick.usage.sealing import seal_everything
from tests.conftest import SOURCE, WEBHOOK_SECRET, Servers, empty_stores, make_settings
from tests.serving import serve_in_thread
from tests.usage.making import METER, REF, last_hour, make_event, read_all, run

# A webhook is answered 500 when storage fails, and nothing here makes it fail; 503 is for parts that are away.
NEVER = range(500, 600)
# No signature that is made up holds; tests/test_bad_input.py signs events of any form.
NEVER_DONE = {"POST /webhooks/stripe", "POST /webhooks/stripe/{endpoint}"}

LINKED = "linked"
# A customer gets one portal session a second, so there must be several.
VISITORS = [f"visitor-{number}" for number in range(6)]
EVENTS = [f"used-{number}" for number in range(12)]

# What a field may hold that is there, by its name, or by its operation and its name. Ids are added once they are known.
KNOWN: dict[str, list[Any]] = {
    "customer": [REF],
    "/v1/portal/sessions customer": [REF, *VISITORS],
    "customers": [REF, LINKED, "unknown"],
    "ref": [REF],
    "DELETE ref": [LINKED],
    "subject": [REF],
    "meter": [METER],
    "/v1/usage type": [METER],
    "specversion": ["1.0"],
    "event_id": EVENTS,
    "/v1/usage/events/{id} id": EVENTS,
    "source": [SOURCE],
    "return_url": ["https://app.example.com/account"],
}
# Whole bodies that are right, but for what is known only later.
BODIES: dict[str, list[Any]] = {
    "POST /v1/usage": [
        [{"id": f"new-{number}", "customer": "", "meter": "", "value": value}]
        for number, value in enumerate(["1.5", "0", -2, "1e3"])
    ]
    + [{"specversion": "1.0", "id": "cloud", "source": "", "type": "", "subject": "", "data": {"value": 3}}],
    "POST /v1/usage/corrections": [
        {"id": f"c{number}", "event_id": "", "reason": "a test"} | action
        for number, action in enumerate([{"action": "void"}, {"action": "adjust", "value": "2"}])
    ],
    "PUT /v1/customers/{ref}": [{"customer": ""}],
    "POST /v1/portal/sessions": [
        {"customer": "", "return_url": ""},
        {"customer": "", "return_url": "", "flow_data": {"type": "payment_method_update"}},
        {
            "customer": "",
            "flow_data": {"type": "subscription_cancel", "subscription_cancel": {"subscription": ""}},
        },
    ],
}
QUERIES: dict[str, list[Any]] = {
    "GET /v1/usage": [
        {"customer": "", "meter": "", "window": window} for window in ("hour", "day", "month", "billing_period")
    ],
}


@pytest.fixture(scope="module")
def served(servers: Servers, fake_stripe_url: str) -> Iterator[tuple[str, str]]:
    """The application behind a socket, over stores that hold something, and a key with every scope."""
    own = make_settings(
        database_url=servers.postgres.url, redis_url=servers.valkey.url, stripe_api_base=fake_stripe_url
    )
    asyncio.run(empty(own))
    with serve_in_thread(create_app(own)) as url:
        yield url, asyncio.run(fill(own, url))
        httpx.post(f"{fake_stripe_url}/_fake/reset").raise_for_status()  # or it would go on sending webhooks here


async def empty(own: Settings) -> None:
    async with open_resources(own, application_name="tests") as resources:
        await empty_stores(resources)


async def fill(own: Settings, url: str) -> str:
    """A customer's life at Stripe, told by webhooks; usage that was sent and some that is parked. Gives a key."""
    async with (
        open_resources(own, application_name="tests") as resources,
        httpx.AsyncClient(base_url=own.stripe_api_base, timeout=30) as control,
    ):
        (await control.post("/_fake/reset")).raise_for_status()
        endpoint = {"url": f"{url}/webhooks/stripe", "secret": WEBHOOK_SECRET, "api_version": API_VERSION}
        (await control.post("/_fake/webhook_endpoints", json=endpoint)).raise_for_status()
        customer, subscription = await subscribe(resources)
        for ref in VISITORS:
            await resources.stripe.v1.customers.create_async({"metadata": {"tallystick_ref": ref}})
        (await control.post("/_fake/settle", json={"timeout_seconds": 20})).raise_for_status()
        async with db.transaction(resources.engine) as connection:
            key = await create_key(connection, name="any", source=SOURCE, scopes=list(SCOPES))
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as api:
            (await api.put(f"/v1/customers/{LINKED}", json={"customer": customer})).raise_for_status()
        await use(resources, EVENTS[:6])
        await run(resources, "UPDATE usage_deliveries SET event_name = 'gone'")  # which Stripe does not know
        await deliver_all(resources, datetime.now(UTC))
        await run(resources, "UPDATE usage_deliveries SET event_name = :meter", meter=METER)
        await use(resources, EVENTS[6:])
        await deliver_all(resources, datetime.now(UTC))
        states = await read_all(resources, "SELECT DISTINCT state FROM usage_deliveries ORDER BY state")
        assert states == [("parked",), ("sent",)]
        parked = await read_all(resources, "SELECT identifier FROM usage_deliveries WHERE state = 'parked'")
        recorded = await read_all(resources, "SELECT id FROM stripe_events")
    KNOWN["PUT customer"] = [customer]
    KNOWN["subscription"] = [subscription]
    KNOWN["identifier"] = [identifier for (identifier,) in parked]
    KNOWN["/v1/events/{id} id"] = [id for (id,) in recorded]
    return key


async def subscribe(resources: Resources) -> tuple[str, str]:
    """A meter, a price, a customer who pays for it: the ids of the customer and the subscription."""
    stripe = resources.stripe.v1
    meter = await stripe.billing.meters.create_async(
        {"display_name": "API", "event_name": METER, "default_aggregation": {"formula": "sum"}}
    )
    await refresh_meters(resources, datetime.now(UTC))
    product = await stripe.products.create_async({"name": "API"})
    price = await stripe.prices.create_async(
        {
            "product": product.id,
            "currency": "eur",
            "unit_amount": 2,
            "recurring": {"interval": "month", "usage_type": "metered", "meter": meter.id},
        }
    )
    customer = await stripe.customers.create_async({"metadata": {"tallystick_ref": REF}})
    method = await stripe.payment_methods.attach_async("pm_card_visa", {"customer": customer.id})
    await stripe.customers.update_async(customer.id, {"invoice_settings": {"default_payment_method": method.id}})
    subscription = await stripe.subscriptions.create_async({"customer": customer.id, "items": [{"price": price.id}]})
    return customer.id, subscription.id


async def use(resources: Resources, ids: list[str]) -> None:
    """One event an hour, sealed."""
    events = [make_event(id, at=last_hour() - timedelta(hours=number)) for number, id in enumerate(ids)]
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)
    await seal_everything(resources, datetime.now(UTC))


@pytest.fixture
def answers() -> Iterator[dict[str, set[int]]]:
    """The statuses of an operation's answers, one of which must be a success."""
    statuses: dict[str, set[int]] = defaultdict(set)
    yield statuses
    for operation, seen in statuses.items():
        assert operation in NEVER_DONE or any(200 <= status < 300 for status in seen), (operation, seen)


any_request = schemathesis.openapi.from_dict(create_app(make_settings()).openapi())


@any_request.hook
def before_generate_path_parameters(context: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return with_known(context.operation, strategy)


@any_request.hook
def before_generate_query(context: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return with_known(context.operation, strategy, QUERIES.get(context.operation.label))


@any_request.hook
def before_generate_body(context: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return with_known(context.operation, strategy, BODIES.get(context.operation.label))


def with_known(
    operation: Any, strategy: st.SearchStrategy[Any], right: list[Any] | None = None
) -> st.SearchStrategy[Any]:
    """What the strategy makes up; the same with known values in its fields; and what is right but for those."""

    def known(made_up: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.tuples(made_up, st.integers(0, 11)).map(lambda drawn: put_known(operation, *drawn))

    return st.one_of(strategy, known(strategy), *([known(st.sampled_from(right))] if right else []))


def put_known(operation: Any, value: Any, turn: int, name: str = "") -> Any:
    if isinstance(value, dict):
        return {field: put_known(operation, held, turn, field) for field, held in value.items()}
    if isinstance(value, list):
        return [put_known(operation, held, turn, name) for held in value]
    for key in (f"{operation.path} {name}", f"{operation.method.upper()} {name}", name):
        if key in KNOWN:
            return KNOWN[key][turn % len(KNOWN[key])]
    return value


# NDJSON is made up by tests/usage/test_formats.py; schemathesis has no serializer for it, and says so.
@pytest.mark.filterwarnings("ignore:Skipped test cases with unsupported payload media types:UserWarning")
@any_request.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_is_answered_with_a_server_error(
    case: Any, served: tuple[str, str], answers: dict[str, set[int]]
) -> None:
    answer = case.call(base_url=served[0], headers={"Authorization": f"Bearer {served[1]}"})
    answers[case.operation.label].add(answer.status_code)
    assert answer.status_code not in NEVER, answer.text
    if answer.status_code >= 400:
        kind = answer.headers["content-type"][0]
        usage_refused = answer.status_code == 422 and case.path == "/v1/usage" and case.method == "POST"
        assert kind == "application/problem+json" or usage_refused, kind
