"""From the outbox to the product: each notification once in the usual case, in order, and never forgotten."""

import asyncio
import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from standardwebhooks import Webhook
from starlette.responses import RedirectResponse, Response

from tallystick import db
from tallystick.notifications.delivery import LEASE, RETRY_AFTER, deliver_notifications, retry_after
from tallystick.resources import Resources
from tallystick.rules import RulesFile, load_rules
from tests.notifications.receiving import (
    OLD_SECRET,
    SECRET,
    Receiver,
    endpoint,
    make_due,
    read,
    states,
    tell,
    with_endpoints,
)


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def told(resources: Resources, product: Receiver, tmp_path: Path) -> Resources:
    """Resources whose rules name the product."""
    return with_endpoints(resources, tmp_path, endpoint("product", product.url))


async def test_a_notification_is_a_standard_webhook_signed_with_every_secret(
    resources: Resources, product: Receiver, tmp_path: Path
) -> None:
    rolled = with_endpoints(resources, tmp_path, endpoint("product", product.url, secrets=[SECRET, OLD_SECRET]))
    (told_id,) = await tell(rolled, "cus_1")
    assert await deliver_notifications(rolled, now()) == 1
    (got,) = product.received
    assert (got.id, got.headers["content-type"], got.path) == (told_id, "application/json", "/hooks")
    for secret in (SECRET, OLD_SECRET):
        body = Webhook(secret).verify(got.body, got.headers)
        assert body["type"] == "usage.parked"
        assert body["data"] == {"customer": "cus_1", "account": None, "refs": [], "number": "0"}
        assert now() - timedelta(minutes=1) <= datetime.fromisoformat(body["timestamp"]) <= now()
    assert await states(rolled) == [("delivered", 1, "status 204")]
    assert await deliver_notifications(rolled, now()) == 0


async def test_a_failed_try_is_repeated_later_with_the_same_id_and_body_and_a_new_time(
    told: Resources, product: Receiver
) -> None:
    product.answers += [Response(status_code=500), Response(status_code=404)]
    await tell(told, "cus_1")
    async with db.transaction(told.engine) as connection:
        await connection.execute(text("UPDATE notifications SET created_at = now() - interval '1 day'"))
    assert await deliver_notifications(told, now()) == 1
    assert await deliver_notifications(told, now()) == 0, "it is not due yet"
    for _ in range(2):
        await make_due(told)
        assert await deliver_notifications(told, now()) == 1
    assert await states(told) == [("delivered", 3, "status 204")]
    assert len(set(product.ids)) == 1
    assert len({got.body for got in product.received}) == 1
    for got in product.received:
        # A signature that is older than five minutes would not be believed.
        body = Webhook(SECRET).verify(got.body, got.headers)
        assert datetime.fromisoformat(body["timestamp"]) < now() - timedelta(hours=23)


async def test_a_later_one_of_a_customer_waits_for_an_earlier_one_and_other_customers_do_not(
    told: Resources, product: Receiver
) -> None:
    first, second, other = await tell(told, "cus_1", "cus_1", "cus_2")
    product.held.add("cus_1")
    run = asyncio.create_task(deliver_notifications(told, now()))
    await product.has(2)
    assert set(product.ids) == {first, other}
    product.answers += [Response(status_code=500)]
    product.let_go()
    assert await run == 2
    assert await states(told) == [("pending", 1, "status 500"), ("queued", 0, None), ("delivered", 1, "status 204")]
    await make_due(told)
    await deliver_notifications(told, now())
    assert [id_ for id_ in product.ids if id_ != other] == [first, first, second]


async def test_what_nobody_took_for_three_days_is_dead_and_no_longer_in_the_way(
    told: Resources, product: Receiver
) -> None:
    tries = len(RETRY_AFTER) + 1
    product.answers += [Response(status_code=503) for _ in range(tries)]
    first, second = await tell(told, "cus_1", "cus_1")
    for _ in range(tries):
        await make_due(told)
        await deliver_notifications(told, now())
    assert await states(told) == [("dead", tries, "status 503"), ("delivered", 1, "status 204")]
    assert product.ids == [first] * tries + [second]


