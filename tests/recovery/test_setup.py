"""The endpoint at Stripe: made, brought up to date, left alone."""

import pytest
from pydantic import SecretStr

from tallystick.app import create_app
from tallystick.resources import Resources
from tallystick.stripe_gateway import API_VERSION
from tallystick.webhooks.endpoint_setup import SetupError, list_endpoints, problems_of, set_up_endpoint
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.recovery import listed_types
from tests.recovery.shop import Shop, access_of
from tests.serving import serve

URL = "https://billing.example.com/webhooks/stripe"


async def test_an_endpoint_is_made_with_the_handled_types_and_our_version(shop: Shop, resources: Resources) -> None:
    made = await set_up_endpoint(resources, URL)

    assert (made.action, made.url) == ("created", URL)
    assert made.secret is not None
    assert made.secret.startswith("whsec_")
    [endpoint] = await list_endpoints(Reader(resources))
    assert endpoint["id"] == made.id
    assert sorted(endpoint["enabled_events"]) == sorted(listed_types())
    assert (endpoint["api_version"], endpoint["status"]) == (API_VERSION, "enabled")
    assert problems_of(endpoint) == []


async def test_the_second_time_nothing_is_changed(shop: Shop, resources: Resources) -> None:
    made = await set_up_endpoint(resources, URL)

    again = await set_up_endpoint(resources, URL)

    assert (again.id, again.action, again.secret, again.hint) == (made.id, "unchanged", None, None)
    assert len(await list_endpoints(Reader(resources))) == 1


async def test_an_endpoint_is_brought_up_to_date_and_keeps_its_secret(shop: Shop, resources: Resources) -> None:
    old = await shop.stripe.client.v1.webhook_endpoints.create_async(
        {"url": URL, "enabled_events": ["customer.created", "charge.succeeded"], "api_version": API_VERSION}
    )
    await shop.stripe.client.v1.webhook_endpoints.update_async(old.id, {"disabled": True})
    [endpoint] = await list_endpoints(Reader(resources))
    assert len(problems_of(endpoint)) == 3

    updated = await set_up_endpoint(resources, URL)

    assert (updated.id, updated.action, updated.secret) == (old.id, "updated", None)
    [endpoint] = await list_endpoints(Reader(resources))
    assert problems_of(endpoint) == []


async def test_another_api_version_is_left_with_a_word_on_what_to_do(shop: Shop, resources: Resources) -> None:
    old = await shop.stripe.client.v1.webhook_endpoints.create_async(
        {"url": URL, "enabled_events": ["*"], "api_version": "2025-02-24.acacia"}
    )

    updated = await set_up_endpoint(resources, URL)
    again = await set_up_endpoint(resources, URL)

    assert (updated.id, updated.action, again.action) == (old.id, "updated", "unchanged")
    for answer in (updated, again):
        assert answer.hint is not None
        assert "--new" in answer.hint
    moved = await set_up_endpoint(resources, URL, new=True)
    assert (moved.action, moved.id != old.id) == ("created", True)
    # From now on the new one is the one that is looked after.
    assert (await set_up_endpoint(resources, URL)).id == moved.id


async def test_the_secret_that_is_printed_is_the_one_that_signs(shop: Shop, resources: Resources) -> None:
    made = await set_up_endpoint(resources, URL)
    assert made.secret is not None
    settings = resources.settings.model_copy(update={"stripe_webhook_secret": (SecretStr(made.secret),)})

    async with serve(create_app(settings)) as url:
        await shop.stripe.client.v1.webhook_endpoints.update_async(made.id, {"url": f"{url}/webhooks/stripe"})
        await shop.sign_up("acme")
        await shop.settle()

    assert await access_of(resources, "acme") == ("active", "subscription_active")


@pytest.mark.parametrize("url", ["billing.example.com", "ftp://billing.example.com", "https://"])
async def test_what_is_no_address_is_refused(resources: Resources, url: str) -> None:
    with pytest.raises(SetupError):
        await set_up_endpoint(resources, url)
