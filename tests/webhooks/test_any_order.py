"""Invariant I4: any order, repetition and delay of the same events ends in the same mirror and the same access."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.access.names import announce_names
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.webhooks.inbox import record_events
from tallystick.webhooks.verification import StripeEvent
from tests.conftest import empty_stores
from tests.webhooks.stripe_events import (
    NOON,
    checkout_session,
    customer,
    entitlement_summary,
    event,
    invoice,
    item,
    meter,
    payment_method,
    price,
    subscription,
    verified,
)

REFERENCE_KEY = "tallystick_ref"

# Few objects and few seconds, so that collisions of every kind are common.
SECONDS = st.integers(0, 3)
CUSTOMERS = st.sampled_from(("cus_1", "cus_1", "cus_1", "cus_2"))
NUMBERS = st.sampled_from((1, 1, 1, 2))
ITEMS = st.lists(
    st.builds(
        item,
        st.sampled_from(("si_1", "si_2", "si_3")),
        st.sampled_from(("price_1", "price_2")),
        st.integers(0, 3),
        st.integers(4, 6),
    ),
    max_size=3,
    unique_by=lambda one: one["id"],
)


def events_about(type_: str, payloads: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda payload, at: event(type_, payload, at=at), payloads, SECONDS)


def subscriptions(*statuses: str) -> st.SearchStrategy[dict[str, Any]]:
    # Each customer has two subscriptions, whose items are their own.
    return st.builds(
        lambda of, number, status, items, latest: subscription(
            f"sub_{of}_{number}",
            status,
            customer=of,
            items=[one | {"id": f"{one['id']}_{of}_{number}"} for one in items],
            latest_invoice=f"in_{of}_{latest}" if latest else None,
        ),
        CUSTOMERS,
        NUMBERS,
        st.sampled_from(statuses),
        ITEMS,
        st.integers(0, 2),
    )


def invoices(*statuses: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda of, number, status, sub, created: invoice(
            f"in_{of}_{number}", status, customer=of, of=f"sub_{of}_{sub}", created=NOON + created
        ),
        CUSTOMERS,
        NUMBERS,
        st.sampled_from(statuses),
        NUMBERS,
        SECONDS,
    )


customers = st.builds(lambda of, ref: customer(of, metadata={REFERENCE_KEY: ref}), CUSTOMERS, st.sampled_from("ab"))
prices = st.builds(lambda of, active: price(of, active=active), st.sampled_from(("price_1", "price_2")), st.booleans())

payment_methods = st.builds(
    lambda number, of: payment_method(f"pm_{number}", customer=of), NUMBERS, st.none() | CUSTOMERS
)
checkouts = st.builds(
    lambda number, of, ref: checkout_session(f"cs_{of}_{number}", customer=of, client_reference_id=ref),
    NUMBERS,
    CUSTOMERS,
    st.sampled_from("ab"),
)
# An entitlement belongs to one customer.
summaries = st.builds(
    lambda of, keys: entitlement_summary([f"{key}_{of}" for key in keys], customer=of),
    CUSTOMERS,
    st.lists(st.sampled_from("xyz"), unique=True),
)
meters = st.builds(lambda status: meter(status=status), st.sampled_from(("active", "inactive")))
# Products alone have ids that people choose, and that may so be alike in several accounts.
products = st.builds(
    lambda number, active: {"id": f"prod_{number}", "object": "product", "active": active}, NUMBERS, st.booleans()
)
of_any_account = st.builds(
    lambda sent, account: sent | {"account": account},
    st.one_of(
        events_about("product.created", products),
        events_about("product.updated", products),
        events_about("product.deleted", products),
    ),
    st.sampled_from((None, "acct_1", "acct_2")),
)

histories = st.lists(
    st.one_of(
        of_any_account,
        events_about("payment_method.attached", payment_methods.filter(lambda one: one["customer"])),
        events_about("payment_method.updated", payment_methods.filter(lambda one: one["customer"])),
        events_about("payment_method.detached", payment_methods.map(lambda one: one | {"customer": None})),
        events_about("checkout.session.completed", checkouts),
        events_about("entitlements.active_entitlement_summary.updated", summaries),
        events_about("billing.meter.created", meters),
        events_about("billing.meter.deactivated", meters),
        events_about("customer.created", customers),
        events_about("customer.updated", customers),
        events_about("customer.deleted", customers),
        events_about("price.updated", prices),
        events_about("customer.subscription.created", subscriptions("incomplete", "trialing", "active")),
        events_about("customer.subscription.updated", subscriptions("active", "past_due", "unpaid", "paused")),
        events_about("customer.subscription.deleted", subscriptions("canceled")),
        events_about("invoice.created", invoices("draft")),
        events_about("invoice.updated", invoices("open", "uncollectible")),
        events_about("invoice.payment_failed", invoices("open")),
        events_about("invoice.paid", invoices("paid")),
    ),
    min_size=3,
    max_size=12,
)


async def record(resources: Resources, batch: Sequence[StripeEvent]) -> None:
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, batch, REFERENCE_KEY, AccessRules(), datetime.now(UTC))


TIMES = ("updated_at", "refresh_after", "refreshed_at")


async def read_state(resources: Resources) -> dict[str, list[dict[str, Any]]]:
    """Every row of the mirror, each customer's access and the names it was told, less when they were written."""
    queries = {
        "customers": "SELECT * FROM customers",
        "prices": "SELECT * FROM prices",
        "subscriptions": "SELECT * FROM subscriptions",
        "subscription_items": "SELECT * FROM subscription_items WHERE NOT deleted",
        "invoices": "SELECT * FROM invoices",
        "products": "SELECT * FROM products",
        "payment_methods": "SELECT * FROM payment_methods",
        "checkout_sessions": "SELECT * FROM checkout_sessions",
        "entitlement_summaries": "SELECT * FROM entitlement_summaries",
        "active_entitlements": "SELECT id, customer, feature, lookup_key FROM active_entitlements WHERE NOT deleted",
        "meters": "SELECT * FROM meters",
        "customer_references": "SELECT ref, customer FROM customer_references",
        "customer_names": "SELECT customer, refs FROM customer_names",
        "period_boundaries": "SELECT * FROM period_boundaries",
        "customer_access": "SELECT customer, access, reason, prices FROM customer_access",
        "names told": "SELECT customer, announced_refs AS refs FROM customer_access",
    }
    state = {}
    await announce_names(resources, datetime.now(UTC))
    async with db.transaction(resources.engine) as connection:
        for table, query in queries.items():
            rows = (await connection.execute(text(f"{query} ORDER BY 1, 2"))).mappings()
            state[table] = [
                # What was told of a row depends on when it was told.
                {key: row[key] for key in row if key not in TIMES and not key.startswith("announced_")}
                for row in rows
            ]
    return state


