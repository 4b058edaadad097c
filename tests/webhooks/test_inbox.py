"""Steps 2 to 4: what an event changes, and what becomes of it."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import generate_latest
from sqlalchemy import text
from structlog.testing import capture_logs

from tallystick import db
from tallystick.errors import Problem, StorageFailed
from tallystick.metrics import REGISTRY
from tallystick.resources import Resources
from tallystick.webhooks import inbox
from tallystick.webhooks.failures import FAILURES_BEFORE_QUARANTINE
from tallystick.webhooks.inbox import Inbox
from tests.dying import Life, living
from tests.waiting import wait_until
from tests.webhooks.stripe_events import (
    NOON,
    customer,
    deliver,
    event,
    invoice,
    item,
    let_an_hour_pass,
    post,
    price,
    read,
    read_access,
    subscription,
    verified,
)


async def test_an_event_is_recorded_with_its_effect_and_without_its_payload(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    sent = event("customer.created", customer(name="Jenny Rosen", email="jenny@example.com"))

    assert await deliver(client, sent) == ["applied"]

    [recorded] = await read(resources, "SELECT * FROM stripe_events")
    assert (recorded["id"], recorded["type"], recorded["object_id"]) == (sent["id"], "customer.created", "cus_1")
    assert (recorded["verdict"], recorded["error"], recorded["livemode"]) == ("applied", None, False)
    stored = str([await read(resources, f"SELECT * FROM {table}") for table in ("stripe_events", "customers")])  # noqa: S608
    assert "Jenny" not in stored
    assert "jenny" not in stored


async def test_a_repeat_is_a_duplicate_and_changes_nothing(client: httpx.AsyncClient, resources: Resources) -> None:
    first = event("customer.created", customer(metadata={"tallystick_ref": "acme"}))
    # Stripe repeats an event with the same body; whatever else comes under its id is not looked at.
    repeat = event("customer.updated", customer(metadata={"tallystick_ref": "other"}), at=9, id_=first["id"])

    assert await deliver(client, first, first, repeat) == ["applied", "duplicate", "duplicate"]

    assert await read(resources, "SELECT ref FROM customers") == [{"ref": "acme"}]
    assert len(await read(resources, "SELECT * FROM stripe_events")) == 1


async def test_the_same_event_twice_at_once_is_applied_once(client: httpx.AsyncClient) -> None:
    sent = event("customer.created", customer())

    answers = await asyncio.gather(*(post(client, sent) for _ in range(8)))

    assert sorted(answer.json()["verdict"] for answer in answers) == ["applied"] + ["duplicate"] * 7


async def test_the_same_event_at_two_processes_at_once_is_applied_once(resources: Resources) -> None:
    received = verified(resources, event("customer.created", customer()))
    inboxes = [Inbox(resources), Inbox(resources)]
    for one in inboxes:
        await one.start()

    verdicts = await asyncio.gather(*(one.submit(received) for one in inboxes))

    assert sorted(verdicts) == ["applied", "duplicate"]
    for one in inboxes:
        await one.stop()


@pytest.mark.parametrize(
    "sent",
    [
        event("charge.succeeded", {"id": "ch_1", "object": "charge"}),
        event("customer.source.created", {"id": "card_1", "object": "card"}),
        event("invoice_payment.paid", {"id": "inpay_1", "object": "invoice_payment"}),
        event("invoice.upcoming", {key: value for key, value in invoice().items() if key != "id"}),
        event("invoice.upcoming", invoice() | {"id": None}),
        event("something.new.in.2031", {"id": "new_1", "object": "new"}),
        event("customer.created", {}) | {"data": None},
        event("customer.created", {}) | {"data": []},
        event("customer.created", {"id": "acct_1", "object": "account"}),
        event("v1.billing.meter.something_new", {})
        | {"object": "v2.core.event", "created": "2026-01-01T00:00:00.123Z", "related_object": {"id": "mtr_1"}},
    ],
    ids=lambda sent: sent["type"],
)
async def test_what_is_not_mirrored_is_recorded_as_ignored(
    client: httpx.AsyncClient, resources: Resources, sent: dict[str, object]
) -> None:
    assert await deliver(client, sent) == ["ignored"]
    assert await deliver(client, sent) == ["duplicate"]
    assert await read(resources, "SELECT verdict FROM stripe_events") == [{"verdict": "ignored"}]


async def test_an_older_event_is_stale(client: httpx.AsyncClient, resources: Resources) -> None:
    newer = event("customer.subscription.updated", subscription(status="past_due"), at=60)
    older = event("customer.subscription.updated", subscription(status="active"), at=59)

    assert await deliver(client, newer, older) == ["applied", "stale"]

    assert await read_access(client) == ("restricted", "past_due", [])
    assert await read(resources, "SELECT verdict FROM stripe_events WHERE id = :id", id=older["id"]) == [
        {"verdict": "stale"}
    ]


async def test_a_late_older_event_does_not_bring_old_items_back(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    newer = event("customer.subscription.updated", subscription(items=[item("si_new", "price_new")]), at=60)
    older = event("customer.subscription.updated", subscription(items=[item("si_old", "price_old")]), at=59)

    await deliver(client, newer, older)

    assert await read(resources, "SELECT id FROM subscription_items WHERE NOT deleted") == [{"id": "si_new"}]
    assert await read_access(client) == ("active", "subscription_active", ["price_new"])


async def test_items_that_are_gone_no_longer_give_access(client: httpx.AsyncClient) -> None:
    both = subscription(items=[item("si_1", "price_1"), item("si_2", "price_2")])
    await deliver(client, event("customer.subscription.created", both))
    assert (await read_access(client))[2] == ["price_1", "price_2"]

    await deliver(client, event("customer.subscription.updated", subscription(items=[item("si_2", "price_2")]), at=1))
    assert (await read_access(client))[2] == ["price_2"]

    await deliver(client, event("customer.subscription.updated", both, at=2))
    assert (await read_access(client))[2] == ["price_1", "price_2"]


async def test_a_deleted_object_stays_deleted(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(client, event("customer.subscription.created", subscription()))
    await deliver(client, event("customer.deleted", customer(), at=1))
    assert await read_access(client) == ("none", "customer_deleted", [])

    late = event("customer.updated", customer(metadata={"tallystick_ref": "zombie"}), at=2)
    assert await deliver(client, late) == ["stale"]

    assert await read_access(client) == ("none", "customer_deleted", [])
    assert await read(resources, "SELECT ref, deleted FROM customers") == [{"ref": None, "deleted": True}]


@pytest.mark.parametrize("final", ["canceled", "incomplete_expired"])
async def test_a_subscription_never_leaves_a_final_status(client: httpx.AsyncClient, final: str) -> None:
    await deliver(client, event("customer.subscription.deleted", subscription(status=final)))

    assert await deliver(client, event("customer.subscription.updated", subscription(), at=60)) == ["stale"]

    assert await read_access(client) == ("none", "ended", [])


@pytest.mark.parametrize("final", ["paid", "void"])
async def test_an_invoice_never_leaves_a_final_status(client: httpx.AsyncClient, final: str) -> None:
    await deliver(client, event("customer.subscription.created", subscription()))
    await deliver(client, event("invoice.updated", invoice(status=final), at=1))

    assert await deliver(client, event("invoice.updated", invoice(status="open"), at=60)) == ["stale"]


async def test_an_uncollectible_invoice_may_yet_be_paid(client: httpx.AsyncClient) -> None:
    await deliver(client, event("customer.subscription.created", subscription()))
    await deliver(client, event("invoice.payment_failed", invoice(), at=1))
    await deliver(client, event("invoice.marked_uncollectible", invoice(status="uncollectible"), at=2))
    assert await read_access(client) == ("restricted", "payment_failed", [])

    await deliver(client, event("invoice.paid", invoice(status="paid"), at=3))
    assert await read_access(client) == ("active", "subscription_active", ["price_1"])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_two_events_of_one_second_end_alike_in_both_orders_and_are_looked_up(
    client: httpx.AsyncClient, resources: Resources, order: tuple[int, int]
) -> None:
    events = [
        event("customer.subscription.updated", subscription(status="active"), id_="evt_a"),
        event("customer.subscription.updated", subscription(status="past_due"), id_="evt_B"),
    ]

    await deliver(client, *(events[index] for index in order))

    rows = await read(resources, "SELECT mark_event, status, needs_refresh FROM subscriptions")
    assert rows == [{"mark_event": "evt_a", "status": "active", "needs_refresh": True}]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_within_a_second_an_update_comes_after_the_creation(
    client: httpx.AsyncClient, resources: Resources, order: tuple[int, int]
) -> None:
    events = [
        event("customer.subscription.created", subscription(status="incomplete"), id_="evt_2"),
        event("customer.subscription.updated", subscription(status="active"), id_="evt_1"),
    ]

    await deliver(client, *(events[index] for index in order))

    rows = await read(resources, "SELECT status, needs_refresh FROM subscriptions")
    assert rows == [{"status": "active", "needs_refresh": False}]


async def test_a_later_event_settles_a_tie(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(client, event("customer.updated", customer()), event("customer.updated", customer()))
    assert await read(resources, "SELECT needs_refresh FROM customers") == [{"needs_refresh": True}]

    await deliver(client, event("customer.updated", customer(), at=1))
    assert await read(resources, "SELECT needs_refresh FROM customers") == [{"needs_refresh": False}]


async def test_an_invoice_and_a_subscription_may_come_before_their_customer(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await deliver(client, event("invoice.payment_failed", invoice()))
    await deliver(client, event("customer.subscription.created", subscription()))
    assert await read(resources, "SELECT id, needs_refresh FROM customers") == [{"id": "cus_1", "needs_refresh": True}]
    assert await read_access(client) == ("restricted", "payment_failed", [])

    await deliver(client, event("customer.created", customer(metadata={"tallystick_ref": "acme"}), at=-60))
    assert await read_access(client, "acme") == ("restricted", "payment_failed", [])
    assert await read(resources, "SELECT needs_refresh FROM customers") == [{"needs_refresh": False}]


async def test_prices_are_known_from_items_until_they_come_themselves(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    query = "SELECT product, meter, usage_type, active, lookup_key, needs_refresh FROM prices"
    await deliver(client, event("customer.subscription.created", subscription()))
    stub = {"product": "prod_1", "meter": "mtr_1", "usage_type": "metered", "active": True, "lookup_key": None}
    assert await read(resources, query) == [stub | {"needs_refresh": True}]

    await deliver(client, event("price.updated", price(active=False, lookup_key="gold"), at=-60))
    await deliver(client, event("customer.subscription.updated", subscription(), at=1))
    itself = stub | {"active": False, "lookup_key": "gold", "needs_refresh": False}
    assert await read(resources, query) == [itself]


async def test_products_are_mirrored(client: httpx.AsyncClient, resources: Resources) -> None:
    product = {"id": "prod_1", "object": "product", "active": True}
    await deliver(client, event("product.created", product))
    await deliver(client, event("product.updated", product | {"active": False}, at=1))
    assert await read(resources, "SELECT id, active, deleted FROM products") == [
        {"id": "prod_1", "active": False, "deleted": False}
    ]

    await deliver(client, event("product.deleted", product, at=2))
    assert await read(resources, "SELECT deleted FROM products") == [{"deleted": True}]


async def test_a_failed_payment_restricts_at_once_and_a_payment_lifts_it_at_once(client: httpx.AsyncClient) -> None:
    await deliver(client, event("customer.subscription.created", subscription(latest_invoice="in_1")))
    await deliver(client, event("invoice.payment_failed", invoice(), at=1))
    assert await read_access(client) == ("restricted", "payment_failed", [])

    past_due = subscription(status="past_due", latest_invoice="in_1")
    await deliver(client, event("customer.subscription.updated", past_due, at=2))
    await deliver(client, event("invoice.paid", invoice(status="paid"), at=3))
    assert await read_access(client) == ("active", "payment_received", ["price_1"])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_payment_failure_counts_even_when_its_event_comes_late(
    client: httpx.AsyncClient, order: tuple[int, int]
) -> None:
    await deliver(client, event("customer.subscription.created", subscription()))
    events = [
        event("invoice.payment_failed", invoice(), at=1),
        event("invoice.updated", invoice(next_payment_attempt=None), at=2),
    ]

    verdicts = await deliver(client, *(events[index] for index in order))

    assert verdicts == ["applied", "applied"]
    assert await read_access(client) == ("restricted", "payment_failed", [])


async def test_a_failed_one_off_invoice_restricts_nothing(client: httpx.AsyncClient) -> None:
    await deliver(client, event("customer.subscription.created", subscription()))
    await deliver(client, event("invoice.payment_failed", invoice(of=None), at=1))

    assert (await read_access(client))[0] == "active"


async def test_every_period_boundary_is_kept_of_late_events_too(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await deliver(
        client,
        event("customer.subscription.updated", subscription(items=[item(start=200, end=300)], cancel_at=None), at=60),
        event(
            "customer.subscription.updated", subscription(items=[item(start=100, end=200)], trial_end=NOON + 150), at=59
        ),
        event(
            "customer.subscription.updated", subscription(items=[], cancel_at=NOON + 290, ended_at=NOON + 280), at=61
        ),
        event("invoice.created", invoice(period_start=NOON + 10, period_end=NOON + 100)),
        event("invoice.created", invoice("in_2", of=None, period_start=NOON + 1, period_end=NOON + 2)),
    )

    boundaries = await read(resources, "SELECT extract(epoch FROM at)::bigint AS at FROM period_boundaries ORDER BY at")
    assert [row["at"] - NOON for row in boundaries] == [0, 10, 100, 150, 200, 280, 290, 300]


async def test_a_draft_invoice_asks_for_the_usage_to_be_sealed(client: httpx.AsyncClient, resources: Resources) -> None:
    query = "SELECT customer, invoice, requested_at FROM seal_requests"
    created = event("invoice.created", invoice(status="draft"))
    await deliver(client, created)
    [first] = await read(resources, query)
    assert (first["customer"], first["invoice"]) == ("cus_1", "in_1")

    await deliver(client, created)
    assert await read(resources, query) == [first]

    await deliver(client, event("invoice.created", invoice("in_2", status="draft"), at=1))
    [second] = await read(resources, query)
    assert second["invoice"] == "in_2"
    assert second["requested_at"] > first["requested_at"]


async def test_other_invoices_ask_for_nothing(client: httpx.AsyncClient, resources: Resources) -> None:
    await deliver(
        client,
        event("invoice.created", invoice(status="open")),
        event("invoice.updated", invoice("in_2", status="draft")),
    )

    assert await read(resources, "SELECT * FROM seal_requests") == []


async def test_events_that_wait_together_are_committed_together(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    batches, events = _count("batch_size_count"), _count("batch_size_sum")
    sent = [
        event("customer.updated", customer(f"cus_{n % 5}", metadata={"tallystick_ref": str(n)}), at=n)
        for n in range(30)
    ]

    answers = await asyncio.gather(*(post(client, one) for one in sent))

    assert {answer.json()["verdict"] for answer in answers} <= {"applied", "stale"}
    assert await read(resources, "SELECT id, ref FROM customers ORDER BY id") == [
        {"id": f"cus_{n}", "ref": str(25 + n)} for n in range(5)
    ]
    assert _count("batch_size_sum") - events == 30
    assert _count("batch_size_count") - batches < 15


async def test_an_event_that_we_cannot_handle_is_retried_and_then_quarantined(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    # A database that refuses this customer stands for any bug of ours; the constraint is real, and so is the error.
    bad, good = (
        event("customer.created", customer("cus_bad")),
        [event("customer.created", customer(f"cus_{n}")) for n in range(12)],
    )
    async with db.transaction(resources.engine) as connection:
        await connection.exec_driver_sql("ALTER TABLE customers ADD CONSTRAINT a_bug CHECK (id <> 'cus_bad')")
    try:
        answers = await asyncio.gather(*(post(client, sent) for sent in [*good[:6], bad, *good[6:]]))
        assert [answer.status_code for answer in answers] == [200] * 6 + [500] + [200] * 6
        assert answers[6].headers["content-type"] == "application/problem+json"
        assert "cus_bad" not in answers[6].text

        # However often it comes within an hour, as Stripe's and recovery's tries do during a bad deployment.
        for _ in range(FAILURES_BEFORE_QUARANTINE):
            assert (await post(client, bad)).status_code == 500
        assert await read(resources, "SELECT failures FROM stripe_event_failures") == [{"failures": 1}]

        for _ in range(FAILURES_BEFORE_QUARANTINE - 2):
            await let_an_hour_pass(resources)
            assert (await post(client, bad)).status_code == 500
        assert await read(resources, "SELECT id, failures, error FROM stripe_event_failures") == [
            {"id": bad["id"], "failures": FAILURES_BEFORE_QUARANTINE - 1, "error": "CheckViolationError"}
        ]

        await let_an_hour_pass(resources)
        last = await post(client, bad)
        assert (last.status_code, last.json()) == (200, {"verdict": "quarantined"})
        assert await read(resources, "SELECT verdict, error FROM stripe_events WHERE id = :id", id=bad["id"]) == [
            {"verdict": "quarantined", "error": "CheckViolationError"}
        ]
        assert await read(resources, "SELECT * FROM stripe_event_failures") == []
    finally:
        async with db.transaction(resources.engine) as connection:
            await connection.exec_driver_sql("ALTER TABLE customers DROP CONSTRAINT a_bug")


async def test_failures_are_forgotten_once_the_event_is_handled(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    bad = event("customer.created", customer("cus_bad", metadata={"tallystick_ref": "jenny@example.com"}))
    async with db.transaction(resources.engine) as connection:
        await connection.exec_driver_sql(
            "ALTER TABLE customers ADD CONSTRAINT a_bug CHECK (ref <> 'jenny@example.com')"
        )
    try:
        with capture_logs() as logs:
            assert (await post(client, bad)).status_code == 500
    finally:
        async with db.transaction(resources.engine) as connection:
            await connection.exec_driver_sql("ALTER TABLE customers DROP CONSTRAINT a_bug")

    assert [line["event"] for line in logs] == ["stripe_event_failed", "stripe_event_refused"]
    assert "apply_changes" in str(logs)
    assert "jenny" not in str(logs)
    assert await deliver(client, bad) == ["applied"]
    assert await read(resources, "SELECT * FROM stripe_event_failures") == []


async def test_the_quarantine_of_an_event_is_not_in_the_way_of_another_process_that_handles_it(
    client: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(inbox, "record_events", fail)
    sent = event("customer.created", customer())
    for _ in range(FAILURES_BEFORE_QUARANTINE - 1):
        assert (await post(client, sent)).status_code == 500
        await let_an_hour_pass(resources)

    async def is_being_quarantined() -> bool:
        waits = "application_name = 'tallystick api' AND datname = current_database() AND wait_event_type = 'Lock'"
        return bool(await read(resources, f"SELECT pid FROM pg_stat_activity WHERE {waits}"))  # noqa: S608  a constant

    async with db.transaction(resources.engine) as other:
        row = {"id": sent["id"]}
        await other.execute(
            text(
                "INSERT INTO stripe_events (id, type, livemode, created, verdict)"
                " VALUES (:id, 'customer.created', false, now(), 'applied')"
            ),
            row,
        )
        last = asyncio.create_task(post(client, sent))
        await wait_until(is_being_quarantined)
        await other.execute(text("SET LOCAL lock_timeout = '100ms'"))
        await other.execute(text("DELETE FROM stripe_event_failures WHERE id = :id"), row)

    assert (await last).status_code == 500
    assert await read(resources, "SELECT verdict FROM stripe_events") == [{"verdict": "applied"}]


async def test_who_dies_before_an_event_is_set_aside_leaves_that_to_the_next_failure(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(inbox, "record_events", fail)
    monkeypatch.setattr(inbox, "ANSWER_WITHIN_SECONDS", 0.5)
    sent = verified(resources, event("customer.created", customer()))

    async def receive() -> str:
        """As a process does that has just started: the verdict, or the problem's type."""
        process = Inbox(resources)
        await process.start()
        try:
            return await process.submit(sent)
        except Problem as problem:
            return problem.type
        finally:
            await process.stop()

    for _ in range(FAILURES_BEFORE_QUARANTINE - 1):
        assert await receive() == Problem.type
        await let_an_hour_pass(resources)
    life = Life(until=1)
    async with living(life, resources):
        assert await receive() == StorageFailed.type  # nobody is there to answer any more
    assert life.steps == ["commit"]
    rows = "SELECT failures FROM stripe_event_failures"
    assert await read(resources, rows) == [{"failures": FAILURES_BEFORE_QUARANTINE}]
    assert await read(resources, "SELECT id FROM stripe_events") == []

    await let_an_hour_pass(resources)
    assert await receive() == "quarantined"
    assert await read(resources, "SELECT verdict, error FROM stripe_events") == [
        {"verdict": "quarantined", "error": "ZeroDivisionError"}
    ]
    assert await read(resources, rows) == []


async def test_a_stopped_inbox_refuses_events(app: FastAPI, client: httpx.AsyncClient) -> None:
    await app.state.inbox.stop()

    answer = await post(client, event("customer.created", customer()))

    assert answer.status_code == StorageFailed.status
    assert answer.json()["type"].endswith("storage-failed")


def _count(name: str) -> float:
    lines = generate_latest(REGISTRY).decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"tallystick_webhook_{name} "))
