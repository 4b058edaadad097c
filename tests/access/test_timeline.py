"""The timeline: what changed, by which event; and nothing for what changed nothing."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tallystick import db
from tallystick.access.timeline import Line, forget_timeline, write_timeline
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.webhooks import inbox
from tallystick.webhooks.inbox import record_events
from tallystick.webhooks.refresh import refresh_mirror
from tests.conftest import FakeStripe, open_client
from tests.webhooks.stripe_events import (
    NOON,
    customer,
    deliver,
    entitlement_summary,
    event,
    invoice,
    post,
    read,
    subscription,
    verified,
)


async def read_lines(client: httpx.AsyncClient, ref: str = "cus_1", **query: int) -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/customers/{ref}/timeline", params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["lines"])


def brief(lines: list[dict[str, Any]]) -> list[tuple[str, str | None, str | None, str | None]]:
    return [(line["what"], line["object_id"], line["old"], line["new"]) for line in lines]


async def test_a_customers_story_the_newest_first(client: httpx.AsyncClient) -> None:
    events = [
        event("customer.created", customer(metadata={"tallystick_ref": "acme"})),
        event("customer.subscription.created", subscription(status="trialing"), at=1),
        event("customer.subscription.updated", subscription(), at=2),
        event("invoice.created", invoice(status="draft"), at=3),
        event("invoice.finalized", invoice(), at=4),
        event("invoice.payment_failed", invoice(), at=5),
        event("customer.subscription.updated", subscription(status="past_due"), at=6),
        event("invoice.payment_failed", invoice(), at=7),
        event("invoice.paid", invoice(status="paid"), at=8),
    ]
    await deliver(client, *events)

    lines = await read_lines(client, "acme")

    assert brief(lines) == [
        ("access", None, "restricted", "restricted"),
        ("invoice", "in_1", "open", "paid"),
        ("payment_failed", "in_1", None, None),
        ("subscription", "sub_1", "active", "past_due"),
        ("access", None, "active", "restricted"),
        ("payment_failed", "in_1", None, None),
        ("invoice", "in_1", "draft", "open"),
        ("invoice", "in_1", None, "draft"),
        ("access", None, "active", "active"),
        ("subscription", "sub_1", "trialing", "active"),
        ("access", None, "none", "active"),
        ("subscription", "sub_1", None, "trialing"),
        ("access", None, None, "none"),
    ]
    assert [line["reason"] for line in lines if line["what"] == "access"] == [
        "past_due",
        "payment_failed",
        "subscription_active",
        "trial",
        "no_subscription",
    ]
    assert [line["event"]["id"] for line in lines] == [
        events[number]["id"] for number in (8, 8, 7, 6, 5, 5, 4, 3, 2, 2, 1, 1, 0)
    ]
    assert {line["cause"] for line in lines} == {"event"}
    failed = lines[5]["event"]
    assert failed["type"] == "invoice.payment_failed"
    assert datetime.fromisoformat(failed["created"]) == datetime.fromtimestamp(NOON + 5, UTC)


async def test_repeats_and_late_events_leave_no_line(client: httpx.AsyncClient) -> None:
    newest = event("customer.subscription.updated", subscription(status="past_due"), at=2)
    await deliver(client, newest)
    before = await read_lines(client)

    late = event("customer.subscription.updated", subscription(status="trialing"), at=1)
    other_id = event("customer.subscription.updated", subscription(status="past_due"), at=3)
    assert await deliver(client, newest, late, other_id) == ["duplicate", "stale", "applied"]

    assert await read_lines(client) == before


async def test_a_late_failure_is_told_though_the_rest_of_its_event_is_stale(client: httpx.AsyncClient) -> None:
    await deliver(
        client,
        event("customer.subscription.created", subscription()),
        event("invoice.updated", invoice(), at=9),
        event("invoice.payment_failed", invoice(), at=5),
    )

    assert brief(await read_lines(client))[:2] == [
        ("access", None, "active", "restricted"),
        ("payment_failed", "in_1", None, None),
    ]


async def test_a_failure_between_two_that_are_known_is_no_news(client: httpx.AsyncClient) -> None:
    tries = [event("invoice.payment_failed", invoice(), at=number) for number in (0, 2, 1)]
    assert await deliver(client, *tries) == ["applied", "applied", "stale"]

    told = [line["event"]["id"] for line in await read_lines(client) if line["what"] == "payment_failed"]
    assert told == [tries[1]["id"], tries[0]["id"]]


async def test_a_deleted_draft_is_told(client: httpx.AsyncClient) -> None:
    draft = invoice(status="draft")
    await deliver(client, event("invoice.created", draft), event("invoice.deleted", draft, at=1))

    assert ("invoice", "in_1", "draft", "deleted") in brief(await read_lines(client))


@pytest.mark.parametrize(
    "other",
    [
        event("invoice.updated", invoice(), at=10),
        event("invoice.payment_failed", invoice(), at=10),
        event("customer.updated", customer(), at=30),
        event("entitlements.active_entitlement_summary.updated", entitlement_summary([]), at=20),
    ],
    ids=lambda other: other["type"],
)
async def test_of_events_committed_together_the_last_that_access_follows_from_is_named(
    client: httpx.AsyncClient, resources: Resources, other: dict[str, Any]
) -> None:
    await deliver(client, event("customer.subscription.created", subscription()))
    ended = event("customer.subscription.deleted", subscription(status="canceled"), at=20)
    together = [verified(resources, sent) for sent in (ended, other)]
    async with db.direct_transaction(resources.engine) as connection:
        await record_events(connection, together, "tallystick_ref", AccessRules(), datetime.now(UTC))

    told = next(line for line in await read_lines(client) if line["what"] == "access")
    assert (told["new"], told["event"]["id"]) == ("none", ended["id"])
    assert await read(resources, "SELECT decided_by FROM customer_access") == [{"decided_by": ended["id"]}]


async def test_what_could_not_be_committed_is_not_told(
    client: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(inbox, "recompute_access", fail)
        sent = event("customer.subscription.created", subscription())
        assert (await post(client, sent)).status_code == 500
    assert await read(resources, "SELECT * FROM customer_timeline") == []

    await deliver(client, sent)
    assert len(await read_lines(client)) == 2


async def test_pages_follow_one_another_without_gap_or_repeat(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(client, event("customer.created", customer()))
    async with db.transaction(resources.engine) as connection:
        lines = [Line("cus_1", "invoice", "event", object_id=f"in_{number}") for number in range(8)]
        await write_timeline(connection, [*lines, Line("cus_2", "invoice", "event")], datetime.now(UTC))
    everything = await read_lines(client, limit=100)
    assert [line["object_id"] for line in everything] == [*(f"in_{number}" for number in range(7, -1, -1)), None]

    found: list[dict[str, Any]] = []
    page = (await client.get("/v1/customers/cus_1/timeline", params={"limit": 4})).json()
    while page["next_before"] is not None:
        assert len(page["lines"]) == 4
        found += page["lines"]
        page = (
            await client.get("/v1/customers/cus_1/timeline", params={"limit": 4, "before": page["next_before"]})
        ).json()

    assert found + page["lines"] == everything


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"before": 0}, {"before": 2**63}, {"before": "x"}])
async def test_a_page_that_cannot_be_asked_for(client: httpx.AsyncClient, query: dict[str, Any]) -> None:
    await deliver(client, event("customer.created", customer()))
    assert (await client.get("/v1/customers/cus_1/timeline", params=query)).status_code == 422


async def test_nobodys_timeline_is_a_problem(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/customers/nobody/timeline")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:tallystick:problem:unknown-customer")


async def test_what_was_fetched_from_stripe_is_told_as_such(
    app: FastAPI, api_key: str, resources: Resources, fake_stripe: FakeStripe
) -> None:
    stripe = fake_stripe.client.v1
    made = await stripe.customers.create_async({})
    product = await stripe.products.create_async({"name": "Seats"})
    price = await stripe.prices.create_async(
        {"currency": "usd", "unit_amount": 100, "product": product.id, "recurring": {"interval": "month"}}
    )
    # A trial needs no payment method.
    sub = await stripe.subscriptions.create_async(
        {"customer": made.id, "items": [{"price": price.id}], "trial_period_days": 7}
    )
    async with open_client(app, api_key) as client:
        told = subscription(sub.id, "past_due", customer=made.id)
        await deliver(client, event("customer.subscription.updated", told))
        async with db.transaction(resources.engine) as connection:
            await connection.exec_driver_sql("UPDATE subscriptions SET needs_refresh = true")
        await refresh_mirror(resources, datetime.now(UTC))

        lines = await read_lines(client, made.id)

    assert brief(lines)[:2] == [
        ("access", None, "restricted", "active"),
        ("subscription", sub.id, "past_due", "trialing"),
    ]
    assert [(line["cause"], line["event"]) for line in lines[:2]] == [("refresh", None)] * 2


async def test_old_lines_are_forgotten_in_batches(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "ROWS_PER_DELETE", 4)
    now = datetime.now(UTC)
    kept = timedelta(days=resources.settings.timeline_retention_days)
    async with db.transaction(resources.engine) as connection:
        for age, lines in ((kept + timedelta(seconds=1), 10), (kept - timedelta(seconds=1), 2)):
            await write_timeline(connection, [Line("cus_1", "access", "rules", new="none")] * lines, now - age)

    assert await forget_timeline(resources, now) == 10
    assert len(await read(resources, "SELECT * FROM customer_timeline")) == 2
    assert await forget_timeline(resources, now) == 0
