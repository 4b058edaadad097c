"""`sync --check` finds what differs from Stripe, field by field, and repairs it on request."""

from datetime import UTC, datetime

import httpx
import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tallystick.webhooks.drift import Difference
from tallystick.webhooks.sync import sync_mirror
from tallystick.webhooks.translate import SUMMARY
from tests.recovery.shop import Shop, access_of, between_answer_and_use, check, differing
from tests.webhooks.stripe_events import read


@pytest.fixture
async def subscriber(shop: Shop, resources: Resources) -> tuple[str, str]:
    """A customer and its subscription, both in a mirror that is right."""
    ids = await shop.sign_up("acme")
    await sync_mirror(resources, datetime.now(UTC))
    return ids


async def change(resources: Resources, statement: str, **parameters: object) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text(statement), parameters)


async def test_a_mirror_that_is_right_has_no_drift(
    shop: Shop, resources: Resources, subscriber: tuple[str, str]
) -> None:
    checked = await check(resources)

    assert checked.good
    assert checked.drift == []
    assert checked.objects == {
        "product": 1,
        "price": 1,
        "customer": 1,
        "subscription": 1,
        "invoice": 1,
        "billing.meter": 0,
        "payment_method": 1,
        "checkout.session": 0,
        SUMMARY: 0,
    }


async def test_each_field_that_differs_is_named_with_both_values(
    shop: Shop, resources: Resources, subscriber: tuple[str, str]
) -> None:
    _, subscription = subscriber
    await change(resources, "UPDATE subscriptions SET status = 'past_due', cancel_at_period_end = true")
    await change(resources, "UPDATE subscription_items SET price = 'price_other', current_period_start = NULL")
    await change(resources, "UPDATE prices SET lookup_key = 'gold'")
    [item] = await read(resources, "SELECT id FROM subscription_items")

    checked = await check(resources)

    found = {one.id: one.differences for one in checked.drift}
    assert found[shop.price] == (Difference("lookup_key", "gold", None),)
    status, at_period_end, item_price, item_start = sorted(found[subscription], key=lambda one: one.field != "status")
    assert status == Difference("status", "past_due", "active")
    assert at_period_end == Difference("cancel_at_period_end", here=True, stripe=False)
    assert item_price == Difference(f"{item['id']}.price", "price_other", shop.price)
    assert (item_start.here, type(item_start.stripe)) == (None, datetime)
    assert not checked.good
    # Looking changes nothing.
    assert await read(resources, "SELECT status FROM subscriptions") == [{"status": "past_due"}]


async def test_drift_is_repaired_and_the_access_follows(
    shop: Shop, resources: Resources, subscriber: tuple[str, str]
) -> None:
    await change(resources, "UPDATE subscriptions SET status = 'canceled', mark_rank = 2")
    await change(resources, "UPDATE subscription_items SET deleted = true")
    await change(resources, "UPDATE customer_access SET access = 'none', reason = 'ended', prices = '{}'")
    await change(resources, "UPDATE customers SET ref = 'other'")

    checked = await check(resources, repair=True)

    assert checked.good
    assert {one.kind: one.repaired for one in checked.drift} == {"subscription": True, "customer": True}
    assert await differing(resources) == []
    assert await access_of(resources, "acme") == ("active", "subscription_active")


@pytest.mark.parametrize("table", ["customers", "subscriptions", "invoices", "prices", "products"])
async def test_a_missing_row_is_found_and_made(
    shop: Shop, resources: Resources, subscriber: tuple[str, str], table: str
) -> None:
    await change(resources, f"DELETE FROM {table}")  # noqa: S608

    [missing] = (await check(resources, repair=True)).drift

    assert missing.differences == (Difference("object", "missing", "present"),)
    assert await differing(resources) == []


async def test_what_stripe_has_deleted_is_found_and_entombed(
    shop: Shop, resources: Resources, subscriber: tuple[str, str]
) -> None:
    customer, _ = subscriber
    await shop.stripe.client.v1.customers.delete_async(customer)

    found = await differing(resources)
    assert ("customer", customer, "object") in found

    assert (await check(resources, repair=True)).good
    assert await read(resources, "SELECT deleted FROM customers") == [{"deleted": True}]
    assert await differing(resources) == []


