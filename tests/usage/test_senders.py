"""The other two senders: the meter event stream, and usage records."""

import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tallystick import db
from tallystick.loops import run_loops
from tallystick.resources import Resources
from tallystick.rules import RulesFile
from tallystick.stripe_gateway import MeterEventSession
from tallystick.usage import delivery
from tallystick.usage.delivery import deliver, deliver_all
from tallystick.usage.error_reports import fetch_error_reports, find_error_reports
from tallystick.usage.ledger import record_events
from tallystick.usage.parked import resend
from tallystick.usage.sealing import seal_everything
from tallystick.usage.senders.meter_events import send_meter_events
from tallystick.usage.senders.outcomes import Message, Outcome
from tallystick.worker import LOOPS
from tests.conftest import FakeStripe
from tests.usage.making import METER, conservation, last_hour, make_customer, make_event, read_all, run
from tests.usage.test_delivery import make_deliveries, misbehave, next_due, taken_by_stripe
from tests.waiting import wait_until

STREAM = "/v2/billing/meter_event_stream"
SESSION = "/v2/billing/meter_event_session"
STATES = "SELECT state, count(*) FROM usage_deliveries GROUP BY state ORDER BY state"


async def make_streamed(resources: Resources, fake: FakeStripe, number: int) -> None:
    """So many customers, each with one delivery for the stream."""
    await make_deliveries(resources, fake, "1")
    refs = {f"c{n}": f"cus_{n}" for n in range(1, number)}
    async with db.transaction(resources.engine) as connection:
        events = [make_event(ref, at=last_hour(), customer_ref=ref) for ref in refs]
        await record_events(connection, events, accepted_already=True)
    for ref, customer in refs.items():
        await make_customer(resources, ref=ref, customer=customer)
    await seal_everything(resources, datetime.now(UTC))
    await run(resources, "UPDATE usage_deliveries SET sender = 'meter_event_stream'")


async def requests_to(fake: FakeStripe, path: str) -> list[dict[str, Any]]:
    requests = (await fake.control.get("/_fake/requests")).json()["requests"]
    return [request for request in reversed(requests) if request["path"] == path]


async def test_a_process_that_was_stopped_for_long_makes_no_further_call(fake_stripe: FakeStripe) -> None:
    message = Message(METER, "too-late", {"stripe_customer_id": "cus_1", "value": "1"}, 0, 1)
    outcomes = await send_meter_events(fake_stripe.client, [message] * 3, lanes=2, seconds=-1)
    assert outcomes == [Outcome("retry", "out_of_time")] * 3
    assert await requests_to(fake_stripe, "/v1/billing/meter_events") == []


