import asyncio
from datetime import datetime

import httpx
import pytest
from fastapi import FastAPI

from tallystick import db
from tallystick.access.routes import FIND_ACCESS_OF_ALL, AccessReader
from tallystick.resources import Resources, open_resources
from tests.webhooks.stripe_events import customer, deliver, event, invoice, subscription


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
        "until": None,
        "decided_by": created["id"],
        "prices": ["price_1"],
        "entitlements": [],
    }


async def test_an_unknown_customer_is_a_problem(client: httpx.AsyncClient) -> None:
    for path in ("/v1/customers/nobody/access", "/v1/customers/nobody"):
        answer = await client.get(path)

        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["type"] == "urn:tallystick:problem:unknown-customer"
        assert problem["title"] == "No customer is known by this name"


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


async def test_entitlements_are_shown_by_their_lookup_keys(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(client, event("customer.subscription.created", subscription()))
    before = (await client.get("/v1/customers/cus_1/access")).headers["etag"]
    async with db.transaction(resources.engine) as connection:
        await connection.exec_driver_sql(
            "INSERT INTO active_entitlements (id, customer, lookup_key, deleted) VALUES"
            " ('ent_1', 'cus_1', 'sso', false), ('ent_2', 'cus_1', 'reports', false), ('ent_3', 'cus_1', NULL, false),"
            " ('ent_4', 'cus_1', 'gone', true), ('ent_5', 'cus_2', 'of another', false)"
        )

    answer = await client.get("/v1/customers/cus_1/access", headers={"If-None-Match": before})

    assert (answer.status_code, answer.json()["entitlements"]) == (200, ["reports", "sso"])


async def test_several_are_answered_in_the_order_asked_for(client: httpx.AsyncClient) -> None:
    for number, status in ((1, "active"), (2, "past_due"), (3, "canceled")):
        named = customer(f"cus_{number}", metadata={"tallystick_ref": f"ref/{number}"})
        of = subscription(f"sub_{number}", status, items=[], customer=f"cus_{number}")
        await deliver(client, event("customer.created", named), event("customer.subscription.updated", of))

    asked = ["ref/3", "nobody", "cus_1", "ref/2", "ref/1", "cus_4", "ref/3"]
    answer = await client.post("/v1/access", json={"customers": asked})

    assert answer.status_code == 200
    found = answer.json()
    assert [(one["ref"], one["customer"], one["access"]) for one in found["customers"]] == [
        ("ref/3", "cus_3", "none"),
        ("cus_1", "cus_1", "active"),
        ("ref/2", "cus_2", "restricted"),
        ("ref/1", "cus_1", "active"),
    ]
    assert found["unknown"] == ["nobody", "cus_4"]
    alone = (await client.get("/v1/customers/cus_1/access")).json()
    assert found["customers"][1] == alone


@pytest.mark.parametrize("asked", [[], ["a"] * 101, [""], ["a" * 101], ["a\x00"], [1], "acme", None])
async def test_what_cannot_be_asked_for(client: httpx.AsyncClient, asked: object) -> None:
    answer = await client.post("/v1/access", json={"customers": asked})

    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")


async def test_those_who_ask_at_once_get_each_their_own_answer(client: httpx.AsyncClient) -> None:
    names = [f"c{number}" for number in range(30)]
    created = [event("customer.created", customer(f"cus_{name}", metadata={"tallystick_ref": name})) for name in names]
    await deliver(client, *created)
    asked = [*names, "nobody", *names]

    answers = await asyncio.gather(*(client.get(f"/v1/customers/{name}/access") for name in asked))

    assert [answer.json().get("customer") for answer in answers] == [
        None if name == "nobody" else f"cus_{name}" for name in asked
    ]
    assert answers[len(names)].status_code == 404


async def test_each_of_many_at_once_hears_that_postgresql_is_away_and_later_that_it_is_back(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources
) -> None:
    nowhere = resources.settings.model_copy(update={"database_url": "postgresql+asyncpg://127.0.0.1:1/none"})
    await client.get("/v1/customers/acme/access")  # the key is known from here on
    working = app.state.access_reader
    async with open_resources(nowhere, application_name="tests") as unreachable:
        reader = app.state.access_reader = AccessReader(unreachable.engine)
        answers = await asyncio.gather(*(client.get(f"/v1/customers/c{number}/access") for number in range(5)))
        assert [answer.status_code for answer in answers] == [503] * 5
        assert all(answer.json()["type"].endswith("unavailable") for answer in answers)
        reader._engine = resources.engine
        assert (await client.get("/v1/customers/acme/access")).status_code == 404
    app.state.access_reader = working


async def test_one_who_goes_away_takes_no_answer_from_the_others(resources: Resources) -> None:
    reader = AccessReader(resources.engine)
    reads = [asyncio.create_task(reader.read(f"c{number}")) for number in range(3)]
    await asyncio.sleep(0)  # all have asked, none is answered
    reads[1].cancel()
    assert await asyncio.gather(*reads[::2]) == [None, None]
    assert await reader.read("c1") is None


async def test_one_customer_and_several_are_answered_in_the_same_words(client: httpx.AsyncClient) -> None:
    await deliver(client, event("customer.created", customer(metadata={"tallystick_ref": "ac\u00fcme"})))
    await deliver(client, event("customer.subscription.created", subscription()))
    await deliver(client, event("invoice.payment_failed", invoice(), at=1))
    one = await client.get("/v1/customers/ac\u00fcme/access")
    several = await client.post("/v1/access", json={"customers": ["ac\u00fcme"]})
    assert several.content == b'{"customers":[%b],"unknown":[]}' % one.content


async def test_access_is_read_by_indexes(resources: Resources) -> None:
    async with db.transaction(resources.engine) as connection:
        for rows in (
            "INSERT INTO customers (id, ref) SELECT 'cus_' || n, 'ref_' || n FROM generate_series(1, 10000) n",
            "INSERT INTO customer_access SELECT id, 'none', 'no_subscription', now() FROM customers",
            "INSERT INTO customer_links (ref, customer) SELECT 'link_' || id, id FROM customers",
            "INSERT INTO active_entitlements (id, customer) SELECT 'ent_' || id, id FROM customers",
            "INSERT INTO checkout_sessions SELECT 'cs_' || id, id, 'checkout_' || id FROM customers",
        ):
            await connection.exec_driver_sql(rows)
        await connection.exec_driver_sql(
            "ANALYZE customers, customer_access, customer_links, active_entitlements, checkout_sessions"
        )
        # The plan that a prepared statement ends up with: made without knowing the names asked for.
        await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
        query = FIND_ACCESS_OF_ALL.text.replace(":refs", "$1")
        names = "'{ref_77,cus_77,link_cus_77,checkout_cus_77}'"
        await connection.exec_driver_sql(f"PREPARE asked AS {query}")
        plan = "\n".join([line for (line,) in await connection.exec_driver_sql(f"EXPLAIN EXECUTE asked ({names})")])
        found = (await connection.exec_driver_sql(f"EXECUTE asked ({names})")).all()
        await connection.exec_driver_sql("DEALLOCATE asked")
        await connection.rollback()
    assert "Seq Scan" not in plan, plan
    assert {row.customer for row in found} == {"cus_77"}
    assert len(found) == names.count("77")
