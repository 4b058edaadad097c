"""What is told: every real change once, in the transaction that made it, whatever the order of events."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.access import names
from tallystick.access.names import announce_names
from tallystick.mirror.apply import entomb
from tallystick.mirror.changes import CustomerChange
from tallystick.notifications.outbox import Notification, announce_changes, queue_notifications
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.usage.delivery import deliver as deliver_usage
from tallystick.usage.ledger import record_events
from tallystick.usage.sealing import seal_everything
from tallystick.webhooks.inbox import record_events as record_webhooks
from tests.conftest import FakeStripe
from tests.usage.making import CUSTOMER, METER, REF, last_hour, make_customer, make_event, make_meter
from tests.webhooks.stripe_events import (
    NOON,
    checkout_session,
    customer,
    deliver,
    event,
    invoice,
    item,
    read,
    subscription,
    verified,
)


async def told(resources: Resources) -> list[tuple[str, dict[str, Any]]]:
    """Type and data of all notifications, in order."""
    rows = await read(resources, "SELECT type, data FROM notifications ORDER BY number")
    return [(row["type"], row["data"]) for row in rows]


async def types(resources: Resources) -> list[str]:
    return [type_ for type_, _ in await told(resources)]


def of_sub(at: int, status: str, **changed: Any) -> dict[str, Any]:
    return event("customer.subscription.updated", subscription(status=status, **changed), at=at)


async def test_a_change_is_told_with_its_cause_before_its_effect(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    known = event("customer.created", customer(metadata={"tallystick_ref": "acme"}))
    bought = event("customer.subscription.created", subscription(), at=1)
    await deliver(client, known, bought)
    first, cause, effect = await told(resources)
    assert first[0] == "access.changed"
    assert (first[1]["access"], first[1]["reason"], first[1]["previous_access"]) == ("none", "no_subscription", None)
    assert cause == (
        "subscription.changed",
        {
            "customer": "cus_1",
            "account": None,
            "refs": ["acme"],
            "subscription": "sub_1",
            "status": "active",
            "previous_status": None,
        },
    )
    answer = (await client.get("/v1/customers/acme/access")).json()
    since = datetime.fromisoformat(effect[1].pop("since"))
    assert since == datetime.fromisoformat(answer["since"])
    assert effect == (
        "access.changed",
        {
            "customer": "cus_1",
            "account": None,
            "refs": ["acme"],
            "access": "active",
            "reason": "subscription_active",
            "until": None,
            "decided_by": bought["id"],
            "prices": ["price_1"],
            "previous_access": "none",
            "previous_reason": "no_subscription",
        },
    )


async def test_repeats_stale_events_and_events_without_news_tell_nothing(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    newest = of_sub(10, "active")
    await deliver(client, newest)
    before = await told(resources)
    late = of_sub(5, "past_due")
    nothing_new = of_sub(20, "active", collection_method="send_invoice")
    assert await deliver(client, newest, late, nothing_new) == ["duplicate", "stale", "applied"]
    assert await told(resources) == before


async def test_a_failed_payment_is_told_each_time_it_fails(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(client, of_sub(0, "active", latest_invoice="in_1"))
    before = len(await told(resources))
    for at in (10, 20):
        await deliver(client, event("invoice.payment_failed", invoice(next_payment_attempt=NOON + 99), at=at))
        await deliver(client, event("invoice.updated", invoice(), at=at + 1))
    news = (await told(resources))[before:]
    assert [type_ for type_, _ in news] == ["invoice.payment_failed", "access.changed", "invoice.payment_failed"]
    assert news[1][1]["access"] == "restricted"
    failures = [data for type_, data in news if type_ == "invoice.payment_failed"]
    assert [datetime.fromisoformat(data["payment_failed_at"]).timestamp() for data in failures] == [
        NOON + 10,
        NOON + 20,
    ]
    assert failures[0].items() >= {"invoice": "in_1", "subscription": "sub_1", "status": "open"}.items()
    assert failures[0].keys() == {
        *(
            "customer",
            "account",
            "refs",
            "invoice",
            "subscription",
            "status",
            "payment_failed_at",
            "next_payment_attempt",
        )
    }


async def test_a_failure_that_comes_after_its_payment_is_no_news(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    paid = event("invoice.paid", invoice(status="paid"), at=20)
    failed = event("invoice.payment_failed", invoice(), at=10)
    await deliver(client, of_sub(0, "active", latest_invoice="in_1"), paid, failed)
    assert "invoice.payment_failed" not in await types(resources)


async def test_another_price_is_told_though_no_status_changed(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(client, of_sub(0, "active"))
    before = len(await told(resources))
    await deliver(client, of_sub(5, "active", items=[item("si_1", "price_2")]))
    [(type_, data)] = (await told(resources))[before:]
    assert (type_, data["access"], data["prices"]) == ("access.changed", "active", ["price_2"])
    await deliver(client, of_sub(6, "active", items=[item("si_1", "price_2")]))
    assert len(await told(resources)) == before + 1


async def test_a_name_that_is_learnt_late_is_told(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(client, of_sub(0, "active"))
    assert (await told(resources))[-1][1]["refs"] == []
    await deliver(client, event("customer.created", customer(metadata={"tallystick_ref": "acme"}), at=-5))
    type_, data = (await told(resources))[-1]
    assert (type_, data["access"], data["refs"]) == ("access.changed", "active", ["acme"])
    await client.put("/v1/customers/acme-2", json={"customer": "cus_1"})
    assert (await told(resources))[-1][1]["refs"] == ["acme", "acme-2"]


async def test_a_name_belongs_to_the_newest_customer_that_has_it_and_stays_with_a_deleted_one(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    named = {"metadata": {"tallystick_ref": "acme"}}
    await deliver(
        client,
        event("customer.created", customer("cus_1", **named)),
        event("customer.created", customer("cus_2", **named), at=5),
        event("customer.subscription.created", subscription(), at=6),
    )
    last = {data["customer"]: data["refs"] for _, data in await told(resources)}
    assert last == {"cus_1": [], "cus_2": ["acme"]}
    await deliver(client, event("customer.deleted", customer("cus_2", **named), at=9))
    _, data = (await told(resources))[-1]
    assert (data["customer"], data["access"], data["reason"]) == ("cus_2", "none", "customer_deleted")
    assert data["refs"] == [], "cus_1 has it now"
    await deliver(client, event("customer.deleted", customer("cus_1", **named), at=10))
    by_customer = {data["customer"]: data for _, data in await told(resources)}
    assert by_customer["cus_1"]["reason"] == "customer_deleted"


async def test_names_and_references_are_two_sides_of_one_thing(client: httpx.AsyncClient, resources: Resources) -> None:
    for number, ref in enumerate(("acme", "acme", "bolt", "cus_9", "linked")):
        await deliver(
            client, event("customer.created", customer(f"cus_{number}", metadata={"tallystick_ref": ref}), at=number)
        )
    for ref, id_ in (("linked", "cus_0"), ("bolt", "cus_1"), ("other", "cus_unheard_of")):
        await client.put(f"/v1/customers/{ref}", json={"customer": id_})
    references = await read(resources, "SELECT ref, customer FROM customer_references WHERE ref <> customer")
    names = await read(resources, "SELECT unnest(refs) AS ref, customer FROM customer_names")
    assert sorted(tuple(row.values()) for row in names) == sorted(tuple(row.values()) for row in references)


async def test_a_lone_deleted_customer_keeps_its_name(client: httpx.AsyncClient, resources: Resources) -> None:
    named = customer(metadata={"tallystick_ref": "acme"})
    await deliver(client, event("customer.created", named), event("customer.deleted", named, at=5))
    _, data = (await told(resources))[-1]
    assert (data["reason"], data["refs"]) == ("customer_deleted", ["acme"])


async def names_told(resources: Resources) -> dict[str, list[str]]:
    """The names that each customer's last notification has."""
    await announce_names(resources, datetime.now(UTC))
    return {data["customer"]: data["refs"] for _, data in await told(resources)}