def test_the_waits_grow_to_three_days() -> None:
    assert list(RETRY_AFTER) == sorted(RETRY_AFTER)
    assert timedelta(days=3) <= sum(RETRY_AFTER, timedelta(0)) <= timedelta(days=3.5)
    assert RETRY_AFTER[3] <= retry_after(4) <= RETRY_AFTER[3] * 1.1


async def test_a_receiver_may_ask_for_a_longer_wait(told: Resources, product: Receiver) -> None:
    product.answers.append(Response(status_code=429, headers={"Retry-After": "3600"}))
    await tell(told, "cus_1")
    at = now()
    await deliver_notifications(told, at)
    ((waits_until,),) = await read(told, "SELECT next_attempt_at FROM notification_deliveries")
    assert waits_until >= at + timedelta(hours=1)


async def test_gone_is_taken_at_its_word(told: Resources, product: Receiver) -> None:
    product.answers.append(Response(status_code=410))
    await tell(told, "cus_1")
    await deliver_notifications(told, now())
    assert await states(told) == [("dead", 1, "status 410")]


async def test_a_redirect_is_not_followed(told: Resources, product: Receiver) -> None:
    product.answers.append(RedirectResponse("/elsewhere", status_code=307))
    await tell(told, "cus_1")
    await deliver_notifications(told, now())
    assert await states(told) == [("pending", 1, "status 307")]
    assert [got.path for got in product.received] == ["/hooks"]


async def test_an_endpoint_that_nobody_listens_at_is_tried_again(resources: Resources, tmp_path: Path) -> None:
    nowhere = with_endpoints(resources, tmp_path, endpoint("nowhere", "http://127.0.0.1:1/"))
    await tell(nowhere, "cus_1")
    await deliver_notifications(nowhere, now())
    assert await states(nowhere) == [("pending", 1, "ConnectError")]


async def test_an_endpoint_that_hangs_holds_up_nobody_else(
    resources: Resources, product: Receiver, other_product: Receiver, tmp_path: Path
) -> None:
    both = with_endpoints(resources, tmp_path, endpoint("hangs", product.url), endpoint("works", other_product.url))
    customers = [f"cus_{number}" for number in range(40)]  # more than there are places for one endpoint
    product.held.update(customers)
    await tell(both, *customers)
    run = asyncio.create_task(deliver_notifications(both, now()))
    await other_product.has(40)
    # Neither do those that come while the run waits for the one that hangs.
    (late,) = await tell(both, "cus_1")
    await other_product.has(41)
    assert other_product.ids[-1] == late
    assert not run.done()
    product.let_go()
    assert await run == 82
    assert sorted(product.ids) == sorted(other_product.ids)


async def test_an_endpoint_that_cannot_be_sent_to_for_an_unforeseen_reason_holds_up_nobody_else(
    resources: Resources, product: Receiver, tmp_path: Path
) -> None:
    too_long = f"https://{'a' * 64}.example.com/"  # Python refuses such a name before it asks the resolver
    both = with_endpoints(resources, tmp_path, endpoint("broken", too_long), endpoint("works", product.url))
    (told_id,) = await tell(both, "cus_1")
    await deliver_notifications(both, now())
    assert await states(both) == [("pending", 1, "UnicodeError"), ("delivered", 1, "status 204")]
    assert product.ids == [told_id]


async def test_an_answer_without_end_is_cut_off(told: Resources, product: Receiver) -> None:
    product.answers.append(Response(b"x" * 1_000_000, status_code=200))
    await tell(told, "cus_1")
    await deliver_notifications(told, now())
    assert await states(told) == [("delivered", 1, "status 200")]


