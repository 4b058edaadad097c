"""The portal, the checkout, and what entitles."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import stripe

from tests.fake_stripe.conftest import DAY, START, Fake, Receiver


def portal_url(fake: Fake, customer: str, **more: Any) -> str:
    params: Any = {"customer": customer, "return_url": "https://example.com/account?a=1&b=2"}
    return fake.client.v1.billing_portal.sessions.create(params | more).url


def test_portal_pays_what_is_open(fake: Fake) -> None:
    customer = fake.customer("pm_card_chargeCustomerFail")
    subscription = fake.subscribe(customer, fake.price(fake.meter(), "150")).id
    fake.use(customer, "3")
    fake.move(START + 32 * DAY)
    assert fake.status(subscription) == "past_due"

    url = portal_url(fake, customer)
    page = httpx.get(url, trust_env=False)
    assert "4.50 USD" in page.text
    assert "fake Stripe" in page.text
    assert 'href="https://example.com/account?a=1&amp;b=2"' in page.text
    after = httpx.post(url, trust_env=False, follow_redirects=True)
    assert "Nothing is open" in after.text
    assert fake.status(subscription) == "active"
    assert fake.invoices(customer)[0].status == "paid"


def test_portal_link_must_be_opened_within_five_minutes(fake: Fake) -> None:
    customer = fake.customer()
    late, in_time = portal_url(fake, customer), portal_url(fake, customer)
    assert httpx.get(in_time, trust_env=False).status_code == 200
    fake.move(START + 301)
    assert httpx.get(late, trust_env=False).status_code == 410
    assert httpx.get(in_time, trust_env=False).status_code == 200
    assert httpx.get(f"{fake.url}/p/session/test_guess", trust_env=False).status_code == 410


def test_portal_without_a_default_configuration_is_refused(fake: Fake) -> None:
    customer = fake.customer()
    fake.post("settings", {"portal_default_configuration": False})
    with pytest.raises(stripe.InvalidRequestError, match="default configuration"):
        portal_url(fake, customer)
    features: Any = {"invoice_history": {"enabled": True}}
    configuration = fake.client.v1.billing_portal.configurations.create({"features": features}).id
    assert portal_url(fake, customer, configuration=configuration).startswith(f"{fake.url}/p/session/")
    with pytest.raises(stripe.InvalidRequestError):
        portal_url(fake, "cus_unknown", configuration=configuration)


def test_checkout_subscribes_and_tells_the_reference(fake: Fake, receiver: Receiver) -> None:
    fake.listen(receiver, "checkout.session.completed")
    items: Any = [
        {"price": fake.price(amount="900"), "quantity": 2},
        {"price": fake.price(fake.meter()), "quantity": 1},
    ]
    session = fake.client.v1.checkout.sessions.create(
        {"mode": "subscription", "client_reference_id": "user-7", "line_items": items, "success_url": "https://x.test/"}
    )
    assert session.url is not None
    assert "Subscribe" in httpx.get(session.url, trust_env=False).text
    done = httpx.post(session.url, trust_env=False)
    assert (done.status_code, done.headers["location"]) == (303, "https://x.test/")
    receiver.wait_for("checkout.session.completed")
    completed = receiver.events("checkout.session.completed")[0]["data"]["object"]
    assert (completed["client_reference_id"], completed["status"]) == ("user-7", "complete")
    assert fake.status(completed["subscription"]) == "active"
    assert fake.invoices(completed["customer"])[0].amount_paid == 1800
    assert fake.control.post(f"/_fake/checkout_sessions/{session.id}/complete").status_code == 400


def test_summary_of_entitlements_embeds_ten(fake: Fake, receiver: Receiver) -> None:
    name = "entitlements.active_entitlement_summary.updated"
    fake.listen(receiver, name)
    customer = fake.customer()
    price = fake.price(amount="900")
    product: Any = fake.client.v1.prices.retrieve(price).product
    for number in range(12):
        feature = fake.client.v1.entitlements.features.create({"name": "F", "lookup_key": f"f{number}"}).id
        fake.client.v1.products.features.create(product, {"entitlement_feature": feature})
    subscription = fake.subscribe(customer, price).id
    receiver.wait_for(name)
    summary = receiver.events(name)[0]["data"]["object"]
    assert (len(summary["entitlements"]["data"]), summary["entitlements"]["has_more"]) == (10, True)
    listed = fake.client.v1.entitlements.active_entitlements.list({"customer": customer, "limit": 100})
    assert {entitlement.lookup_key for entitlement in listed.data} == {f"f{number}" for number in range(12)}
    fake.client.v1.subscriptions.cancel(subscription)
    assert fake.client.v1.entitlements.active_entitlements.list({"customer": customer}).data == []


def test_one_off_invoice_with_items(fake: Fake) -> None:
    customer = fake.customer()
    fake.client.v1.invoice_items.create(
        {"customer": customer, "amount": 500, "currency": "usd", "description": "Set-up"}
    )
    invoice = fake.client.v1.invoices.create({"customer": customer, "pending_invoice_items_behavior": "include"})
    assert (invoice.status, invoice.amount_due) == ("draft", 500)
    assert fake.client.v1.invoices.finalize_invoice(invoice.id).status == "open"
    assert fake.client.v1.invoices.pay(invoice.id).status == "paid"
    lines = fake.client.v1.invoices.line_items.list(invoice.id).data
    assert [line.description for line in lines] == ["Set-up"]
