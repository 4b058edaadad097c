"""Each kind of object that is mirrored, by its own events: what is kept of it, and what follows from it."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.meters import read_meters, refresh_meters
from tallystick.webhooks.translate import HANDLED_TYPES, THIN_TYPES, translate
from tests.conftest import FakeStripe
from tests.waiting import wait_until
from tests.webhooks.stripe_events import (
    NOON,
    checkout_session,
    customer,
    deliver,
    entitlement_summary,
    event,
    invoice,
    meter,
    payment_method,
    price,
    read,
    read_access,
    subscription,
)

PAYLOADS: dict[str, Any] = {
    "customer": customer(),
    "customer.subscription": subscription(),
    "product": {"id": "prod_1", "object": "product", "active": True},
    "price": price(),
    "invoice": invoice(),
    "payment_method": payment_method(),
    "checkout.session": checkout_session(),
    "entitlements.active_entitlement_summary": entitlement_summary(["gold"]),
    "billing.meter": meter(),
}


@pytest.mark.parametrize("type_", [type_ for type_ in HANDLED_TYPES if type_ not in THIN_TYPES])
def test_every_type_that_is_asked_for_is_understood(type_: str) -> None:
    translation = translate(event(type_, PAYLOADS[type_.rpartition(".")[0]]), "tallystick_ref")

    assert translation.change is not None


# Entitlements


async def lookup_keys(resources: Resources, customer_id: str = "cus_1") -> list[str]:
    query = "SELECT lookup_key FROM active_entitlements WHERE customer = :customer AND NOT deleted ORDER BY 1"
    return [row["lookup_key"] for row in await read(resources, query, customer=customer_id)]


SUMMARY = "entitlements.active_entitlement_summary.updated"


async def test_entitlements_are_those_of_the_latest_summary(client: httpx.AsyncClient, resources: Resources) -> None:
    later = event(SUMMARY, entitlement_summary(["gold", "silver"]), at=9)
    earlier = event(SUMMARY, entitlement_summary(["silver", "bronze"]), at=1)

    assert await deliver(client, later, earlier) == ["applied", "stale"]

    assert await lookup_keys(resources) == ["gold", "silver"]
    await deliver(client, event(SUMMARY, entitlement_summary([]), at=10))
    assert await lookup_keys(resources) == []
    assert await read(resources, "SELECT id, object_id FROM stripe_events WHERE verdict = 'stale'") == [
        {"id": earlier["id"], "object_id": "cus_1"}
    ]


async def test_a_summary_says_nothing_of_other_customers(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(
        client,
        event(SUMMARY, entitlement_summary(["gold"], "cus_1")),
        event(SUMMARY, entitlement_summary(["silver"], "cus_2")),
    )

    assert (await lookup_keys(resources, "cus_1"), await lookup_keys(resources, "cus_2")) == (["gold"], ["silver"])


async def test_a_summary_that_shows_ten_of_more_takes_none_away(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    keys = [f"key_{number:02}" for number in range(12)]
    await deliver(client, event(SUMMARY, entitlement_summary(keys)))
    await deliver(client, event(SUMMARY, entitlement_summary([*keys[:9], "new"], has_more=True), at=1))

    assert await lookup_keys(resources) == [*keys, "new"]
    assert await read(resources, "SELECT needs_refresh FROM entitlement_summaries") == [{"needs_refresh": True}]


# Payment methods


async def test_of_a_payment_method_only_its_links_and_type_are_kept(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await deliver(client, event("payment_method.attached", payment_method()))
    await deliver(client, event("payment_method.automatically_updated", payment_method(card={"last4": "9999"}), at=1))

    [row] = await read(resources, "SELECT * FROM payment_methods")
    assert (row["id"], row["customer"], row["type"], row["needs_refresh"]) == ("pm_1", "cus_1", "card", False)
    assert "4242" not in str(row)
    assert "9999" not in str(row)


async def test_a_detached_payment_method_stays_detached(client: httpx.AsyncClient, resources: Resources) -> None:
    detached = event("payment_method.detached", payment_method(customer=None), at=1)
    late = event("payment_method.updated", payment_method(), at=1)

    assert await deliver(client, detached, late) == ["applied", "stale"]

    assert await read(resources, "SELECT customer, deleted FROM payment_methods") == [
        {"customer": None, "deleted": False}
    ]


# Checkouts


async def customer_of(client: httpx.AsyncClient, ref: str) -> str | None:
    answer = await client.get(f"/v1/customers/{ref}")
    return str(answer.json()["customer"]) if answer.status_code == 200 else None


COMPLETED = "checkout.session.completed"


async def test_a_checkout_links_its_reference(client: httpx.AsyncClient) -> None:
    await deliver(
        client,
        event(COMPLETED, checkout_session()),
        event("customer.subscription.created", subscription()),
        event("customer.created", customer(), at=-1),
    )

    assert await customer_of(client, "acme") == "cus_1"
    assert await read_access(client, "acme") == ("active", "subscription_active", ["price_1"])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_of_two_checkouts_with_one_reference_the_later_has_it(
    client: httpx.AsyncClient, resources: Resources, order: tuple[int, ...]
) -> None:
    events = [
        event(COMPLETED, checkout_session("cs_1", customer="cus_1"), at=1),
        event(COMPLETED, checkout_session("cs_2", customer="cus_2"), at=2),
        event(COMPLETED, checkout_session("cs_3", customer="cus_3", client_reference_id="other"), at=3),
    ]
    await deliver(client, *(events[index] for index in order))

    assert (await customer_of(client, "acme"), await customer_of(client, "other")) == ("cus_2", "cus_3")
    names = await read(resources, "SELECT customer, refs FROM customer_names ORDER BY 1")
    assert [row["refs"] for row in names] == [[], ["acme"], ["other"]]

    await deliver(client, event("customer.deleted", customer("cus_2"), at=9))
    assert await customer_of(client, "acme") == "cus_1"


@pytest.mark.parametrize("checkout_first", [True, False])
async def test_metadata_wins_over_a_checkout_and_a_link_over_both(
    client: httpx.AsyncClient, checkout_first: bool
) -> None:
    events = [
        event(COMPLETED, checkout_session(customer="cus_1"), at=5),
        event("customer.created", customer("cus_2", metadata={"tallystick_ref": "acme"})),
    ]
    await deliver(client, *(events if checkout_first else events[::-1]))
    assert await customer_of(client, "acme") == "cus_2"

    await client.put("/v1/customers/acme", json={"customer": "cus_3"})
    assert await customer_of(client, "acme") == "cus_3"
    await client.delete("/v1/customers/acme")
    assert await customer_of(client, "acme") == "cus_2"


@pytest.mark.parametrize(
    "changed",
    [
        {"client_reference_id": None},
        {"client_reference_id": ""},
        {"client_reference_id": "x" * 101},
        {"client_reference_id": "a\x00"},
        {"client_reference_id": "4242424242424242"},
        {"customer": None},
    ],
    ids=str,
)
async def test_a_checkout_without_a_usable_reference_links_nothing(
    client: httpx.AsyncClient, resources: Resources, changed: dict[str, Any]
) -> None:
    assert await deliver(client, event(COMPLETED, checkout_session(**changed))) == ["ignored"]
    assert await read(resources, "SELECT * FROM checkout_sessions") == []


async def test_a_reference_that_looks_like_stripes_ids_means_nobody_else(client: httpx.AsyncClient) -> None:
    await deliver(client, event(COMPLETED, checkout_session(client_reference_id="cus_9")))

    assert await customer_of(client, "cus_9") is None


# Meters


async def meters(resources: Resources) -> dict[str, str]:
    async with db.transaction(resources.engine) as connection:
        return {name: one.status for name, one in (await read_meters(connection)).items()}


async def test_meters_follow_their_events_at_once(client: httpx.AsyncClient, resources: Resources) -> None:
    created, deactivated = event("billing.meter.created", meter()), meter(status="inactive")
    await deliver(client, created, event("billing.meter.deactivated", deactivated, at=9))
    assert await meters(resources) == {"calls": "inactive"}

    assert await deliver(client, event("billing.meter.updated", meter(), at=8)) == ["stale"]
    assert await meters(resources) == {"calls": "inactive"}
    await deliver(client, event("billing.meter.reactivated", meter(), at=10))
    assert await meters(resources) == {"calls": "active"}


async def test_a_slow_list_of_meters_does_not_undo_an_event(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    made = await fake_stripe.client.v1.billing.meters.create_async(
        {"display_name": "Calls", "event_name": "calls", "default_aggregation": {"formula": "sum"}}
    )
    assert await refresh_meters(resources, datetime.now(UTC)) == 1
    slow = {"kind": "slow", "method": "GET", "path": "/v1/billing/meters", "seconds": "0.3", "times": 1}
    (await fake_stripe.control.post("/_fake/faults", json=slow)).raise_for_status()

    listing = asyncio.create_task(refresh_meters(resources, datetime.now(UTC)))
    await wait_until(lambda: struck(fake_stripe))
    await deliver(client, event("billing.meter.deactivated", meter(made.id, status="inactive"), at=10**8))
    await listing

    assert await meters(resources) == {"calls": "inactive"}


async def struck(fake_stripe: FakeStripe) -> bool:
    faults = (await fake_stripe.control.get("/_fake/faults")).json()["faults"]
    return bool(faults[0]["struck"])


# Thin events


@pytest.mark.parametrize(
    ("type_", "verdict", "reports"),
    [
        *((type_, "applied", [{"event": "evt_thin", "meter": "cus_1"}]) for type_ in THIN_TYPES),
        ("v1.customer.updated", "ignored", []),
    ],
)
async def test_a_thin_event_is_recorded_and_changes_nothing_in_the_mirror(
    client: httpx.AsyncClient, resources: Resources, type_: str, verdict: str, reports: list[dict[str, str]]
) -> None:
    thin = {
        "id": "evt_thin",
        "object": "v2.core.event",
        "type": type_,
        "created": "2026-01-01T00:00:00.123Z",
        "livemode": False,
        "related_object": {"id": "cus_1", "type": "customer", "url": "/v1/customers/cus_1"},
    }
    snapshot = event("customer.updated", customer(metadata={"tallystick_ref": "acme"}))

    assert await deliver(client, thin, snapshot, thin, snapshot) == [verdict, "applied", "duplicate", "duplicate"]

    assert await read(resources, "SELECT verdict, object_id FROM stripe_events WHERE id = 'evt_thin'") == [
        {"verdict": verdict, "object_id": "cus_1"}
    ]
    assert await read(resources, "SELECT event, meter FROM meter_error_reports") == reports
    assert await read(resources, "SELECT ref, mark_event FROM customers") == [
        {"ref": "acme", "mark_event": snapshot["id"]}
    ]


# Subscriptions


@pytest.mark.parametrize(
    ("type_", "changed", "access"),
    [
        ("paused", {"status": "paused"}, "restricted"),
        ("resumed", {"status": "active"}, "active"),
        ("trial_will_end", {"status": "trialing", "trial_end": NOON + 3 * 86_400}, "active"),
        ("pending_update_applied", {"pending_update": None}, "active"),
        ("pending_update_expired", {"pending_update": None}, "active"),
        ("updated", {"pending_update": {"expires_at": NOON + 82_800}}, "active"),
    ],
)
async def test_every_turn_of_a_subscription_is_followed(
    client: httpx.AsyncClient, resources: Resources, type_: str, changed: dict[str, Any], access: str
) -> None:
    before = subscription(status="active", pending_update={"expires_at": NOON + 1})
    await deliver(client, event("customer.subscription.created", before))

    await deliver(client, event(f"customer.subscription.{type_}", subscription(**changed), at=1))

    assert (await read_access(client))[0] == access
    [row] = await read(resources, "SELECT pending_update_expires_at, trial_end FROM subscriptions")
    expires_at = (changed.get("pending_update") or {}).get("expires_at")
    assert row["pending_update_expires_at"] == (expires_at and datetime.fromtimestamp(expires_at, UTC))


async def test_an_upcoming_invoice_is_none_whatever_id_it_has(client: httpx.AsyncClient, resources: Resources) -> None:
    sent = event("invoice.upcoming", invoice("upcoming_in_1", status="draft"))

    assert await deliver(client, sent) == ["ignored"]
    assert await read(resources, "SELECT * FROM invoices") == []
