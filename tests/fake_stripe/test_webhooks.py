"""Webhooks: signatures, retries, shapes of older versions, and misbehaviour."""

from __future__ import annotations

import pytest
import stripe

from tests.fake_stripe.conftest import SECRET, START, Fake, Receiver


def test_delivery_is_signed_now_and_created_on_the_accounts_clock(fake: Fake, receiver: Receiver) -> None:
    fake.listen(receiver, "customer.created")
    fake.customer()
    entry = receiver.wait_for("customer.created")[0]
    # The receiver verified it within 300 s of real time already; another secret must not do.
    with pytest.raises(stripe.SignatureVerificationError):
        stripe.WebhookSignature.verify_header(entry["body"], entry["header"], "whsec_other", 300)
    assert entry["event"]["created"] == START
    assert entry["event"]["pending_webhooks"] == 1
    fake.post("settle")
    event = fake.client.v1.events.retrieve(entry["event"]["id"])
    assert event.pending_webhooks == 0
    assert receiver.types() == ["customer.created"]  # only what it listens to


@pytest.mark.parametrize("refusal", [500, 302, 400])
def test_retries_until_2xx_signed_afresh(fake: Fake, receiver: Receiver, refusal: int) -> None:
    fake.listen(receiver, "customer.created")
    receiver.answers = [refusal, refusal]
    fake.customer()
    fake.post("settle")
    assert [entry["status"] for entry in receiver.got] == [refusal, refusal, 200]
    attempts = fake.get("deliveries")["attempts"]
    assert [attempt["attempt"] for attempt in attempts] == [1, 2, 3]


def test_events_that_were_not_delivered_can_be_listed(fake: Fake, receiver: Receiver) -> None:
    fake.post("webhooks", {"max_attempts": 1})
    fake.listen(receiver)
    receiver.answers = [500]
    fake.client.v1.products.create({"name": "lost"})
    fake.post("settle")
    fake.client.v1.products.create({"name": "delivered"})
    fake.post("settle")
    failed = fake.client.v1.events.list({"delivery_success": False}).data
    assert [event.data.object["name"] for event in failed] == ["lost"]
    succeeded = fake.client.v1.events.list({"delivery_success": True}).data
    assert [event.data.object["name"] for event in succeeded] == ["delivered"]


def test_settle_tells_what_is_pending(fake: Fake, receiver: Receiver) -> None:
    fake.listen(receiver)
    fake.post("webhooks", {"paused": True})
    fake.client.v1.products.create({"name": "A"})
    pending = fake.post("settle", {"timeout_seconds": "0.05"}, status=504)["pending"]
    assert [delivery["event_type"] for delivery in pending] == ["product.created"]
    assert receiver.got == []
    fake.post("webhooks", {"paused": False})
    assert fake.post("settle") == {"pending": []}
    assert receiver.types() == ["product.created"]


def test_duplicates_and_another_order(fake: Fake, receiver: Receiver) -> None:
    fake.listen(receiver)
    fake.post("webhooks", {"shuffle": True, "duplicate_probability": 1})
    for _ in range(4):
        made = [fake.client.v1.products.create({"name": str(number)}).id for number in range(2)]
        fake.post("settle")
        order = [entry["event"]["data"]["object"]["id"] for entry in receiver.got]
        assert list(dict.fromkeys(order)) == made[::-1]
        assert len(order) >= 3  # each twice; the last repeat may still be on its way
        receiver.wait_until(4)
        receiver.got.clear()


def test_star_does_not_mean_thin_events(fake: Fake, receiver: Receiver) -> None:
    fake.listen(receiver, "*")
    fake.meter()
    fake.use("cus_nobody", "1")
    assert [entry["outcome"] for entry in fake.move(START + 60)] == ["errors reported: 1"]
    fake.post("settle")
    assert receiver.types() == ["billing.meter.created"]


def test_both_secrets_sign_while_one_is_being_replaced(fake: Fake, receiver: Receiver) -> None:
    fake.listen(receiver, secret="whsec_new", old_secret=SECRET)
    fake.client.v1.products.create({"name": "A"})
    entry = receiver.wait_for("product.created")[0]  # verified with the old one
    assert stripe.WebhookSignature.verify_header(entry["body"], entry["header"], "whsec_new", 300)


def test_endpoints_by_the_api(fake: Fake, receiver: Receiver) -> None:
    endpoints = fake.client.v1.webhook_endpoints
    made = endpoints.create({"url": receiver.url, "enabled_events": ["product.created"]})
    assert made.secret is not None
    assert made.secret.startswith("whsec_")
    assert "secret" not in endpoints.retrieve(made.id).to_dict()
    assert endpoints.update(made.id, {"disabled": True}).status == "disabled"
    fake.client.v1.products.create({"name": "A"})
    assert fake.get("deliveries")["pending"] == []
    fake.post("webhooks", {"paused": True})
    endpoints.update(made.id, {"disabled": False})
    fake.client.v1.products.create({"name": "B"})
    assert len(fake.get("deliveries")["pending"]) == 1
    endpoints.delete(made.id)
    assert fake.get("deliveries")["pending"] == []
    assert endpoints.list().data == []


def test_a_new_subscription_is_told_of_with_its_first_invoice(fake: Fake, receiver: Receiver) -> None:
    fake.listen(receiver)
    subscription = fake.subscribe(fake.customer(), fake.price(amount="900"))
    receiver.wait_for("customer.subscription.created", "invoice.paid")
    (told,) = receiver.events("customer.subscription.created")
    assert told["data"]["object"]["latest_invoice"] == subscription.latest_invoice


def test_endpoint_of_an_older_version_gets_the_older_shape(fake: Fake, receiver: Receiver) -> None:
    fake.listen(receiver, api_version="2024-06-20")
    subscription = fake.subscribe(fake.customer(), fake.price(amount="900"))
    receiver.wait_for("customer.subscription.created", "invoice.paid")
    event = receiver.events("customer.subscription.created")[0]
    assert event["api_version"] == "2024-06-20"
    older = event["data"]["object"]
    assert older["current_period_start"] == START
    assert "current_period_end" not in older["items"]["data"][0]
    invoice = receiver.events("invoice.paid")[0]["data"]["object"]
    assert (invoice["subscription"], invoice["paid"], "parent" in invoice) == (subscription.id, True, False)
    line = invoice["lines"]["data"][0]
    assert (line["type"], line["price"]["object"], line["plan"]["object"]) == ("subscription", "price", "plan")
