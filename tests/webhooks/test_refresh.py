"""Objects that events left in doubt are fetched from Stripe, and a fetch never undoes what came meanwhile."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from tallystick import db
from tallystick.config import Settings
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.webhooks import refresh
from tallystick.webhooks.inbox import record_events
from tallystick.webhooks.refresh import CLAIM_FOR, ROWS_PER_RUN, refresh_mirror
from tests.conftest import FakeStripe, open_client
from tests.serving import serve
from tests.webhooks.held_stripe import Stripe
from tests.webhooks.stripe_events import (
    customer,
    deliver,
    entitlement_summary,
    event,
    invoice,
    item,
    meter,
    payment_method,
    price,
    read,
    read_access,
    subscription,
    verified,
)

NOW = datetime.now(UTC)


async def test_a_stub_is_filled(client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]) -> None:
    state, _ = stripe
    state.objects = {
        "customers/cus_1": customer(metadata={"tallystick_ref": "acme"}),
        "prices/price_1": price(lookup_key="gold", active=False),
    }
    await deliver(client, event("customer.subscription.created", subscription()))

    assert await refresh_mirror(mirror, NOW) == 2
    assert await refresh_mirror(mirror, NOW) == 0

    assert sorted(state.asked) == ["customers/cus_1", "prices/price_1"]
    assert await read_access(client, "acme") == ("active", "subscription_active", ["price_1"])
    assert await read(mirror, "SELECT lookup_key, active FROM prices") == [{"lookup_key": "gold", "active": False}]


async def test_a_tie_is_settled_and_the_access_follows(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {
        "subscriptions/sub_1": subscription(status="past_due", items=[item("si_2", "price_2")]),
        "customers/cus_1": customer(),
    }
    await deliver(
        client,
        event("customer.subscription.updated", subscription(status="past_due"), id_="evt_1"),
        event("customer.subscription.updated", subscription(status="active"), id_="evt_2"),
    )
    assert (await read_access(client))[0] == "active"

    await refresh_mirror(mirror, NOW)

    assert await read_access(client) == ("restricted", "past_due", [])
    assert await read(mirror, "SELECT id FROM subscription_items WHERE NOT deleted") == [{"id": "si_2"}]
    rows = await read(mirror, "SELECT mark_event, needs_refresh FROM subscriptions")
    assert rows == [{"mark_event": "evt_2", "needs_refresh": False}]

    # The row keeps its place in the order of events.
    later = event("customer.subscription.updated", subscription(status="active"), at=1)
    assert await deliver(client, later) == ["applied"]


async def test_a_slow_fetch_does_not_undo_a_newer_event(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {"subscriptions/sub_1": subscription(status="past_due"), "customers/cus_1": customer()}
    state.gates = {"subscriptions/sub_1": asyncio.Event()}
    for id_ in ("evt_1", "evt_2"):
        await deliver(client, event("customer.subscription.updated", subscription(status="past_due"), id_=id_))

    refreshing = asyncio.create_task(refresh_mirror(mirror, NOW))
    while "subscriptions/sub_1" not in state.asked:
        state.arrived.clear()
        await state.arrived.wait()
    assert await deliver(client, event("customer.subscription.updated", subscription(), at=1)) == ["applied"]
    state.gates["subscriptions/sub_1"].set()
    await refreshing

    assert (await read_access(client))[0] == "active"


async def test_a_slow_fetch_does_not_undo_a_newer_fetch(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {"subscriptions/sub_1": subscription(status="past_due"), "customers/cus_1": customer()}
    state.gates = {"subscriptions/sub_1": asyncio.Event()}
    for id_ in ("evt_1", "evt_2"):
        await deliver(client, event("customer.subscription.updated", subscription(status="past_due"), id_=id_))

    slow = asyncio.create_task(refresh_mirror(mirror, NOW))
    while "subscriptions/sub_1" not in state.asked:
        state.arrived.clear()
        await state.arrived.wait()
    gate = state.gates.pop("subscriptions/sub_1")
    state.objects["subscriptions/sub_1"] = subscription(status="active")
    # Another worker finds the first one's claim run out. The row has changed nothing but its claim since.
    await refresh_mirror(mirror, NOW + CLAIM_FOR)
    assert (await read_access(client))[0] == "active"
    gate.set()
    await slow

    assert (await read_access(client))[0] == "active"


@pytest.mark.parametrize("gone", [404, {"id": "cus_1", "object": "customer", "deleted": True}])
async def test_what_stripe_no_longer_has_is_deleted_for_good(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str], gone: object
) -> None:
    state, _ = stripe
    state.objects = {"customers/cus_1": gone, "prices/price_1": price()}
    await deliver(client, event("customer.subscription.created", subscription()))

    await refresh_mirror(mirror, NOW)

    assert await read_access(client) == ("none", "customer_deleted", [])
    assert await deliver(client, event("customer.updated", customer(), at=9)) == ["stale"]


async def test_an_invoice_that_is_gone_no_longer_restricts(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {"customers/cus_1": customer(), "prices/price_1": price()}
    await deliver(client, event("customer.subscription.created", subscription()))
    for id_ in ("evt_1", "evt_2"):
        await deliver(client, event("invoice.payment_failed", invoice(), id_=id_))
    assert (await read_access(client))[0] == "restricted"

    await refresh_mirror(mirror, NOW)

    assert (await read_access(client))[0] == "active"


async def test_a_final_status_that_was_fetched_is_final(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {"subscriptions/sub_1": subscription(status="canceled"), "customers/cus_1": customer()}
    for id_ in ("evt_1", "evt_2"):
        await deliver(client, event("customer.subscription.updated", subscription(), id_=id_))

    await refresh_mirror(mirror, NOW)

    assert await deliver(client, event("customer.subscription.updated", subscription(), at=9)) == ["stale"]
    assert await read_access(client) == ("none", "ended", [])


async def test_items_that_an_event_did_not_show_are_listed(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    all_items = [item(f"si_{n:02}", f"price_{n:02}") for n in range(12)]
    shown = {"object": "list", "data": all_items[:10], "has_more": True}
    state.objects = {
        "subscriptions/sub_1": subscription() | {"items": shown},
        "subscription_items": {"object": "list", "data": all_items, "has_more": False},
        "customers/cus_1": customer(),
    }
    await deliver(client, event("customer.subscription.created", subscription(items=all_items)))
    await deliver(client, event("customer.subscription.updated", subscription() | {"items": shown}, at=1))
    assert len((await read_access(client))[2]) == 12

    del all_items[0]
    await refresh_mirror(mirror, NOW)

    assert (await read_access(client))[2] == [f"price_{n:02}" for n in range(1, 12)]
    assert await read(mirror, "SELECT needs_refresh FROM subscriptions") == [{"needs_refresh": False}]


async def test_entitlements_that_a_summary_did_not_show_are_listed_to_the_last_page(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    keys = [f"key_{number:02}" for number in range(13)]
    pages = [entitlement_summary(part)["entitlements"] for part in (keys[:8], keys[8:])]
    state.objects = {
        "entitlements/active_entitlements": pages[0] | {"has_more": True},
        "entitlements/active_entitlements?after=ent_key_07": pages[1],
        "customers/cus_1": customer(),
    }
    updated = "entitlements.active_entitlement_summary.updated"
    await deliver(client, event(updated, entitlement_summary(["key_00", "gone"])))
    await deliver(client, event(updated, entitlement_summary(keys[:10], has_more=True), at=1))

    await refresh_mirror(mirror, NOW)

    query = "SELECT lookup_key FROM active_entitlements WHERE NOT deleted ORDER BY 1"
    assert [row["lookup_key"] for row in await read(mirror, query)] == keys
    assert await read(mirror, "SELECT needs_refresh FROM entitlement_summaries") == [{"needs_refresh": False}]


async def test_a_slow_list_of_entitlements_does_not_undo_a_newer_summary(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    listed, updated = "entitlements/active_entitlements", "entitlements.active_entitlement_summary.updated"
    state.objects = {listed: entitlement_summary(["old"])["entitlements"], "customers/cus_1": customer()}
    state.gates = {listed: asyncio.Event()}
    await deliver(client, event(updated, entitlement_summary(["old"], has_more=True)))

    refreshing = asyncio.create_task(refresh_mirror(mirror, NOW))
    while listed not in state.asked:
        state.arrived.clear()
        await state.arrived.wait()
    await deliver(client, event(updated, entitlement_summary(["new"]), at=1))
    state.gates[listed].set()
    await refreshing

    query = "SELECT lookup_key FROM active_entitlements WHERE NOT deleted"
    assert await read(mirror, query) == [{"lookup_key": "new"}]


async def test_a_customer_that_is_gone_is_entitled_to_nothing(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    updated = "entitlements.active_entitlement_summary.updated"
    await deliver(client, event(updated, entitlement_summary(["gold"], "cus_unknown", has_more=True)))

    await refresh_mirror(resources, NOW)

    assert await read(resources, "SELECT lookup_key FROM active_entitlements WHERE NOT deleted") == []


async def test_ties_of_every_kind_are_settled(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {
        "payment_methods/pm_1": payment_method(type="us_bank_account"),
        "billing/meters/mtr_1": meter(status="inactive"),
        "products/prod_1": {"id": "prod_1", "object": "product", "active": False},
    }
    for _ in range(2):
        await deliver(
            client,
            event("payment_method.updated", payment_method()),
            event("billing.meter.updated", meter()),
            event("product.updated", {"id": "prod_1", "object": "product", "active": True}),
        )

    assert await refresh_mirror(mirror, NOW) == 3

    assert await read(mirror, "SELECT type FROM payment_methods") == [{"type": "us_bank_account"}]
    assert await read(mirror, "SELECT status FROM meters") == [{"status": "inactive"}]
    assert await read(mirror, "SELECT active FROM products") == [{"active": False}]


async def test_a_connected_accounts_objects_are_asked_of_that_account(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {"customers/cus_1": customer(), "customers/cus_2": customer("cus_2"), "prices/price_1": price()}
    await client.put("/v1/customers/acme", json={"customer": "cus_2"})
    theirs = verified(mirror, event("customer.subscription.created", subscription(), account="acct_1"))
    async with db.transaction(mirror.engine) as connection:
        await record_events(connection, [theirs], "tallystick_ref", AccessRules(), NOW)

    assert await refresh_mirror(mirror, NOW) == 3

    assert state.accounts == {"customers/cus_1": "acct_1", "prices/price_1": "acct_1", "customers/cus_2": None}
    accounts = await read(mirror, "SELECT id, account, needs_refresh FROM customers ORDER BY id")
    assert accounts == [
        {"id": "cus_1", "account": "acct_1", "needs_refresh": False},
        {"id": "cus_2", "account": "", "needs_refresh": False},
    ]


async def test_a_row_that_cannot_be_fetched_stops_no_other_and_is_tried_again_a_minute_later(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {
        "customers/cus_1": 500,
        "customers/cus_2": customer("cus_2"),
        "customers/cus_3": {"object": "customer"},
    }
    for number in (1, 2, 3):
        await client.put(f"/v1/customers/name_{number}", json={"customer": f"cus_{number}"})

    assert await refresh_mirror(mirror, NOW) == 1
    assert await refresh_mirror(mirror, NOW + CLAIM_FOR - timedelta(seconds=1)) == 0
    assert sorted(state.asked) == ["customers/cus_1", "customers/cus_2", "customers/cus_3"]

    state.objects["customers/cus_1"] = customer()
    assert await refresh_mirror(mirror, NOW + CLAIM_FOR) == 1
    rows = await read(mirror, "SELECT id FROM customers WHERE needs_refresh")
    assert rows == [{"id": "cus_3"}]


async def test_two_workers_do_not_fetch_the_same_rows(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    for number in range(6):
        state.objects[f"customers/cus_{number}"] = customer(f"cus_{number}")
        await client.put(f"/v1/customers/name_{number}", json={"customer": f"cus_{number}"})

    refreshed = await asyncio.gather(refresh_mirror(mirror, NOW), refresh_mirror(mirror, NOW))

    assert sum(refreshed) == 6
    assert len(state.asked) == 6


async def test_a_row_that_waited_long_for_its_turn_is_left_to_whoever_claims_it_next(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "FETCHES_AT_ONCE", 1)
    monkeypatch.setattr(refresh, "BEGIN_WITHIN", timedelta(milliseconds=50))
    state, _ = stripe
    held = asyncio.Event()
    for number in (1, 2):
        state.objects[f"customers/cus_{number}"] = customer(f"cus_{number}")
        state.gates[f"customers/cus_{number}"] = held
        await client.put(f"/v1/customers/name_{number}", json={"customer": f"cus_{number}"})

    slow = asyncio.create_task(refresh_mirror(mirror, NOW))
    await state.arrived.wait()
    [first] = state.asked
    await asyncio.sleep(0.1)
    state.gates = {}
    monkeypatch.undo()
    # Another worker finds both claims run out.
    assert await refresh_mirror(mirror, NOW + CLAIM_FOR) == 2
    held.set()

    assert await slow == 0
    assert sorted(state.asked) == sorted([first, "customers/cus_1", "customers/cus_2"])


async def test_a_claim_outlasts_the_wait_for_a_turn_and_the_call(
    client: httpx.AsyncClient, mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {"customers/cus_1": 500}
    await client.put("/v1/customers/acme", json={"customer": "cus_1"})
    slow = timedelta(seconds=80)
    settings = mirror.settings.model_copy(update={"stripe_timeout_seconds": slow.seconds})

    await refresh_mirror(replace(mirror, settings=settings), NOW)

    [row] = await read(mirror, "SELECT refresh_after FROM customers")
    assert row["refresh_after"] >= NOW + refresh.BEGIN_WITHIN + slow


async def test_a_kind_that_stripe_refuses_does_not_keep_the_others_waiting(
    mirror: Resources, stripe: tuple[Stripe, str]
) -> None:
    state, _ = stripe
    state.objects = {f"customers/cus_{number}": 403 for number in range(ROWS_PER_RUN)}
    state.objects["subscriptions/sub_1"] = subscription(customer="cus_0", items=[])
    async with db.transaction(mirror.engine) as connection:
        refused = "INSERT INTO customers (id, needs_refresh) SELECT 'cus_' || n, true FROM generate_series(0, :last) n"
        await connection.execute(text(refused), {"last": ROWS_PER_RUN - 1})
        tied = (
            "INSERT INTO subscriptions (id, customer, status, needs_refresh) VALUES ('sub_1', 'cus_0', 'unpaid', true)"
        )
        await connection.execute(text(tied))

    assert await refresh_mirror(mirror, NOW) == 1

    assert len(set(state.asked)) == ROWS_PER_RUN, "what the others leave is the customers'"
    rows = await read(mirror, "SELECT status, needs_refresh FROM subscriptions")
    assert rows == [{"status": "active", "needs_refresh": False}]


async def test_the_mirror_follows_the_fake_stripe(
    app: FastAPI, api_key: str, resources: Resources, fake_stripe: FakeStripe, settings: Settings
) -> None:
    """The whole way: the SDK makes objects, webhooks tell of them over HTTP, and what was left in doubt is fetched."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serve(app))
        client = await stack.enter_async_context(open_client(app, api_key))
        stripe = fake_stripe.client.v1
        product = await stripe.products.create_async({"name": "Things"})
        priced = await stripe.prices.create_async(
            {"product": product.id, "currency": "usd", "unit_amount": 500, "recurring": {"interval": "month"}}
        )
        # The endpoint comes late: the product and the price are known only from what links to them.
        secret = settings.stripe_webhook_secret[0].get_secret_value()
        endpoint = {"url": f"{url}/webhooks/stripe", "secret": secret, "enabled_events": ["*"]}
        (await fake_stripe.control.post("/_fake/webhook_endpoints", json=endpoint)).raise_for_status()
        created = await stripe.customers.create_async(
            {
                "metadata": {"tallystick_ref": "acme"},
                "payment_method": "pm_card_visa",
                "invoice_settings": {"default_payment_method": "pm_card_visa"},
            }
        )
        bought = await stripe.subscriptions.create_async({"customer": created.id, "items": [{"price": priced.id}]})
        await settle(fake_stripe)
        assert await read_access(client, "acme") == ("active", "subscription_active", [priced.id])

        await refresh_mirror(resources, datetime.now(UTC))
        assert await read(resources, "SELECT id, product, needs_refresh FROM prices") == [
            {"id": priced.id, "product": product.id, "needs_refresh": False}
        ]

        await stripe.subscriptions.cancel_async(bought.id)
        await settle(fake_stripe)
        assert await read_access(client, "acme") == ("none", "ended", [])
        verdicts = await read(resources, "SELECT DISTINCT verdict FROM stripe_events ORDER BY 1")
        assert "quarantined" not in {row["verdict"] for row in verdicts}


async def settle(fake_stripe: FakeStripe) -> None:
    """Return once every webhook has been answered with 2xx."""
    (await fake_stripe.control.post("/_fake/settle", json={"timeout_seconds": 10})).raise_for_status()