async def names_held(resources: Resources) -> dict[str, list[str]]:
    return {row["customer"]: row["refs"] for row in await read(resources, "SELECT customer, refs FROM customer_names")}


NAMED = {"metadata": {"tallystick_ref": "acme"}}


async def test_a_customer_is_told_that_another_took_its_name_and_gave_it_back(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await deliver(client, event("customer.created", customer("cus_1", **NAMED)))
    assert await names_told(resources) == {"cus_1": ["acme"]}
    await deliver(client, event("customer.created", customer("cus_2", **NAMED), at=5))
    assert await names_told(resources) == {"cus_1": [], "cus_2": ["acme"]}
    type_, data = (await told(resources))[-1]
    assert (type_, data["customer"], data["access"]) == ("access.changed", "cus_1", "none")
    await deliver(client, event("customer.updated", customer("cus_1", **NAMED), at=7))
    assert await names_told(resources) == {"cus_1": ["acme"], "cus_2": []}, "it is the newest now"
    await deliver(client, event("customer.deleted", customer("cus_1", **NAMED), at=9))
    assert await names_told(resources) == {"cus_1": [], "cus_2": ["acme"]}
    await client.put("/v1/customers/acme", json={"customer": "cus_3"})
    assert await names_told(resources) == {"cus_1": [], "cus_2": [], "cus_3": ["acme"]}
    await client.delete("/v1/customers/acme")
    assert await names_told(resources) == {"cus_1": [], "cus_2": ["acme"], "cus_3": []}
    await deliver(client, event("customer.deleted", customer("cus_2", **NAMED), at=12))
    assert await names_told(resources) == await names_held(resources)
    assert await read(resources, "SELECT * FROM changed_refs") == []


async def test_a_checkout_moves_a_name_and_a_deletion_gives_it_back(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    for number in (1, 2):
        checkout = checkout_session(f"cs_{number}", customer=f"cus_{number}")
        await deliver(client, event("checkout.session.completed", checkout, at=number))
    assert await names_told(resources) == {"cus_1": [], "cus_2": ["acme"]}
    await deliver(client, event("customer.deleted", customer("cus_2"), at=5))
    assert await names_told(resources) == {"cus_1": ["acme"], "cus_2": []} == await names_held(resources)


@pytest.mark.parametrize("checkout_first", [True, False])
async def test_a_deleted_customer_loses_its_name_to_whoever_has_it_by_a_checkout(
    client: httpx.AsyncClient, resources: Resources, checkout_first: bool
) -> None:
    await deliver(client, event("customer.created", customer("cus_1", **NAMED)))
    later = [
        event("checkout.session.completed", checkout_session(customer="cus_2"), at=1),
        event("customer.deleted", customer("cus_1", **NAMED), at=5),
    ]
    for one in later if checkout_first else reversed(later):
        await deliver(client, one)
        await announce_names(resources, datetime.now(UTC))
    assert await names_told(resources) == {"cus_1": [], "cus_2": ["acme"]} == await names_held(resources)


async def test_two_batches_that_do_not_see_each_other_take_one_name(resources: Resources) -> None:
    now = datetime.now(UTC)
    async with db.direct_transaction(resources.engine) as one, db.direct_transaction(resources.engine) as other:
        for connection, id_ in ((one, "cus_1"), (other, "cus_2")):
            sent = verified(resources, event("customer.created", customer(id_, **NAMED), at=int(id_[-1])))
            await record_webhooks(connection, [sent], "tallystick_ref", AccessRules(), now)
    assert await names_told(resources) == {"cus_1": [], "cus_2": ["acme"]}


async def test_a_customer_that_is_gone_at_stripe_gives_its_names_back(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await deliver(client, *(event("customer.created", customer(f"cus_{n}", **NAMED), at=n) for n in (1, 2)))
    await names_told(resources)
    async with db.transaction(resources.engine) as connection:
        version = await connection.scalar(text("SELECT CAST(xmin AS text) FROM customers WHERE id = 'cus_2'"))
        assert await entomb(connection, CustomerChange, "cus_2", str(version))
    await names_told(resources)
    [row] = await read(resources, "SELECT announced_refs FROM customer_access WHERE customer = 'cus_1'")
    assert row["announced_refs"] == ["acme"]


async def test_events_that_move_no_name_note_none(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(client, event("customer.created", customer("cus_1", **NAMED)), of_sub(1, "active"))
    await announce_names(resources, datetime.now(UTC))
    await deliver(client, event("customer.updated", customer("cus_1", **NAMED), at=5), of_sub(6, "past_due"))
    assert await read(resources, "SELECT ref FROM changed_refs") == []


async def test_more_customers_of_one_name_than_are_told_at_once(
    client: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "CUSTOMERS_PER_TRANSACTION", 2)
    monkeypatch.setattr(names, "REFS_PER_BATCH", 3)
    of_one_name = [customer(f"cus_{number}", **NAMED) for number in range(5)]
    await deliver(client, *(event("customer.created", one, at=at) for at, one in enumerate(of_one_name)))
    await deliver(client, *(event("customer.deleted", one, at=9) for one in of_one_name))
    told_now = await names_told(resources)
    assert told_now == {f"cus_{number}": ["acme"] for number in range(5)} == await names_held(resources)


class Crash(Exception):
    pass


async def test_what_was_not_committed_is_not_told_and_remains_to_be_told(resources: Resources) -> None:
    await make_customer(resources)
    with suppress(Crash):
        async with db.transaction(resources.engine) as connection:
            await announce_changes(connection, [CUSTOMER])
            await queue_notifications(connection, [Notification("usage.parked", CUSTOMER, {"reason": "a test"})])
            assert await connection.scalar(text("SELECT count(*) FROM notifications")) == 2
            raise Crash
    assert await told(resources) == []
    for _ in range(2):
        async with db.transaction(resources.engine) as connection:
            await announce_changes(connection, [CUSTOMER])
    assert await types(resources) == ["subscription.changed"]


def histories() -> Iterator[list[dict[str, Any]]]:
    """One customer for each order of the same five events."""
    for number, order in enumerate(permutations(range(5))):
        cus, sub, inv = f"cus_{number}", f"sub_{number}", f"in_{number}"
        of_invoice = {"customer": cus, "id_": inv, "of": sub}
        events = [
            event("customer.created", customer(cus, metadata={"tallystick_ref": f"ref-{number}"})),
            event("customer.subscription.created", subscription(sub, "incomplete", customer=cus, items=[]), at=1),
            event(
                "customer.subscription.updated",
                subscription(sub, "active", customer=cus, items=[], latest_invoice=inv),
                at=2,
            ),
            event("invoice.payment_failed", invoice(**of_invoice), at=3),
            event("invoice.paid", invoice(**of_invoice, status="paid"), at=4),
        ]
        yield [events[position] for position in order]


async def test_in_any_order_the_last_told_is_what_holds(client: httpx.AsyncClient, resources: Resources) -> None:
    await asyncio.gather(*(deliver(client, *events) for events in histories()))
    last = {
        (type_, data["customer"]): data for type_, data in await told(resources) if type_ != "invoice.payment_failed"
    }
    assert len(last) == 2 * 120
    for (type_, cus), data in last.items():
        ref = cus.replace("cus_", "ref-")
        if type_ == "subscription.changed":
            assert data["status"] == "active"
        else:
            assert (data["access"], data["reason"], data["refs"]) == ("active", "subscription_active", [ref]), cus


async def test_usage_that_stripe_refuses_is_told(resources: Resources, fake_stripe: FakeStripe) -> None:
    now = datetime.now(UTC)
    await make_customer(resources)
    await make_meter(resources)  # Stripe does not know this customer, nor this meter
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, [make_event(at=last_hour())], accepted_already=True)
    await seal_everything(resources, now)
    await deliver_usage(resources, now)
    [parked] = await read(resources, "SELECT * FROM usage_deliveries WHERE state = 'parked'")
    [(type_, data)] = await told(resources)
    assert type_ == "usage.parked"
    assert data == {
        "customer": CUSTOMER,
        "account": None,
        "refs": [REF],
        "identifier": parked["identifier"],
        "meter": METER,
        "timestamp": datetime.fromtimestamp(parked["timestamp"], UTC).isoformat(),
        "reason": parked["reason"],
    }


async def test_usage_that_is_too_old_when_it_is_sealed_is_told(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, [make_event(at=last_hour())], accepted_already=True)
    await seal_everything(resources, datetime.now(UTC) + timedelta(days=36))
    [(type_, data)] = await told(resources)
    assert (type_, data["reason"]) == ("usage.parked", "older_than_35_days")