@given(histories, st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_order_ends_in_the_same_state(
    resources: Resources, history: list[dict[str, Any]], data: st.DataObject
) -> None:
    events = [verified(resources, sent) for sent in history]
    await empty_stores(resources)
    for one in events:
        await record(resources, [one])
    expected = await read_state(resources)
    assert expected["names told"] == expected["customer_names"]

    # Every event at least once, in any order, cut into batches anywhere, two batches at a time.
    repeated = events + data.draw(st.lists(st.sampled_from(events), max_size=4))
    shuffled = data.draw(st.permutations(repeated))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(shuffled)), max_size=4)))
    batches = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(shuffled)], strict=True)]
    await empty_stores(resources)
    for pair in zip(batches[::2], [*batches[1::2], []], strict=False):
        await asyncio.gather(*(record(resources, batch) for batch in pair if batch))

    assert await read_state(resources) == expected


async def test_two_transactions_about_one_customer_decide_one_after_the_other(resources: Resources) -> None:
    # Each alone says "active"; both together say "restricted". Neither may decide without having seen the other.
    created = verified(resources, event("customer.subscription.created", subscription()))
    unpaid = invoice(period_start=NOON + 1, period_end=NOON + 2)  # no row in common with the subscription
    failed = verified(resources, event("invoice.payment_failed", unpaid, at=1))
    await record(resources, [verified(resources, event("customer.created", customer()))])

    async with resources.engine.connect() as first:
        await record_events(first, [created], REFERENCE_KEY, AccessRules(), datetime.now(UTC))
        second = asyncio.create_task(record(resources, [failed]))
        await wait_until_blocked_or_done(resources, second)
        await first.commit()
        await second

    [access] = (await read_state(resources))["customer_access"]
    assert (access["access"], access["reason"]) == ("restricted", "payment_failed")


async def test_an_object_of_the_same_id_in_another_account_is_no_rival_in_the_same_second(resources: Resources) -> None:
    body = {"id": "prod_1", "object": "product", "active": True}
    theirs = event("product.created", body, at=1) | {"account": "acct_1"}
    events = [verified(resources, sent) for sent in (theirs, event("product.created", body, at=1))]
    for one in events:
        await record(resources, [one])
    [product] = (await read_state(resources))["products"]
    assert (product["account"], product["needs_refresh"]) == ("", False)


@pytest.mark.parametrize(("table", "kind"), [("prices", "price"), ("customers", "customer")])
async def test_batches_that_touch_the_same_objects_in_opposite_orders_do_not_deadlock(
    resources: Resources, table: str, kind: str
) -> None:
    make = {"price": price, "customer": customer}[kind]
    batches = [
        [verified(resources, event(f"{kind}.updated", make(f"id_{n}"), at=at)) for at, n in enumerate(numbers)]
        for numbers in (range(9), range(8, -1, -1))
    ]
    # Both wait at the row in the middle. Had they taken the others in their own orders, each would now hold what the
    # other needs.
    async with resources.engine.connect() as middle:
        await middle.execute(text(f"INSERT INTO {table} (id) VALUES ('id_4')"))  # noqa: S608
        recording = [asyncio.create_task(record(resources, batch)) for batch in batches]
        await wait_until_blocked_or_done(resources, *recording)
        await middle.commit()

    await asyncio.gather(*recording)


async def wait_until_blocked_or_done(resources: Resources, *tasks: asyncio.Task[Any]) -> None:
    """Return when each task is done or waits for a lock."""
    async with resources.engine.connect() as watching:
        while await _count_blocked(watching) < sum(not task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=0.01)


async def _count_blocked(connection: AsyncConnection) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    blocked: int = (await connection.execute(text(query))).scalar_one()
    await connection.rollback()  # the view is frozen within a transaction
    return blocked