async def test_a_row_that_is_deleted_by_mistake_comes_back(
    shop: Shop, resources: Resources, subscriber: tuple[str, str]
) -> None:
    await change(resources, "UPDATE customers SET deleted = true")

    [drifted] = (await check(resources, repair=True)).drift

    assert drifted.differences == (Difference("object", "deleted", "present"),)
    assert await read(resources, "SELECT deleted FROM customers") == [{"deleted": False}]


async def test_a_change_whose_webhook_is_on_its_way_is_no_drift(
    shop: Shop, resources: Resources, subscriber: tuple[str, str], webhooks: httpx.AsyncClient
) -> None:
    _, subscription = subscriber
    await shop.control("webhooks", paused=True)
    await shop.cancel(subscription)

    async def arrive() -> None:
        await shop.control("webhooks", paused=False)
        await shop.settle()

    # The subscriptions have been listed by then.
    async with between_answer_and_use(shop, resources, "/v1/invoices", arrive) as slow:
        checked = await check(slow)

    assert checked.drift == []
    assert await read(resources, "SELECT status FROM subscriptions") == [{"status": "canceled"}]


async def test_a_row_that_changes_while_it_is_repaired_is_left_alone(
    shop: Shop, resources: Resources, subscriber: tuple[str, str], webhooks: httpx.AsyncClient
) -> None:
    customer, _ = subscriber
    await change(resources, "UPDATE customers SET delinquent = true")

    async def rename() -> None:
        await shop.stripe.client.v1.customers.update_async(customer, {"metadata": {"tallystick_ref": "renamed"}})
        await shop.settle()

    # The second time that it is fetched is for its repair.
    async with between_answer_and_use(shop, resources, f"/v1/customers/{customer}", rename, time=2) as slow:
        checked = await check(slow, repair=True)

    assert checked.good
    assert await read(resources, "SELECT ref, delinquent FROM customers") == [{"ref": "renamed", "delinquent": False}]


async def test_a_sample_looks_at_some_of_each(shop: Shop, resources: Resources) -> None:
    for name in ("one", "two", "three", "four", "five"):
        await shop.sign_up(name)
    await sync_mirror(resources, datetime.now(UTC))
    await change(resources, "UPDATE customers SET ref = 'drifted'")

    checked = await check(resources, sample=2, all_invoices=False)

    # The two newest that Stripe lists, and up to two others by chance.
    assert 2 <= checked.objects["customer"] <= 4
    assert len([one for one in checked.drift if one.kind == "customer"]) == checked.objects["customer"]


async def test_meters_are_compared_and_repaired(shop: Shop, resources: Resources) -> None:
    meter = await shop.stripe.client.v1.billing.meters.create_async(
        {"display_name": "Calls", "event_name": "calls", "default_aggregation": {"formula": "sum"}}
    )
    await sync_mirror(resources, datetime.now(UTC))
    await shop.stripe.client.v1.billing.meters.deactivate_async(meter.id)

    assert await differing(resources) == [("billing.meter", meter.id, "status")]
    assert (await check(resources, repair=True)).good
    assert await differing(resources) == []


async def test_entitlements_and_payment_methods_are_compared_and_repaired(shop: Shop, resources: Resources) -> None:
    services = shop.stripe.client.v1
    feature = await services.entitlements.features.create_async({"name": "Export", "lookup_key": "export"})
    await services.products.features.create_async(shop.product, {"entitlement_feature": feature.id})
    customer, _ = await shop.sign_up("acme")
    await sync_mirror(resources, datetime.now(UTC))
    [entitlement] = await read(resources, "SELECT id FROM active_entitlements")
    [method] = await read(resources, "SELECT id FROM payment_methods")
    await change(resources, "UPDATE active_entitlements SET deleted = true")
    await change(resources, "UPDATE payment_methods SET customer = NULL")

    assert sorted(await differing(resources)) == [
        (SUMMARY, customer, entitlement["id"]),
        ("payment_method", method["id"], "customer"),
    ]
    assert (await check(resources, repair=True)).good
    assert await differing(resources) == []


async def test_what_belongs_to_a_connected_account_is_left_alone(
    shop: Shop, resources: Resources, subscriber: tuple[str, str]
) -> None:
    await change(resources, "INSERT INTO customers (id, account, ref) VALUES ('cus_theirs', 'acct_1', 'x')")

    checked = await check(resources)

    assert (checked.drift, checked.objects["customer"]) == ([], 1)
