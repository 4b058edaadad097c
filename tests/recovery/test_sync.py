"""The mirror is filled from Stripe's API, and what webhooks know better stays."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tallystick.resources import Resources
from tallystick.webhooks import reading, sync
from tallystick.webhooks.sync import RESUMED_WITHIN, sync_mirror
from tests.recovery.shop import Shop, access_of, between_answer_and_use, check, differing, receiving, refresh_all
from tests.webhooks.stripe_events import post, read


def now() -> datetime:
    return datetime.now(UTC)


class Died(Exception):
    """Stands for the end of a process."""


async def listed(shop: Shop, resources: Resources, since: int) -> list[str]:
    """The paths of the calls to Stripe after the first `since`, oldest first."""
    calls = (await shop.stripe.control.get("/_fake/requests")).json()["requests"]
    return [call["path"] for call in reversed(calls)][since:]


async def calls(shop: Shop) -> int:
    return len((await shop.stripe.control.get("/_fake/requests")).json()["requests"])


async def test_an_empty_mirror_is_filled(shop: Shop, resources: Resources) -> None:
    await shop.stripe.client.v1.billing.meters.create_async(
        {"display_name": "Calls", "event_name": "calls", "default_aggregation": {"formula": "sum"}}
    )
    await shop.sign_up("acme")
    _, canceled = await shop.sign_up("gone")
    await shop.cancel(canceled)
    await shop.sign_up("broke", card="pm_card_chargeCustomerFail")
    await shop.stripe.client.v1.prices.update_async(shop.price, {"active": False})
    assert len(await differing(resources)) > 10

    synced = await sync_mirror(resources, now(), all_invoices=True)

    assert await differing(resources) == []
    assert synced.objects == {
        "meters": 1,
        "products": 1,
        "active prices": 0,
        "inactive prices": 1,
        "customers": 3,
        "subscriptions": 3,
        "invoices": 3,
        "completed checkouts": 0,
        "payment methods": 2,
        "entitlements": 0,
    }
    assert await access_of(resources, "acme") == ("active", "subscription_active")
    assert await access_of(resources, "gone") == ("none", "ended")
    assert await access_of(resources, "broke") == ("none", "incomplete")
    assert await read(resources, "SELECT id FROM customers WHERE needs_refresh") == []


async def test_of_the_invoices_those_that_matter_are_read(shop: Shop, resources: Resources) -> None:
    await shop.control("clock", frozen=True)
    await shop.sign_up("acme")
    await shop.sign_up("broke", card="pm_card_chargeCustomerFail")
    at = (await shop.stripe.control.get("/_fake/clock")).json()["now"]

    # Half a year later the paid invoice is of no use, and the open one still is.
    synced = await sync_mirror(resources, datetime.fromtimestamp(at, UTC) + timedelta(days=180))

    assert (synced.objects["open invoices"], synced.objects["recent invoices"]) == (1, 0)
    assert [row["status"] for row in await read(resources, "SELECT status FROM invoices")] == ["open"]


async def test_an_interrupted_sync_goes_on_after_its_last_page(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_SIZE", 2)
    for name in ("one", "two", "three", "four", "five"):
        await shop.sign_up(name)

    def die_within_the_customers(name: str, objects: int) -> None:
        if (name, objects) == ("customers", 2):
            raise Died

    with pytest.raises(Died):
        await sync_mirror(resources, now(), report=die_within_the_customers)
    assert len(await read(resources, "SELECT id FROM customers")) == 2
    before = await calls(shop)

    synced = await sync_mirror(resources, now())

    assert synced.resumed
    assert synced.objects["customers"] == 5
    paths = await listed(shop, resources, before)
    assert "/v1/products" not in paths
    assert paths.count("/v1/customers") == 2
    assert await differing(resources) == []

    again = await sync_mirror(resources, now())
    assert not again.resumed
    assert again.objects["customers"] == 5


async def test_a_sync_begins_anew_when_asked_to_or_after_a_day(shop: Shop, resources: Resources) -> None:
    def die(name: str, objects: int) -> None:
        raise Died

    async def interrupt() -> None:
        with pytest.raises(Died):
            await sync_mirror(resources, now() - timedelta(seconds=1), restart=True, report=die)

    await interrupt()
    assert not (await sync_mirror(resources, now(), restart=True)).resumed
    await interrupt()
    assert not (await sync_mirror(resources, now() + RESUMED_WITHIN)).resumed
    # More is wanted now than was begun.
    await interrupt()
    assert not (await sync_mirror(resources, now(), all_invoices=True)).resumed


async def test_the_object_at_the_cursor_may_be_deleted_meanwhile(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PAGE_SIZE", 2)
    customers = [(await shop.sign_up(name))[0] for name in ("one", "two", "three", "four")]

    def die_within_the_customers(name: str, objects: int) -> None:
        if (name, objects) == ("customers", 2):
            raise Died

    with pytest.raises(Died):
        await sync_mirror(resources, now(), report=die_within_the_customers)
    await shop.stripe.client.v1.customers.delete_async(customers[2])

    await sync_mirror(resources, now())

    kept = {row["id"] for row in await read(resources, "SELECT id FROM customers")}
    assert kept >= set(customers) - {customers[2]}


async def test_a_webhook_that_comes_between_list_and_apply_wins(
    shop: Shop, resources: Resources, webhooks: httpx.AsyncClient
) -> None:
    await shop.control("webhooks", paused=True)
    _, subscription = await shop.sign_up("acme")
    await shop.control("clock", advance_seconds=3600)

    async def cancel() -> None:
        await shop.control("webhooks", paused=False)
        await shop.settle()
        await shop.cancel(subscription)
        await shop.settle()

    async with between_answer_and_use(shop, resources, "/v1/subscriptions", cancel) as slow:
        await sync_mirror(slow, now())

    assert await read(resources, "SELECT status FROM subscriptions") == [{"status": "canceled"}]
    assert await access_of(resources, "acme") == ("none", "ended")


async def test_a_change_of_the_same_kind_between_list_and_apply_wins(
    shop: Shop, resources: Resources, webhooks: httpx.AsyncClient
) -> None:
    """As above, but not into a final status, which would win by itself."""
    customer, _ = await shop.sign_up("acme")
    await shop.settle()
    await shop.control("clock", advance_seconds=3600)

    async def rename() -> None:
        await shop.stripe.client.v1.customers.update_async(customer, {"metadata": {"tallystick_ref": "renamed"}})
        await shop.settle()

    async with between_answer_and_use(shop, resources, "/v1/customers", rename) as slow:
        await sync_mirror(slow, now())

    assert await read(resources, "SELECT ref FROM customers") == [{"ref": "renamed"}]


async def test_an_event_from_before_the_sync_is_stale_however_late_it_comes(shop: Shop, resources: Resources) -> None:
    customer, _ = await shop.sign_up("acme")
    await shop.control("clock", advance_seconds=3600)
    await shop.stripe.client.v1.customers.update_async(customer, {"metadata": {"tallystick_ref": "renamed"}})
    await shop.control("clock", advance_seconds=3600)
    await shop.sign_up("another")
    await sync_mirror(resources, now())
    [created] = [
        event
        for event in await shop.events()
        if event["type"] == "customer.created" and event["data"]["object"]["id"] == customer
    ]

    async with receiving(shop, resources) as client:
        answer = await post(client, created)

    assert answer.json() == {"verdict": "stale"}
    assert await access_of(resources, "renamed") == ("active", "subscription_active")
    assert await access_of(resources, "acme") is None


async def test_an_event_of_after_the_sync_is_applied(shop: Shop, resources: Resources) -> None:
    customer, subscription = await shop.sign_up("acme")
    await sync_mirror(resources, now())

    async with receiving(shop, resources):
        await shop.stripe.client.v1.customers.update_async(customer, {"metadata": {"tallystick_ref": "renamed"}})
        await shop.cancel(subscription)
        await shop.settle()

    assert await access_of(resources, "renamed") == ("none", "ended")
    await refresh_all(resources)
    assert await differing(resources) == []


async def test_a_sync_that_is_followed_by_all_late_events_stays_right(shop: Shop, resources: Resources) -> None:
    async with receiving(shop, resources):
        await shop.control("webhooks", paused=True)
        for name in ("one", "two", "three"):
            _, subscription = await shop.sign_up(name)
            await shop.control("clock", advance_seconds=20)
            if name == "two":
                await shop.cancel(subscription)
        await sync_mirror(resources, now())
        assert await differing(resources) == []

        await shop.control("webhooks", paused=False, shuffle=True)
        await shop.settle()
    await refresh_all(resources)

    assert await differing(resources) == []


async def test_subscriptions_with_many_items_are_whole(shop: Shop, resources: Resources) -> None:
    services = shop.stripe.client.v1
    product = await services.products.create_async({"name": "More"})
    prices = [
        await services.prices.create_async(
            {"currency": "usd", "unit_amount": n, "product": product.id, "recurring": {"interval": "week"}}
        )
        for n in range(12)
    ]
    _, subscription = await shop.sign_up("acme")
    for price in prices:
        await services.subscription_items.create_async({"subscription": subscription, "price": price.id})

    await sync_mirror(resources, now())

    assert len(await read(resources, "SELECT id FROM subscription_items WHERE NOT deleted")) == 13
    assert (await check(resources)).good


async def test_references_of_checkouts_and_entitlements_are_filled_too(shop: Shop, resources: Resources) -> None:
    services = shop.stripe.client.v1
    feature = await services.entitlements.features.create_async({"name": "Export", "lookup_key": "export"})
    await services.products.features.create_async(shop.product, {"entitlement_feature": feature.id})
    await shop.sign_up("acme")
    session = await services.checkout.sessions.create_async(
        {
            "mode": "subscription",
            "client_reference_id": "by-checkout",
            "line_items": [{"price": shop.price, "quantity": 1}],
            "success_url": "https://app.example.com/",
        }
    )
    await shop.control(f"checkout_sessions/{session.id}/complete")

    synced = await sync_mirror(resources, now())

    assert (synced.objects["completed checkouts"], synced.objects["entitlements"]) == (1, 2)
    assert [row["lookup_key"] for row in await read(resources, "SELECT lookup_key FROM active_entitlements")] == [
        "export",
        "export",
    ]
    assert await access_of(resources, "by-checkout") == ("active", "subscription_active")
    assert await differing(resources) == []


async def test_the_lists_of_customers_are_gone_on_with_too(
    shop: Shop, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "CUSTOMERS_PER_PAGE", 1)
    for name in ("one", "two", "three"):
        await shop.sign_up(name)

    def die_within_the_payment_methods(name: str, objects: int) -> None:
        if (name, objects) == ("payment methods", 2):
            raise Died

    with pytest.raises(Died):
        await sync_mirror(resources, now(), report=die_within_the_payment_methods)
    before = await calls(shop)

    synced = await sync_mirror(resources, now())

    assert synced.objects["payment methods"] == 3
    assert (await listed(shop, resources, before)).count("/v1/payment_methods") == 1
    assert len(await read(resources, "SELECT id FROM payment_methods")) == 3
