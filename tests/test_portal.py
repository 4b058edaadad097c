"""`POST /v1/portal/sessions` against the fake Stripe."""

import httpx
import pytest
from fastapi import FastAPI

from tallystick import db
from tallystick.auth import create_key
from tallystick.resources import Resources
from tests.conftest import FakeStripe, open_client
from tests.usage.making import make_customer, read_all


@pytest.fixture
async def customer(resources: Resources, fake_stripe: FakeStripe) -> str:
    """A customer that Stripe knows and that the product calls `acme`."""
    made = await fake_stripe.client.v1.customers.create_async({})
    await make_customer(resources, customer=made.id)
    return made.id


async def test_a_customer_is_named_by_reference_or_by_stripe_id(client: httpx.AsyncClient, customer: str) -> None:
    for name in ("acme", customer):
        answer = await client.post("/v1/portal/sessions", json={"customer": name})
        assert answer.status_code == 201
        assert answer.json()["customer"] == customer
        assert answer.headers["cache-control"] == "no-store"
        async with httpx.AsyncClient() as browser:
            assert (await browser.get(answer.json()["url"])).status_code == 200


async def test_a_customer_that_stripe_knows_and_we_do_not_yet_is_served(
    client: httpx.AsyncClient, fake_stripe: FakeStripe
) -> None:
    made = await fake_stripe.client.v1.customers.create_async({})
    assert (await client.post("/v1/portal/sessions", json={"customer": made.id})).status_code == 201


@pytest.mark.parametrize("name", ["nobody", "cus_nobody"])
async def test_an_unknown_customer_is_a_404(client: httpx.AsyncClient, fake_stripe: FakeStripe, name: str) -> None:
    answer = await client.post("/v1/portal/sessions", json={"customer": name})
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:tallystick:problem:unknown-customer")


async def test_a_return_url_of_an_allowed_origin_is_passed_on(
    client: httpx.AsyncClient, customer: str, fake_stripe: FakeStripe
) -> None:
    url = "https://app.example.com/billing?tab=1"
    answer = await client.post("/v1/portal/sessions", json={"customer": "acme", "return_url": url, "locale": "de"})
    assert answer.status_code == 201
    last = (await fake_stripe.control.get("/_fake/requests")).json()["requests"][0]
    assert (last["params"]["return_url"], last["params"]["locale"]) == (url, "de")


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example.com/",
        "http://app.example.com/",
        "https://app.example.com:8443/",
        "https://app.example.com.evil.example/",
        "https://app.example.com@evil.example/",
        "https://evil.example\\@app.example.com/",
        "https://evil.example\\.app.example.com/",
        "//app.example.com/",
        "/billing",
        "javascript:alert(1)//https://app.example.com",
        "https:app.example.com/",
        " https://app.example.com/",
        "https://app.example.com\t/",
        "https://app.example.com\n.evil.example/",
        "",
    ],
)
async def test_a_return_url_that_leads_elsewhere_is_refused(client: httpx.AsyncClient, customer: str, url: str) -> None:
    answer = await client.post("/v1/portal/sessions", json={"customer": "acme", "return_url": url})
    assert (answer.status_code, answer.json()["field"]) == (422, "return_url")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "customer"),
        ({"customer": ""}, "customer"),
        ({"customer": "a\x00b"}, "customer"),
        ({"customer": "acme", "retrun_url": "x"}, "retrun_url"),
        ({"customer": "acme", "flow": "everything"}, "flow"),
    ],
)
async def test_a_wrong_field_is_named(client: httpx.AsyncClient, body: dict[str, str], field: str) -> None:
    answer = await client.post("/v1/portal/sessions", json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


async def test_stripe_away_is_a_503_and_stripe_refusing_a_502(
    client: httpx.AsyncClient, customer: str, fake_stripe: FakeStripe
) -> None:
    rule = {"method": "POST", "path": "/v1/billing_portal/sessions", "kind": "error_500", "times": 1}
    await fake_stripe.control.post("/_fake/faults", json=rule)
    answer = await client.post("/v1/portal/sessions", json={"customer": "acme"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    (await fake_stripe.control.post("/_fake/settings", json={"portal_default_configuration": False})).raise_for_status()
    answer = await client.post("/v1/portal/sessions", json={"customer": "acme"})
    assert (answer.status_code, answer.json()["type"]) == (502, "urn:tallystick:problem:stripe-refused")


@pytest.mark.parametrize(("field", "value"), [("configuration", "bpc_unknown"), ("locale", "xx")])
async def test_what_stripe_does_not_take_is_named(
    client: httpx.AsyncClient, customer: str, field: str, value: str
) -> None:
    answer = await client.post("/v1/portal/sessions", json={"customer": "acme", field: value})
    assert (answer.status_code, answer.json()["field"]) == (422, field)


async def test_the_url_is_nowhere_in_the_database(
    client: httpx.AsyncClient, customer: str, resources: Resources
) -> None:
    url = (await client.post("/v1/portal/sessions", json={"customer": "acme"})).json()["url"]
    tables = [
        name for (name,) in await read_all(resources, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    ]
    for table in tables:
        rows = await read_all(resources, f"SELECT t::text FROM {table} t")  # noqa: S608  names from the catalog
        assert not any(url.rsplit("/", 1)[-1] in str(row) for row in rows), table


async def test_a_key_needs_the_scope(app: FastAPI, resources: Resources) -> None:
    async with db.transaction(resources.engine) as connection:
        key = await create_key(connection, name="other", source="other", scopes=["usage:write"])
    async with open_client(app, key) as client:
        assert (await client.post("/v1/portal/sessions", json={"customer": "acme"})).status_code == 403