async def test_a_worker_that_died_before_it_could_settle_is_replaced_and_the_receiver_knows_the_repeat(
    told: Resources, product: Receiver
) -> None:
    first, second = await tell(told, "cus_1", "cus_1")
    product.held.add("cus_1")
    at = now()
    dies = asyncio.create_task(deliver_notifications(told, at))
    await product.has(1)
    dies.cancel()
    await asyncio.gather(dies, return_exceptions=True)
    product.let_go()
    assert await deliver_notifications(told, at + LEASE - timedelta(seconds=5)) == 0
    assert await deliver_notifications(told, at + LEASE + timedelta(seconds=5)) == 2
    assert product.ids == [first, first, second]


async def test_a_worker_whose_lease_was_taken_over_has_no_say(told: Resources, product: Receiver) -> None:
    await tell(told, "cus_1")
    product.held.add("cus_1")
    product.answers += [Response(status_code=500), Response(status_code=204)]
    at = now()
    slow = asyncio.create_task(deliver_notifications(told, at))
    await product.has(1)
    other = asyncio.create_task(deliver_notifications(told, at + LEASE + timedelta(seconds=5)))
    await product.has(2)
    product.let_go(1)
    await slow
    assert await states(told) == [("sending", 2, None)]
    product.let_go(1)
    await other
    assert await states(told) == [("delivered", 2, "status 204")]


async def test_two_workers_at_once_send_each_notification_once_and_in_order(told: Resources, product: Receiver) -> None:
    ids = await tell(told, *[f"cus_{number % 10}" for number in range(60)])
    tries = await asyncio.gather(*(deliver_notifications(told, now()) for _ in range(3)))
    assert sum(tries) == 60
    assert sorted(product.ids) == sorted(ids)
    for number in range(10):
        in_order = [got.id for got in product.received if got.customer == f"cus_{number}"]
        assert in_order == ids[number::10]


async def test_an_endpoint_gets_the_types_that_it_asked_for(
    resources: Resources, product: Receiver, tmp_path: Path
) -> None:
    some = with_endpoints(resources, tmp_path, endpoint("product", product.url, events=["usage.parked"]))
    (wanted,) = await tell(some, "cus_1")
    await tell(some, "cus_1", kind="invoice.payment_failed")
    await deliver_notifications(some, now())
    assert product.ids == [wanted]


async def test_an_endpoint_that_is_added_later_does_not_get_what_was_told_before(
    resources: Resources, product: Receiver, other_product: Receiver, tmp_path: Path
) -> None:
    nobody = with_endpoints(resources, tmp_path)
    await tell(nobody, "cus_1")
    await deliver_notifications(nobody, now())
    one = with_endpoints(resources, tmp_path, endpoint("product", product.url))
    (second,) = await tell(one, "cus_1")
    await deliver_notifications(one, now())
    two = with_endpoints(resources, tmp_path, endpoint("product", product.url), endpoint("new", other_product.url))
    (third,) = await tell(two, "cus_1")
    await deliver_notifications(two, now())
    assert product.ids == [second, third]
    assert other_product.ids == [third]


async def test_what_waits_for_an_endpoint_is_sent_when_the_rules_name_it_again(
    resources: Resources, product: Receiver, tmp_path: Path
) -> None:
    path = tmp_path / "rules.toml"
    named = with_endpoints(resources, tmp_path, endpoint("product", product.url))
    assert named.rules.path is not None
    product.answers.append(Response(status_code=500))
    await tell(named, "cus_1")
    await deliver_notifications(named, now())
    await make_due(named)
    path.write_text("")
    unnamed = dataclasses.replace(resources, rules=RulesFile(path))
    assert await deliver_notifications(unnamed, now()) == 0
    path.write_text(named.rules.path.read_text())
    assert load_rules(path).notifications
    assert await deliver_notifications(unnamed, now() + timedelta(seconds=10)) == 1
    assert [state for state, *_ in await states(resources)] == ["delivered"]


async def test_a_body_holds_nothing_but_what_was_told(told: Resources, product: Receiver) -> None:
    await tell(told, "cus_1")
    await deliver_notifications(told, now())
    assert json.loads(product.received[0].body).keys() == {"type", "timestamp", "data"}
