"""The same change from every shape that Stripe gave its objects, and none from what is no object."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tallystick import db
from tallystick.mirror.changes import CustomerChange, InvoiceChange, SubscriptionChange
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.webhooks.inbox import record_events
from tallystick.webhooks.translate import Translation, translate
from tallystick.webhooks.verification import StripeEvent
from tests.conftest import empty_stores
from tests.webhooks.stripe_events import NOON, checkout_session, customer, event, invoice, item, price, subscription

KEY = "tallystick_ref"


def before_basil_subscription() -> dict[str, Any]:
    """As in versions before 2025-03-31.basil: the subscription has the period, its items have none."""
    payload = subscription()
    [only] = payload["items"]["data"]
    for name in ("current_period_start", "current_period_end"):
        payload[name] = only.pop(name)
    return payload


def before_basil_invoice() -> dict[str, Any]:
    payload = invoice()
    del payload["parent"]
    return payload | {"subscription": "sub_1", "paid": False, "charge": None, "payment_intent": "pi_1"}


def expanded_subscription() -> dict[str, Any]:
    payload = subscription(customer=customer(), latest_invoice=invoice("in_9"))
    payload["items"]["data"][0]["price"]["product"] = {"id": "prod_1", "object": "product"}
    return payload


def expanded_invoice() -> dict[str, Any]:
    return invoice(of=subscription(), customer=customer())  # type: ignore[arg-type]


def test_subscriptions_of_every_version_make_the_same_change() -> None:
    sent = event("customer.subscription.updated", subscription(latest_invoice="in_9"))
    expected = translate(sent, KEY)
    assert isinstance(expected.change, SubscriptionChange)
    assert expected.change.items[0].current_period_start == datetime.fromtimestamp(NOON, UTC)

    older = before_basil_subscription() | {"latest_invoice": "in_9"}
    assert translate(sent | {"data": {"object": older}}, KEY) == expected
    assert translate(sent | {"data": {"object": expanded_subscription()}}, KEY) == expected


def test_invoices_of_every_version_make_the_same_change() -> None:
    sent = event("invoice.updated", invoice())
    expected = translate(sent, KEY)
    assert isinstance(expected.change, InvoiceChange)
    assert expected.change.subscription == "sub_1"

    assert translate(sent | {"data": {"object": before_basil_invoice()}}, KEY) == expected
    assert translate(sent | {"data": {"object": expanded_invoice()}}, KEY) == expected


def test_only_a_failed_payment_carries_the_time_of_the_failure() -> None:
    updated = translate(event("invoice.updated", invoice(), at=7, id_="evt_1"), KEY).change
    failed = translate(event("invoice.payment_failed", invoice(), at=7, id_="evt_1"), KEY).change

    assert isinstance(updated, InvoiceChange)
    assert updated.payment_failed_at is None
    failed_at = datetime.fromtimestamp(NOON + 7, UTC)
    assert failed == replace(updated, payment_failed_at=failed_at, payment_failing_since=failed_at)


def test_the_reference_is_read_from_the_key_that_is_set() -> None:
    sent = event("customer.created", customer(metadata={"org": "acme", KEY: "other"}))

    assert translate(sent, "org").change.ref == "acme"  # type: ignore[union-attr]


def test_a_reference_that_holds_a_card_number_is_not_kept() -> None:
    card = "4242 4242 4242 4242"
    change = translate(event("customer.created", customer(metadata={KEY: card}, delinquent=True)), KEY).change
    checkout = checkout_session(client_reference_id=card)

    assert isinstance(change, CustomerChange)
    assert (change.ref, change.delinquent) == (None, True)
    assert translate(event("checkout.session.completed", checkout), KEY).change is None


def test_a_subscription_that_was_deleted_is_canceled_whatever_its_status_says() -> None:
    change = translate(event("customer.subscription.deleted", subscription(status="active")), KEY).change

    assert isinstance(change, SubscriptionChange)
    assert (change.status, change.mark.deleted) == ("canceled", False)


@pytest.mark.parametrize(
    "type_",
    ["customer.subscription.paused", "customer.subscription.trial_will_end", "customer.subscription.of_a_later_year"],
)
def test_every_event_of_a_subscription_counts(type_: str) -> None:
    assert isinstance(translate(event(type_, subscription(status="paused")), KEY).change, SubscriptionChange)


@pytest.mark.parametrize("items", [None, [], "si_1", {"object": "list"}, {"data": {"id": "si_1"}}])
def test_a_subscription_without_a_list_of_items_is_to_be_fetched(items: Any) -> None:
    change = translate(event("customer.subscription.updated", subscription() | {"items": items}), KEY).change

    assert isinstance(change, SubscriptionChange)
    assert (change.items, change.complete, change.needs_refresh) == ((), False, True)


@pytest.mark.parametrize("odd", [None, True, "1760000000", 1.5, -1, 10**12, 10**30, float("inf"), [NOON], {"at": NOON}])
def test_a_time_that_is_none_is_left_out(odd: Any) -> None:
    change = translate(event("invoice.updated", invoice(due_date=odd)), KEY).change

    assert isinstance(change, InvoiceChange)
    assert change.due_date is None


TYPES = (
    "customer.created",
    "customer.deleted",
    "customer.subscription.created",
    "customer.subscription.deleted",
    "price.updated",
    "product.created",
    "invoice.created",
    "invoice.payment_failed",
)
KINDS = {"customer", "subscription", "price", "product", "invoice"}
FIELDS = sorted(
    {
        *customer(),
        *subscription(),
        *invoice(),
        *price(),
        *item(),
        "current_period_start",
        "subscription",
        "plan",
        "data",
    }
    | {"subscription_details", "behavior", "has_more", "usage_type", "meter", "default_payment_method", KEY, "deleted"}
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.sampled_from(("active", "paid", "canceled", "\x00", "a\x00", "\ud800", "x" * 300, NOON, 10**12, -1))
)
odd_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
)


@st.composite
def odd_payloads(draw: st.DrawFn) -> Any:
    """An object that Stripe might send, with some of its fields, or of its items' fields, replaced by anything."""
    payload = draw(st.sampled_from((customer, subscription, invoice, price, before_basil_subscription)))()
    payload |= draw(st.dictionaries(st.sampled_from(FIELDS), odd_values, max_size=4))
    items = payload.get("items")
    if isinstance(items, dict) and isinstance(items.get("data"), list):
        items["data"] += draw(st.lists(odd_values, max_size=2))
        items["data"] += [item() | draw(st.dictionaries(st.sampled_from(FIELDS), odd_values, max_size=2))]
    return draw(st.sampled_from((payload, draw(odd_values))))


@given(st.sampled_from(TYPES), odd_payloads())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_object_makes_translate_fail(type_: str, payload: Any) -> None:
    translation = translate(event(type_, payload), KEY)

    assert isinstance(translation, Translation)
    assert translation.change is None or translation.unusable is None


@given(st.lists(st.tuples(st.sampled_from(TYPES), odd_payloads()), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
async def test_whatever_is_translated_can_be_stored(resources: Resources, drawn: list[tuple[str, Any]]) -> None:
    await empty_stores(resources)
    events = []
    for type_, payload in drawn:
        sent = event(type_, payload)
        created = datetime.fromtimestamp(sent["created"], UTC)
        events.append(
            StripeEvent(sent["id"], type_, livemode=False, api_version=None, object_id=None, created=created, body=sent)
        )

    async with db.transaction(resources.engine) as connection:
        verdicts = await record_events(connection, events, KEY, AccessRules(), datetime.now(UTC))

    assert set(verdicts) <= {"applied", "stale", "ignored", "quarantined"}
