"""`POST /v1/portal/sessions` against the fake Stripe."""

from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import text

from tallystick import db
from tallystick.app import create_app
from tallystick.auth import create_key
from tallystick.config import Settings
from tallystick.resources import Resources
from tests.conftest import FakeStripe, open_client
from tests.test_portal_checks import FLOWS, LEADS_ELSEWHERE, SUBSCRIPTION
from tests.tokens import AUDIENCE, ISSUER, SHARED_SECRET, make_claims, make_token
from tests.usage.making import make_customer, read_all


@pytest.fixture
async def customer(resources: Resources, fake_stripe: FakeStripe) -> str:
    """A customer that Stripe knows and that the product calls `acme`."""
    made = await fake_stripe.client.v1.customers.create_async({})
    await make_customer(resources, customer=made.id)
    return made.id


async def test_a_customer_is_named_by_reference_or_by_stripe_id(
    client: httpx.AsyncClient, customer: str, resources: Resources
) -> None:
    for name in ("acme", customer):
        await resources.redis.flushdb()  # a second later
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


async def test_both_addresses_of_a_request_are_checked(client: httpx.AsyncClient, customer: str) -> None:
    for url in LEADS_ELSEWHERE:
        answer = await client.post("/v1/portal/sessions", json={"customer": "acme", "return_url": url})
        assert (answer.status_code, answer.json()["field"]) == (422, "return_url")
        done = {"type": "redirect", "redirect": {"return_url": url}}
        flow = {"type": "payment_method_update", "after_completion": done}
        answer = await client.post("/v1/portal/sessions", json={"customer": "acme", "flow_data": flow})
        assert answer.status_code == 422
        assert answer.json()["field"] == "flow_data.after_completion.redirect.return_url"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "customer"),
        ({"customer": ""}, "customer"),
        ({"customer": "a\x00b"}, "customer"),
        ({"customer": "acme", "retrun_url": "x"}, "retrun_url"),
        ({"customer": "4242 4242 4242 4242"}, "customer"),
        ({"customer": "acme", "flow_data": {"type": "everything"}}, "flow_data.type"),
        ({"customer": "acme", "flow_data": {}}, "flow_data.type"),
    ],
)
async def test_a_wrong_field_is_named(client: httpx.AsyncClient, body: dict[str, str], field: str) -> None:
    answer = await client.post("/v1/portal/sessions", json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


async def test_stripe_away_is_a_503_and_stripe_refusing_a_502(
    client: httpx.AsyncClient, customer: str, fake_stripe: FakeStripe, resources: Resources
) -> None:
    for kind in ("error_500", "rate_limit", "drop_before"):
        rule = {"method": "POST", "path": "/v1/billing_portal/sessions", "kind": kind, "times": 1}
        (await fake_stripe.control.post("/_fake/faults", json=rule)).raise_for_status()
        answer = await client.post("/v1/portal/sessions", json={"customer": "acme"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5"), kind
        await resources.redis.flushdb()
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


CHEAPER = {
    "type": "subscription_update_confirm",
    "subscription_update_confirm": {
        "subscription": SUBSCRIPTION,
        "items": [{"id": "si_1", "price": "price_of_friends"}],
    },
}

AFTERWARDS: list[dict[str, Any]] = [
    {"type": "portal_homepage"},
    {"type": "hosted_confirmation", "hosted_confirmation": {"custom_message": "Thank you."}},
    {"type": "redirect", "redirect": {"return_url": "https://app.example.com/done"}},
]


@pytest.fixture
async def subscribed(customer: str, resources: Resources) -> str:
    """The customer `acme` with a subscription in the mirror, and another customer with one."""
    async with db.transaction(resources.engine) as connection:
        for id, owner in ((SUBSCRIPTION, customer), ("sub_other", "cus_other")):
            await connection.execute(
                text("INSERT INTO subscriptions (id, customer, status) VALUES (:id, :customer, 'active')"),
                {"id": id, "customer": owner},
            )
    return customer


async def asked_of_stripe(fake_stripe: FakeStripe) -> dict[str, Any]:
    """The parameters of the last call, as in its form."""
    last: dict[str, Any] = (await fake_stripe.control.get("/_fake/requests")).json()["requests"][0]["params"]
    return last


def as_form(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {field: text for key, part in parts for field, text in as_form(part, f"{name}[{key}]").items()}
    return {name: str(value)}


@pytest.mark.usefixtures("subscribed")
async def test_every_flow_reaches_stripe_as_it_was_given(
    client: httpx.AsyncClient, fake_stripe: FakeStripe, resources: Resources
) -> None:
    for flow, afterwards in product(FLOWS, AFTERWARDS):
        whole = flow | {"after_completion": afterwards}
        await client.post("/v1/portal/sessions", json={"customer": "acme", "flow_data": whole})
        # The fake Stripe has neither this subscription nor this coupon; what counts is what was asked of it.
        asked = await asked_of_stripe(fake_stripe)
        assert {name: value for name, value in asked.items() if name != "customer"} == as_form(whole, "flow_data")
        await resources.redis.flushdb()


@pytest.mark.usefixtures("subscribed")
async def test_a_subscription_of_somebody_else_is_refused_like_one_that_does_not_exist(
    client: httpx.AsyncClient,
) -> None:
    for kind in ("subscription_cancel", "subscription_pause", "subscription_update"):
        for subscription in ("sub_other", "sub_nobodys"):
            flow = {"type": kind, kind: {"subscription": subscription}}
            answer = await client.post("/v1/portal/sessions", json={"customer": "acme", "flow_data": flow})
            assert (answer.status_code, answer.json()["field"]) == (422, f"flow_data.{kind}.subscription")
            assert answer.json()["detail"] == "The customer has no subscription with this id."


async def test_one_session_a_second_is_made_for_a_customer(
    client: httpx.AsyncClient, customer: str, resources: Resources, fake_stripe: FakeStripe
) -> None:
    assert (await client.post("/v1/portal/sessions", json={"customer": "acme"})).status_code == 201
    for name in ("acme", customer):
        again = await client.post("/v1/portal/sessions", json={"customer": name})
        assert (again.status_code, again.headers["retry-after"]) == (429, "1")
    # Whoever waits as he is told gets in.
    (key,) = await resources.redis.keys("*portal*")
    assert 0 < await resources.redis.pttl(key) <= 1000
    other = await fake_stripe.client.v1.customers.create_async({})
    assert (await client.post("/v1/portal/sessions", json={"customer": other.id})).status_code == 201


async def test_without_redis_each_process_counts_for_itself(
    app: FastAPI, client: httpx.AsyncClient, customer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(app.state.resources.redis, "set", fail)
    statuses = [(await client.post("/v1/portal/sessions", json={"customer": "acme"})).status_code for _ in range(2)]
    assert statuses == [201, 429]


@pytest.fixture
async def frontend(settings: Settings, resources: Resources, subscribed: str) -> AsyncIterator[httpx.AsyncClient]:
    """What a page of the user `acme` calls; the tokens are signed with a shared secret."""
    served = settings.model_copy(
        update={
            "jwt_secret": SecretStr(SHARED_SECRET),
            "jwt_issuer": ISSUER,
            "jwt_audience": AUDIENCE,
            "cors_origins": ("https://app.example.com",),
        }
    )
    application = create_app(served)
    async with application.router.lifespan_context(application), open_client(application, user_token()) as opened:
        yield opened


def user_token(**changed: object) -> str:
    return make_token(make_claims(**changed), key=SHARED_SECRET, algorithm="HS256", headers={})


@pytest.mark.parametrize("body", [{}, {"customer": "acme"}])
async def test_a_user_opens_his_own_portal(frontend: httpx.AsyncClient, customer: str, body: dict[str, str]) -> None:
    answer = await frontend.post("/v1/portal/sessions", json=body)
    assert (answer.status_code, answer.json()["customer"]) == (201, customer)


async def test_a_user_may_name_himself_by_his_stripe_id(frontend: httpx.AsyncClient, customer: str) -> None:
    assert (await frontend.post("/v1/portal/sessions", json={"customer": customer})).status_code == 201


async def test_a_user_opens_nobody_else_s_portal(
    frontend: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_customer(resources, customer="cus_globex", ref="globex", subscribed=False)
    for name in ("globex", "cus_globex", "cus_nobody", "nobody", "ACME", "acme "):
        answer = await frontend.post("/v1/portal/sessions", json={"customer": name})
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:tallystick:problem:not-your-customer"), name
    assert "/v1/billing_portal/sessions" not in str((await fake_stripe.control.get("/_fake/requests")).json())


async def test_a_user_without_a_customer_is_a_404_and_a_wrong_token_a_401(frontend: httpx.AsyncClient) -> None:
    for token, status in ((user_token(sub="nobody"), 404), (user_token(aud="other"), 401), ("rubbish", 401)):
        answer = await frontend.post("/v1/portal/sessions", json={}, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == status
        assert answer.headers.get("www-authenticate", "").startswith("Bearer") is (status == 401)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"configuration": "bpc_generous"}, "configuration"),
        ({"flow_data": FLOWS[3]}, "flow_data.subscription_cancel.retention"),
        ({"flow_data": FLOWS[6]}, "flow_data.subscription_update_confirm.items"),
        ({"flow_data": CHEAPER}, "flow_data.subscription_update_confirm.items"),
    ],
    ids=["configuration", "retention", "discounts", "price"],
)
async def test_a_user_does_not_choose_what_the_portal_permits_nor_what_he_pays(
    frontend: httpx.AsyncClient, api_key: str, body: dict[str, Any], field: str
) -> None:
    answer = await frontend.post("/v1/portal/sessions", json=body)
    assert (answer.status_code, answer.json()["field"]) == (403, field)
    # The product may, for any of its customers.
    with_key = {"Authorization": f"Bearer {api_key}"}
    answer = await frontend.post("/v1/portal/sessions", json=body | {"customer": "acme"}, headers=with_key)
    assert answer.status_code != 403


async def test_a_user_cannot_end_somebody_else_s_subscription(frontend: httpx.AsyncClient) -> None:
    flow = {"type": "subscription_cancel", "subscription_cancel": {"subscription": "sub_other"}}
    answer = await frontend.post("/v1/portal/sessions", json={"flow_data": flow})
    assert answer.status_code == 422


async def test_a_token_opens_the_portal_and_nothing_else(frontend: httpx.AsyncClient) -> None:
    for path in ("/v1/usage?customer=acme", "/v1/customers/acme/access", "/v1/customers/acme"):
        assert (await frontend.get(path)).status_code == 401
    for path in ("/v1/usage", "/v1/access"):
        assert (await frontend.post(path, json={"customers": ["acme"]})).status_code == 401


async def test_without_settings_for_tokens_only_keys_are_let_in(app: FastAPI) -> None:
    async with open_client(app, user_token()) as client:
        answer = await client.post("/v1/portal/sessions", json={})
    assert (answer.status_code, "API key" in answer.json()["detail"]) == (401, True)


async def test_a_key_still_works_beside_tokens(frontend: httpx.AsyncClient, api_key: str) -> None:
    answer = await frontend.post(
        "/v1/portal/sessions", json={"customer": "acme"}, headers={"Authorization": f"Bearer {api_key}"}
    )
    assert answer.status_code == 201
