"""References: linked, moved and unlinked by the product, or learnt from Stripe."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tallystick import db
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.webhooks.inbox import record_events
from tests.webhooks.stripe_events import (
    checkout_session,
    customer,
    deliver,
    event,
    read,
    read_access,
    subscription,
    verified,
)
from tests.webhooks.test_any_order import wait_until_blocked_or_done

NAMED = {"metadata": {"tallystick_ref": "acme"}}


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


async def read_links(client: httpx.AsyncClient, ref: str) -> list[tuple[str, str | None, str | None]]:
    """The lines of a timeline that tell of references, the newest first: reference, old and new customer."""
    lines: list[dict[str, Any]] = (await client.get(f"/v1/customers/{ref}/timeline")).json()["lines"]
    assert {line["cause"] for line in lines if line["what"] == "link"} <= {"link"}
    return [(line["object_id"], line["old"], line["new"]) for line in lines if line["what"] == "link"]


async def test_an_unlinked_reference_means_again_what_stripe_says(client: httpx.AsyncClient) -> None:
    await deliver(client, event("customer.created", customer("cus_1", metadata={"tallystick_ref": "acme"})))
    await client.put("/v1/customers/acme", json={"customer": "cus_2"})

    for _ in range(2):
        answer = await client.delete("/v1/customers/acme")
        assert (answer.status_code, answer.json()) == (200, {"ref": "acme", "customer": "cus_1"})
    assert (await client.get("/v1/customers/acme")).json()["customer"] == "cus_1"
    for ref in ("cus_1", "cus_2"):
        assert await read_links(client, ref) == [("acme", "cus_2", "cus_1"), ("acme", "cus_1", "cus_2")]


async def test_an_unlinked_reference_may_mean_nobody(client: httpx.AsyncClient) -> None:
    await client.put("/v1/customers/acme", json={"customer": "cus_1"})

    assert (await client.delete("/v1/customers/acme")).json() == {"ref": "acme", "customer": None}
    assert (await client.get("/v1/customers/acme/access")).status_code == 404
    assert (await client.delete("/v1/customers/nobody")).json() == {"ref": "nobody", "customer": None}
    assert (await client.delete("/v1/customers/cus_1")).status_code == 422
    assert await read_links(client, "cus_1") == [("acme", "cus_1", None), ("acme", None, "cus_1")]


async def test_linking_again_to_the_same_customer_is_no_change(client: httpx.AsyncClient) -> None:
    for _ in range(2):
        await client.put("/v1/customers/acme", json={"customer": "cus_1"})

    assert await read_links(client, "acme") == [("acme", None, "cus_1")]


async def test_two_who_move_a_reference_at_once_go_one_after_the_other(client: httpx.AsyncClient) -> None:
    moves = [client.put("/v1/customers/acme", json={"customer": f"cus_{number % 2}"}) for number in range(8)]
    assert {answer.status_code for answer in await asyncio.gather(*moves)} == {200}

    told = {line for ref in ("cus_0", "cus_1") for line in await read_links(client, ref)}
    assert told <= {
        ("acme", None, "cus_0"),
        ("acme", None, "cus_1"),
        ("acme", "cus_0", "cus_1"),
        ("acme", "cus_1", "cus_0"),
    }
    assert len([line for line in told if line[1] is None]) == 1
    last = (await read_links(client, "acme"))[0]
    assert last[2] == (await client.get("/v1/customers/acme")).json()["customer"]


async def test_a_customer_of_a_connected_account_cannot_be_linked(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.exec_driver_sql("INSERT INTO customers (id, account) VALUES ('cus_1', 'acct_1')")

    answer = await client.put("/v1/customers/acme", json={"customer": "cus_1"})

    assert (answer.status_code, answer.json()["field"]) == (422, "customer")
    assert await read(resources, "SELECT * FROM customer_links") == []


async def record(connection: db.Connection, resources: Resources, *sent: dict[str, Any], **rules: Any) -> None:
    """Record events in a transaction that is still open."""
    events = [verified(resources, one) for one in sent]
    await record_events(connection, events, "tallystick_ref", AccessRules(**rules), datetime.now(UTC))


@pytest.mark.parametrize("by", ["metadata", "checkout"])
async def test_unlinking_waits_for_the_customer_that_the_name_means_then(
    client: httpx.AsyncClient, resources: Resources, by: str
) -> None:
    name = (
        event("customer.updated", customer("cus_1", **NAMED), at=1)
        if by == "metadata"
        else event("checkout.session.completed", checkout_session(), at=1)
    )
    await client.put("/v1/customers/acme", json={"customer": "cus_2"})
    # The rules were changed since the customer was decided, so that whoever decides it writes it anew.
    async with db.direct_transaction(resources.engine) as connection:
        unpaid = event("customer.subscription.created", subscription(status="past_due"))
        await record(connection, resources, unpaid, name, paused="none")

    async with db.direct_transaction(resources.engine) as connection:
        paid = event("customer.subscription.updated", subscription(), at=9)
        await record(connection, resources, paid, paused="none")
        unlinking = asyncio.create_task(client.delete("/v1/customers/acme"))
        await wait_until_blocked_or_done(resources, unlinking)

    assert (await unlinking).json() == {"ref": "acme", "customer": "cus_1"}
    assert await read_access(client) == ("active", "subscription_active", ["price_1"])


async def test_a_link_tells_of_the_customer_that_the_name_meant_when_it_was_its_turn(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    others = [event("customer.created", customer(id_)) for id_ in ("cus_2", "cus_3")]
    await deliver(client, event("customer.created", customer("cus_1", **NAMED)), *others)

    # The name moves from cus_1 to cus_2 while somebody who links it to cus_3 waits for cus_1.
    async with db.direct_transaction(resources.engine) as connection:
        given_up = event("customer.updated", customer("cus_1"), at=5)
        taken = event("customer.updated", customer("cus_2", **NAMED), at=5)
        await record(connection, resources, given_up, taken)
        linking = asyncio.create_task(client.put("/v1/customers/acme", json={"customer": "cus_3"}))
        await wait_until_blocked_or_done(resources, linking)

    assert (await linking).status_code == 200
    lines = await read(resources, "SELECT customer, old, new FROM customer_timeline WHERE what = 'link' ORDER BY 1")
    assert [tuple(line.values()) for line in lines] == [("cus_2", "cus_2", "cus_3"), ("cus_3", "cus_2", "cus_3")]
    names = await read(resources, "SELECT customer, announced_refs AS refs FROM customer_access ORDER BY 1")
    assert names == await read(resources, "SELECT customer, refs FROM customer_names ORDER BY 1")
