from datetime import datetime

import httpx
import pytest
from fastapi import FastAPI

from tallystick import db
from tallystick.access.routes import FIND_ACCESS
from tallystick.auth import create_key
from tallystick.resources import Resources
from tests.conftest import open_client
from tests.webhooks.stripe_events import customer, deliver, event, invoice, read, read_access, subscription


async def test_access_of_a_customer(client: httpx.AsyncClient) -> None:
    created = event("customer.subscription.created", subscription())
    await deliver(client, event("customer.created", customer(metadata={"tallystick_ref": "acme"})), created)

    answer = await client.get("/v1/customers/acme/access")

    assert answer.status_code == 200
    body = answer.json()
    assert datetime.fromisoformat(body.pop("since")).tzinfo is not None
    assert body == {
        "customer": "cus_1",
        "ref": "acme",
        "access": "active",
        "reason": "subscription_active",
        "decided_by": created["id"],
        "prices": ["price_1"],
    }


async def test_an_unknown_customer_is_a_problem(client: httpx.AsyncClient) -> None:
    for path in ("/v1/customers/nobody/access", "/v1/customers/nobody"):
        answer = await client.get(path)

        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["type"] == "urn:tallystick:problem:unknown-customer"


async def test_the_etag_saves_the_answer_until_access_changes(client: httpx.AsyncClient) -> None:
    await deliver(client, event("customer.subscription.created", subscription()))
    first = await client.get("/v1/customers/cus_1/access")
    etag = first.headers["etag"]
    assert etag.startswith('"')

    for header in (etag, f"W/{etag}", f'"another", {etag}', "*"):
        unchanged = await client.get("/v1/customers/cus_1/access", headers={"If-None-Match": header})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == etag

    await deliver(client, event("invoice.payment_failed", invoice(), at=1))
    changed = await client.get("/v1/customers/cus_1/access", headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag


async def test_since_changes_only_with_the_access(client: httpx.AsyncClient) -> None:
    await deliver(client, event("customer.subscription.created", subscription(status="trialing")))
    trial = (await client.get("/v1/customers/cus_1/access")).json()
    converted = event("customer.subscription.updated", subscription(), at=1)
    await deliver(client, converted)
    paying = (await client.get("/v1/customers/cus_1/access")).json()
    await deliver(client, event("customer.subscription.deleted", subscription(status="canceled"), at=2))
    ended = (await client.get("/v1/customers/cus_1/access")).json()

    assert (trial["reason"], paying["reason"], ended["reason"]) == ("trial", "subscription_active", "ended")
    assert trial["since"] == paying["since"] < ended["since"]
    assert paying["decided_by"] == converted["id"]


async def test_a_link_wins_over_metadata_and_can_be_moved(client: httpx.AsyncClient) -> None:
    await deliver(
        client,
        event("customer.created", customer("cus_1", metadata={"tallystick_ref": "acme"})),
        event("customer.created", customer("cus_2"), at=1),
    )

    assert (await client.get("/v1/customers/acme")).json() == {"ref": "acme", "customer": "cus_1"}
    for customer_id in ("cus_2", "cus_2", "cus_1"):
        answer = await client.put("/v1/customers/acme", json={"customer": customer_id})
        assert (answer.status_code, answer.json()) == (200, {"ref": "acme", "customer": customer_id})
        assert (await client.get("/v1/customers/acme")).json()["customer"] == customer_id


async def test_a_reference_in_two_customers_metadata_belongs_to_the_newest(client: httpx.AsyncClient) -> None:
    named = {"tallystick_ref": "acme"}
    await deliver(client, event("customer.created", customer("cus_2", metadata=named), at=1))
    await deliver(client, event("customer.created", customer("cus_1", metadata=named)))
    assert (await client.get("/v1/customers/acme")).json()["customer"] == "cus_2"

    await deliver(client, event("customer.deleted", customer("cus_2", metadata=named), at=2))
    assert (await client.get("/v1/customers/acme")).json()["customer"] == "cus_1"


async def test_a_customer_may_be_linked_before_stripe_told_of_it(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await client.put("/v1/customers/acme", json={"customer": "cus_new"})

    assert await read_access(client, "acme") == ("none", "no_subscription", [])
    assert await read(resources, "SELECT id, needs_refresh FROM customers") == [
        {"id": "cus_new", "needs_refresh": True}
    ]

    await deliver(client, event("customer.subscription.created", subscription(customer="cus_new")))
    assert await read_access(client, "acme") == ("active", "subscription_active", ["price_1"])


@pytest.mark.parametrize(
    ("ref", "body"),
    [
        ("cus_1", {"customer": "cus_2"}),
        ("a" * 101, {"customer": "cus_1"}),
        ("a%00b", {"customer": "cus_1"}),
        ("a%0Ab", {"customer": "cus_1"}),
        ("acme", {"customer": "acme"}),
        ("acme", {"customer": "cus_"}),
        ("acme", {"customer": "cus_1\x00"}),
        ("acme", {"customer": "cus_1", "name": "Acme"}),
        ("acme", {}),
    ],
)
async def test_what_cannot_be_linked(
    client: httpx.AsyncClient, resources: Resources, ref: str, body: dict[str, str]
) -> None:
    answer = await client.put(f"/v1/customers/{ref}", json=body)

    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert await read(resources, "SELECT * FROM customer_links") == []


async def test_names_at_the_limits_can_be_linked(client: httpx.AsyncClient) -> None:
    for ref in ("a", "a" * 100, "Käse & Söhne", "%", "emoji 🧾"):
        path = "/v1/customers/" + httpx.URL("", params={"ref": ref}).query.decode().removeprefix("ref=").replace(
            "+", "%20"
        )
        assert (await client.put(path, json={"customer": "cus_1"})).status_code == 200
        assert (await client.get(path)).json() == {"ref": ref, "customer": "cus_1"}


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [("access:read", {("GET", "/access"), ("GET", "")}), ("customers:write", {("PUT", "")}), ("usage:write", set())],
)
async def test_each_route_asks_for_its_scope(
    app: FastAPI, resources: Resources, scope: str, allowed: set[tuple[str, str]]
) -> None:
    async with db.transaction(resources.engine) as connection:
        key = await create_key(connection, name="one scope", source="tests", scopes=[scope])
    async with open_client(app, key) as limited, open_client(app, None) as without_key:
        for method, suffix in (("GET", "/access"), ("GET", ""), ("PUT", "")):
            path = f"/v1/customers/acme{suffix}"
            body = {"customer": "cus_1"} if method == "PUT" else None
            status = (await limited.request(method, path, json=body)).status_code
            assert (status != 403) is ((method, suffix) in allowed), (method, suffix, status)
            assert (await without_key.request(method, path, json=body)).status_code == 401


async def test_access_is_one_indexed_read(resources: Resources) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.exec_driver_sql(
            "INSERT INTO customers (id, ref) SELECT 'cus_' || n, 'ref_' || n FROM generate_series(1, 5000) n"
        )
        await connection.exec_driver_sql(
            "INSERT INTO customer_access SELECT id, 'none', 'no_subscription', now() FROM customers"
        )
        await connection.exec_driver_sql("ANALYZE customers, customer_access, customer_links")
        for ref in ("ref_77", "cus_77"):
            plan = await connection.exec_driver_sql("EXPLAIN " + FIND_ACCESS.text.replace(":ref", f"'{ref}'"))
            lines = [line for (line,) in plan]
            assert not [line for line in lines if "Seq Scan on customer" in line and "links" not in line], lines
        await connection.rollback()