async def test_the_stream_takes_a_hundred_deliveries_a_request(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_streamed(resources, fake_stripe, 120)
    assert await deliver_all(resources, datetime.now(UTC)) == 120
    assert await read_all(resources, STATES) == [("sent", 120)]
    assert sorted(len(request["params"]["events"]) for request in await requests_to(fake_stripe, STREAM)) == [20, 100]
    assert len(await requests_to(fake_stripe, SESSION)) == 1
    assert len(await taken_by_stripe(fake_stripe)) == 120
    attempts = "SELECT DISTINCT outcome, http_status, starts_with(request_id, 'stream-') FROM usage_delivery_attempts"
    assert await read_all(resources, attempts) == [("sent", 200, True)]


async def test_a_session_is_renewed_before_it_ends(resources: Resources, fake_stripe: FakeStripe) -> None:
    session = MeterEventSession(fake_stripe.client)
    now = datetime.now(UTC)
    tokens = await asyncio.gather(*(session.current(now) for _ in range(3)))
    assert len(set(tokens)) == 1
    assert await session.current(now + timedelta(minutes=12)) == tokens[0]
    assert await session.current(now + timedelta(minutes=13, seconds=1)) != tokens[0]


async def test_a_session_that_ended_before_its_time_is_renewed_once(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_streamed(resources, fake_stripe, 1)
    resources.meter_event_session.token = "ended"
    resources.meter_event_session.expires_at = datetime.now(UTC) + timedelta(minutes=10)
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [("sent", 1)]
    assert [request["status"] for request in await requests_to(fake_stripe, STREAM)] == [401, 200]


async def test_a_report_parks_what_was_said_again_with_a_new_session(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    customer = await make_deliveries(resources, fake_stripe, "1")
    await run(resources, "UPDATE usage_deliveries SET sender = 'meter_event_stream'")
    await fake_stripe.client.v1.customers.delete_async(customer)
    resources.meter_event_session.token = "ended"
    resources.meter_event_session.expires_at = datetime.now(UTC) + timedelta(minutes=10)
    await deliver_all(resources, datetime.now(UTC))
    assert [request["status"] for request in await requests_to(fake_stripe, STREAM)] == [401, 200]
    (await fake_stripe.control.post("/_fake/clock", json={"advance_seconds": 60})).raise_for_status()
    await find_error_reports(resources, datetime.now(UTC))
    await fetch_error_reports(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [("parked", 1)]


async def test_without_a_session_the_deliveries_wait(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_streamed(resources, fake_stripe, 1)
    await fake_stripe.control.post("/_fake/faults", json={"kind": "rate_limit", "path": SESSION, "times": 1})
    await deliver(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT state, unknown_since FROM usage_deliveries") == [("pending", None)]
    await deliver(resources, await next_due(resources))
    assert await read_all(resources, STATES) == [("sent", 1)]


@pytest.mark.parametrize(("kind", "unknown"), [("rate_limit", False), ("timeout_after", True), ("error_500", True)])
async def test_a_request_of_the_stream_that_failed_is_repeated_and_counts_once(
    resources: Resources, fake_stripe: FakeStripe, kind: str, unknown: bool
) -> None:
    await make_streamed(resources, fake_stripe, 3)
    fault = {"kind": kind, "path": STREAM, "times": 1, "seconds": 0}
    (await fake_stripe.control.post("/_fake/faults", json=fault)).raise_for_status()
    await deliver(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT DISTINCT state, unknown_since IS NOT NULL FROM usage_deliveries") == [
        ("pending", unknown)
    ]
    await deliver(resources, await next_due(resources))
    assert await read_all(resources, STATES) == [("sent", 3)]
    assert len(await taken_by_stripe(fake_stripe)) == 3


async def test_one_bad_event_does_not_take_the_others_of_its_request_along(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_streamed(resources, fake_stripe, 9)
    # The only thing for which the stream refuses a request as a whole.
    await run(
        resources,
        "UPDATE usage_deliveries SET identifier = repeat('x', 101) WHERE customer = 'cus_5'",
    )
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [("parked", 1), ("sent", 8)]
    ((customer, reason),) = await read_all(
        resources, "SELECT customer, reason FROM usage_deliveries WHERE state = 'parked'"
    )
    assert customer == "cus_5"
    assert "identifier" in str(reason)
    assert len(await taken_by_stripe(fake_stripe)) == 8


async def test_one_repeat_does_not_make_the_others_of_its_request_sent(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    """A worker died after a part of what it was to send; its lease ended, and what was new since is in one request."""
    (await fake_stripe.control.post("/_fake/settings", json={"stream_refuses_repeats": True})).raise_for_status()
    await make_streamed(resources, fake_stripe, 9)
    await run(
        resources, "UPDATE usage_deliveries SET next_attempt_at = 'infinity' WHERE customer IN ('cus_3', 'cus_5')"
    )
    await deliver_all(resources, datetime.now(UTC))
    await run(resources, "UPDATE usage_deliveries SET state = 'pending', next_attempt_at = now()")
    await deliver_all(resources, datetime.now(UTC))
    assert [request["status"] for request in await requests_to(fake_stripe, STREAM)][:2] == [200, 400]
    assert await read_all(resources, STATES) == [("sent", 9)]
    assert len(await taken_by_stripe(fake_stripe)) == 9
    reasons = "SELECT reason FROM usage_deliveries WHERE customer IN ('cus_3', 'cus_5')"
    assert await read_all(resources, reasons) == [(None,), (None,)]


async def test_a_stream_request_that_was_taken_without_an_answer_is_sent_once(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    (await fake_stripe.control.post("/_fake/settings", json={"stream_refuses_repeats": True})).raise_for_status()
    await make_streamed(resources, fake_stripe, 5)
    await misbehave(fake_stripe, "timeout_after", path=STREAM, seconds=0)
    await deliver(resources, datetime.now(UTC))
    await deliver(resources, await next_due(resources))
    assert await read_all(resources, "SELECT DISTINCT state, reason, unknown_since FROM usage_deliveries") == [
        ("sent", "repeat", None)
    ]
    assert len(await taken_by_stripe(fake_stripe)) == 5


async def test_the_streams_rate_is_its_own(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_streamed(resources, fake_stripe, 12)
    settings = {"stripe_stream_events_per_second": 10, "stripe_calls_per_second": 1}
    slow = dataclasses.replace(resources, settings=resources.settings.model_copy(update=settings))
    assert 10 <= await deliver(slow, datetime.now(UTC)) <= 11
    await deliver_all(slow, datetime.now(UTC))
    assert await read_all(resources, STATES) == [("sent", 12)]


# Usage records


async def make_recorded(resources: Resources, fake: FakeStripe, folder: Path, *values: str) -> tuple[Resources, str]:
    """A customer whose usage is told by usage records, with a delivery for each value, all of one bucket; the item."""
    old = {"Authorization": "Bearer sk_test_1", "Stripe-Version": "2025-02-24.acacia"}
    product = await fake.client.v1.products.create_async({"name": "Calls"})
    form = {
        "currency": "usd",
        "unit_amount": "1",
        "product": product.id,
        "recurring[interval]": "month",
        "recurring[usage_type]": "metered",
    }
    price = (await fake.control.post("/v1/prices", data=form, headers=old)).json()["id"]
    customer = await make_deliveries(resources, fake, *values[:1])
    subscription = await fake.client.v1.subscriptions.create_async({"customer": customer, "items": [{"price": price}]})
    item = subscription["items"].data[0]
    await run(resources, "INSERT INTO prices (id) VALUES (:price)", price=price)
    await run(
        resources,
        "INSERT INTO billing_periods (item, price, period_start, period_end, subscription, customer)"
        " VALUES (:item, :price, :start, :end, 'sub_' || CAST(:customer AS text), :customer)",
        item=item.id,
        price=price,
        start=datetime.fromtimestamp(item.current_period_start, UTC),
        end=datetime.fromtimestamp(item.current_period_end, UTC),
        customer=customer,
    )
    # The subscription began just now, and Stripe takes usage of its present period only.
    at = item.current_period_start
    for number, value in enumerate(values[1:]):
        async with db.transaction(resources.engine) as connection:
            event = make_event(f"more-{number}", at=last_hour(), value=value)
            await record_events(connection, [event], accepted_already=True)
        await seal_everything(resources, datetime.now(UTC))
    await run(resources, "UPDATE usage_deliveries SET sender = 'usage_records', timestamp = :at", at=at)
    rules = folder / "rules.toml"
    rules.write_text(f'[meters.{METER}]\nsender = "usage_records"\nprice = "{price}"\n')
    return dataclasses.replace(resources, rules=RulesFile(rules)), item.id


async def recorded_by_stripe(fake: FakeStripe, item: str) -> int:
    headers = {"Authorization": "Bearer sk_test_1", "Stripe-Version": "2025-02-24.acacia"}
    answer = await fake.control.get(f"/v1/subscription_items/{item}/usage_record_summaries", headers=headers)
    return int(answer.json()["data"][0]["total_usage"])


async def test_usage_records_set_the_running_quantity_of_the_bucket(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path
) -> None:
    recording, item = await make_recorded(resources, fake_stripe, tmp_path, "5", "7", "-2")
    await deliver_all(recording, datetime.now(UTC))
    assert await read_all(resources, STATES) == [("sent", 3)]
    assert await recorded_by_stripe(fake_stripe, item) == 10
    assert (await conservation(resources)).sent == Decimal(10)


@pytest.mark.parametrize("kind", ["timeout_after", "error_500_after", "drop_before"])
async def test_a_usage_record_whose_answer_was_lost_is_said_again_and_counts_once(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path, kind: str
) -> None:
    recording, item = await make_recorded(resources, fake_stripe, tmp_path, "5", "7")
    fault = {"kind": kind, "path": "/v1/subscription_items/*", "times": 1, "seconds": 0}
    (await fake_stripe.control.post("/_fake/faults", json=fault)).raise_for_status()
    await deliver(recording, datetime.now(UTC))
    # Days later, too: setting what is set already is harmless.
    await deliver_all(recording, datetime.now(UTC) + timedelta(days=2))
    assert await read_all(resources, STATES) == [("sent", 2)]
    assert await recorded_by_stripe(fake_stripe, item) == 12


async def test_a_usage_record_without_an_item_or_of_a_part_is_parked_by_name(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path
) -> None:
    recording, _ = await make_recorded(resources, fake_stripe, tmp_path, "5", "0.5")
    await deliver_all(recording, datetime.now(UTC))
    await run(resources, "DELETE FROM billing_periods")
    await run(resources, "UPDATE usage_deliveries SET state = 'pending', next_attempt_at = now() WHERE value = 5")
    await deliver_all(recording, datetime.now(UTC))
    assert await read_all(resources, "SELECT value, state, reason FROM usage_deliveries ORDER BY value") == [
        (Decimal("0.5"), "parked", "not_a_whole_number"),
        (Decimal(5), "parked", "no_subscription_item"),
    ]


async def test_a_usage_record_that_is_refused_after_a_try_without_an_answer_can_be_said_again(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path
) -> None:
    recording, item = await make_recorded(resources, fake_stripe, tmp_path, "5")
    await misbehave(fake_stripe, "timeout_after", path="/v1/subscription_items/*", seconds=0)
    await deliver(recording, datetime.now(UTC))
    await run(resources, "UPDATE billing_periods SET customer = 'cus_gone'")
    await deliver_all(recording, datetime.now(UTC) + timedelta(seconds=5))
    ((identifier, *parked),) = await read_all(resources, "SELECT identifier, state, reason FROM usage_deliveries")
    assert parked == ["parked", "no_subscription_item"]
    rules = recording.rules.current(datetime.now(UTC))
    # In another period it would be billed beside what the first try may have set.
    await run(resources, "UPDATE usage_deliveries SET timestamp = 0")
    async with db.transaction(resources.engine) as connection:
        (decision,) = await resend(connection, [str(identifier)], rules, datetime.now(UTC), by="a test", carried=True)
        assert decision.refused == "cannot_be_carried"
    await run(
        resources,
        "UPDATE usage_deliveries d SET timestamp = extract(epoch FROM p.period_start)  FROM billing_periods p",
    )
    async with db.transaction(resources.engine) as connection:
        (decision,) = await resend(connection, [str(identifier)], rules, datetime.now(UTC), by="a test", carried=False)
        assert decision.refused is None
    await run(resources, "UPDATE billing_periods SET customer = s.customer FROM subscriptions s")
    await deliver_all(recording, datetime.now(UTC))
    assert await read_all(resources, STATES) == [("sent", 1)]
    assert await recorded_by_stripe(fake_stripe, item) == 5


async def test_a_usage_record_of_a_period_that_is_over_is_parked_by_name(
    resources: Resources, fake_stripe: FakeStripe, tmp_path: Path
) -> None:
    recording, _ = await make_recorded(resources, fake_stripe, tmp_path, "5")
    await run(resources, "UPDATE usage_deliveries SET timestamp = timestamp - 3600")
    await run(resources, "UPDATE billing_periods SET period_start = period_start - interval '1 day'")
    await deliver_all(recording, datetime.now(UTC))
    assert await read_all(resources, "SELECT state, reason FROM usage_deliveries") == [("parked", "period_closed")]


async def test_a_customer_and_meter_has_one_delivery_on_its_way_whichever_sender_it_has(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1", "2")
    await run(resources, "UPDATE usage_deliveries SET sender = 'meter_event_stream' WHERE value = 2")
    await misbehave(fake_stripe, "slow", seconds="0.1", path="/v[12]/billing/meter_event[s_]*")
    assert await deliver(resources, datetime.now(UTC)) == 1
    assert await deliver_all(resources, datetime.now(UTC)) == 1


async def test_a_sender_is_served_while_another_is_busy(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_streamed(resources, fake_stripe, 2)
    await run(resources, "UPDATE usage_deliveries SET sender = 'meter_events' WHERE customer <> 'cus_1'")
    await run(resources, "UPDATE usage_deliveries SET next_attempt_at = 'infinity' WHERE customer = 'cus_1'")
    answered = asyncio.Event()

    async def take_long(*arguments: Any, **named: Any) -> list[Outcome]:
        await answered.wait()
        return await send_meter_events(*arguments, **named)

    monkeypatch.setattr(delivery, "send_meter_events", take_long)

    async def has(streamed: str, called: str) -> bool:
        states = await read_all(resources, "SELECT sender, state FROM usage_deliveries ORDER BY sender")
        return states == [("meter_event_stream", streamed), ("meter_events", called)]

    stop = asyncio.Event()
    loops = [dataclasses.replace(loop, every_seconds=0.02) for loop in LOOPS if loop.name.startswith("deliver")]
    working = asyncio.create_task(run_loops(resources, loops, stop))
    try:
        await wait_until(lambda: has("pending", "sending"))
        await run(resources, "UPDATE usage_deliveries SET next_attempt_at = now() WHERE customer = 'cus_1'")
        await wait_until(lambda: has("sent", "sending"))
    finally:
        stop.set()
        answered.set()
        await working
