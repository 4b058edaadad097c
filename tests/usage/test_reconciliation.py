import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tallystick.metrics import DRIFTS_OPEN, UNCONFIRMED_DELIVERIES
from tallystick.resources import Resources
from tallystick.usage import reconciliation
from tallystick.usage.agreement import LAG
from tallystick.usage.board import measure_periods
from tallystick.usage.delivery import deliver as deliver_once
from tallystick.usage.delivery import deliver_all
from tallystick.usage.meters import refresh_meters
from tallystick.usage.rates import wait_to_ask
from tallystick.usage.reconciliation import ASK_AFTER, ASK_AFTER_WITH_DRAFT, LEASE, reconcile_sent
from tests.conftest import FakeStripe
from tests.usage.making import METER, conservation, last_hour, make_customer, make_invoice, make_period, read_all, run
from tests.usage.test_delivery import make_deliveries
from tests.waiting import wait_until

STATES = "SELECT value, state, reason FROM usage_deliveries ORDER BY value"
DRIFTS = "SELECT ours, stripes, resolved_at IS NOT NULL FROM usage_drifts"


async def configure(fake: FakeStripe, **settings: int) -> None:
    (await fake.control.post("/_fake/settings", json=settings)).raise_for_status()


async def count_questions(fake: FakeStripe) -> int:
    requests = (await fake.control.get("/_fake/requests")).json()["requests"]
    return sum(request["path"].endswith("event_summaries") for request in requests)


async def deliver(resources: Resources) -> datetime:
    """Send what was sealed; when it was settled."""
    await deliver_all(resources, datetime.now(UTC))
    return datetime.now(UTC)


async def lose(fake: FakeStripe, resources: Resources, value: int) -> None:
    """Stripe no longer has what it took."""
    found = {row[0]: str(row[1]) for row in await read_all(resources, "SELECT value, identifier FROM usage_deliveries")}
    await fake.client.v1.billing.meter_event_adjustments.create_async(
        {"event_name": METER, "type": "cancel", "cancel": {"identifier": found[Decimal(value)]}}
    )


async def test_what_stripes_summaries_show_is_confirmed(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1.5", "2", "123456789012345")
    now = await deliver(resources)
    assert await reconcile_sent(resources, now + ASK_AFTER - timedelta(seconds=1)) == 0
    assert await reconcile_sent(resources, now + ASK_AFTER) == 1
    counted = await conservation(resources)
    assert (counted.sent, counted.confirmed) == (Decimal(0), Decimal("123456789012348.5"))
    assert await reconcile_sent(resources, now + LAG) == 0, "there is nothing left to ask about"


async def test_a_summary_that_lags_is_waited_for(resources: Resources, fake_stripe: FakeStripe) -> None:
    await configure(fake_stripe, summary_lag_seconds=3600)
    await make_deliveries(resources, fake_stripe, "5")
    now = await deliver(resources)
    for wait in (ASK_AFTER, LAG - timedelta(seconds=1)):
        assert await reconcile_sent(resources, now + wait) == 1
        assert await read_all(resources, STATES) == [(5, "sent", None)]
        assert await read_all(resources, DRIFTS) == []
    await configure(fake_stripe, summary_lag_seconds=0)
    assert await reconcile_sent(resources, now + LAG) == 0, "it was asked for a second ago"
    assert await reconcile_sent(resources, now + LAG + timedelta(hours=1)) == 1
    assert await read_all(resources, STATES) == [(5, "confirmed", None)]


async def test_usage_that_stripe_lost_is_a_drift_until_both_agree_again(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    customer = await make_deliveries(resources, fake_stripe, "5", "7")
    now = await deliver(resources)
    await lose(fake_stripe, resources, 5)
    await reconcile_sent(resources, now + LAG)
    assert await read_all(resources, STATES) == [(5, "sent", None), (7, "confirmed", None)]
    assert await read_all(resources, DRIFTS) == [(5, 0, False)]
    await measure_periods(resources, now + LAG + timedelta(seconds=1))
    assert (DRIFTS_OPEN._value.get(), UNCONFIRMED_DELIVERIES._value.get()) == (1, 1)

    ((timestamp,),) = await read_all(resources, "SELECT timestamp FROM usage_deliveries WHERE value = 5")
    again = {"stripe_customer_id": customer, "value": "5"}
    await fake_stripe.client.v1.billing.meter_events.create_async(
        {"event_name": METER, "payload": again, "timestamp": int(str(timestamp))}
    )
    await reconcile_sent(resources, now + LAG + timedelta(hours=2))
    assert await read_all(resources, DRIFTS) == [(5, 0, True)]
    assert await read_all(resources, STATES) == [(5, "confirmed", None), (7, "confirmed", None)]


async def test_usage_that_we_never_sent_is_a_drift(resources: Resources, fake_stripe: FakeStripe) -> None:
    customer = await make_deliveries(resources, fake_stripe, "5")
    now = await deliver(resources)
    foreign = {"stripe_customer_id": customer, "value": "0.5"}
    at = int(last_hour(0).timestamp())
    await fake_stripe.client.v1.billing.meter_events.create_async(
        {"event_name": METER, "payload": foreign, "timestamp": at}
    )
    await reconcile_sent(resources, now + LAG)
    assert await read_all(resources, DRIFTS) == [(5, Decimal("5.5"), False)]


async def make_unknown(resources: Resources, fake: FakeStripe, *taken: str, lost: str) -> datetime:
    """Deliveries with an unknown outcome, of one hour; Stripe took all but `lost`. When they were given up."""
    await make_deliveries(resources, fake, *taken, lost)
    await run(
        resources, "UPDATE usage_deliveries SET next_attempt_at = 'infinity' WHERE value = :lost", lost=Decimal(lost)
    )
    hour = int(last_hour(0).timestamp())
    await run(resources, "UPDATE usage_deliveries SET timestamp = :hour", hour=hour)
    now = await deliver(resources)
    await run(
        resources,
        "UPDATE usage_deliveries"
        " SET state = 'parked', reason = 'outcome_unknown', unknown_since = :now, settled_at = :now",
        now=now,
    )
    return now


async def test_what_nobody_knew_the_outcome_of_is_settled_by_the_summary(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    given_up = await make_unknown(resources, fake_stripe, "5", "8", lost="7")
    await reconcile_sent(resources, given_up + timedelta(hours=1))
    assert {state for _, state, _ in await read_all(resources, STATES)} == {"parked"}, "the summary may lag"
    later = given_up + LAG + timedelta(hours=1)
    await reconcile_sent(resources, later)
    assert await read_all(resources, STATES) == [
        (5, "confirmed", "found_in_summary"),
        (7, "pending", "not_in_summary"),
        (8, "confirmed", "found_in_summary"),
    ]
    await deliver_all(resources, later)
    await reconcile_sent(resources, later + 2 * ASK_AFTER)
    counted = await conservation(resources)
    assert (counted.confirmed, counted.parked) == (Decimal(20), Decimal(0))


async def test_an_outcome_that_two_selections_would_explain_stays_unknown_with_a_drift(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    given_up = await make_unknown(resources, fake_stripe, "2", "3", lost="5")
    await reconcile_sent(resources, given_up + LAG)
    assert {state for _, state, _ in await read_all(resources, STATES)} == {"parked"}
    assert await read_all(resources, DRIFTS) == [(0, 5, False)]


async def test_what_all_of_the_unknown_ones_explain_is_settled_at_once(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    given_up = await make_unknown(resources, fake_stripe, "2", "3", lost="5")
    await run(resources, "UPDATE usage_deliveries SET state = 'voided', reason = NULL WHERE value = 5")
    await reconcile_sent(resources, given_up + ASK_AFTER)
    assert [state for _, state, _ in await read_all(resources, STATES)] == ["confirmed", "confirmed", "voided"]


async def test_a_compensation_that_lags_does_not_make_lost_usage_look_found(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    customer = await make_deliveries(resources, fake_stripe, "5", "7")
    hour = int(last_hour(0).timestamp())
    await run(resources, "UPDATE usage_deliveries SET timestamp = :hour", hour=hour)
    await run(resources, "UPDATE usage_deliveries SET next_attempt_at = 'infinity' WHERE value = 7")
    now = await deliver(resources)
    await run(
        resources,
        "UPDATE usage_deliveries SET state = 'parked', reason = 'outcome_unknown', unknown_since = :now,"
        " settled_at = :now WHERE value = 7",
        now=now,
    )
    # What takes the 7 back was sent, and Stripe's summary does not show it yet: 5 - 7 + 7 would be Stripe's number.
    await run(
        resources,
        """
        INSERT INTO usage_deliveries (total_id, seal, opened_seal, customer, event_name, identifier, payload, value,
                                      timestamp, state, settled_at)
        SELECT total_id, 9, 9, customer, event_name, 'compensation', payload, -7, timestamp, 'sent', settled_at
          FROM usage_deliveries WHERE value = 5
        """,
    )
    await reconcile_sent(resources, now + ASK_AFTER)
    assert await read_all(resources, STATES) == [
        (-7, "sent", None),
        (5, "sent", None),
        (7, "parked", "outcome_unknown"),
    ]

    await fake_stripe.client.v1.billing.meter_events.create_async(
        {"event_name": METER, "payload": {"stripe_customer_id": customer, "value": "-7"}, "timestamp": hour}
    )
    await reconcile_sent(resources, now + LAG)
    assert await read_all(resources, STATES) == [
        (-7, "confirmed", None),
        (5, "confirmed", None),
        (7, "pending", "not_in_summary"),
    ]


@pytest.mark.parametrize(("formula", "stripes"), [("count", 2), ("last", 4)])
async def test_every_formula_is_compared_by_what_it_means(
    resources: Resources, fake_stripe: FakeStripe, formula: Any, stripes: int
) -> None:
    now = datetime.now(UTC)
    meter = await fake_stripe.client.v1.billing.meters.create_async(
        {"display_name": "M", "event_name": "other", "default_aggregation": {"formula": formula}}
    )
    await refresh_meters(resources, now)
    await make_deliveries(resources, fake_stripe, "9", "4")
    first, second = last_hour(10), last_hour(20)
    await run(
        resources,
        "UPDATE usage_deliveries SET event_name = 'other', aggregation = :formula,"
        " timestamp = CASE value WHEN 9 THEN CAST(:first AS bigint) ELSE :second END",
        formula=formula,
        first=int(first.timestamp()),
        second=int(second.timestamp()),
    )
    now = await deliver(resources)
    await reconcile_sent(resources, now + ASK_AFTER)
    assert await read_all(resources, STATES) == [(4, "confirmed", None), (9, "confirmed", None)]
    await run(resources, "UPDATE usage_deliveries SET state = 'sent', value = 3 WHERE value = 4")
    await run(resources, "DELETE FROM usage_deliveries WHERE value = 9")
    await reconcile_sent(resources, now + LAG)
    assert await read_all(resources, "SELECT stripes FROM usage_drifts") == [(stripes,)]
    assert meter.id


async def test_an_hour_of_which_something_is_on_its_way_is_left_for_later(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5", "7")
    await run(resources, "UPDATE usage_deliveries SET timestamp = :hour", hour=int(last_hour(0).timestamp()))
    now = await deliver(resources)
    await run(resources, "UPDATE usage_deliveries SET state = 'pending', unknown_since = now() WHERE value = 7")
    await reconcile_sent(resources, now + LAG)
    assert await read_all(resources, STATES) == [(5, "sent", None), (7, "pending", None)]
    assert await read_all(resources, DRIFTS) == []


async def test_each_customers_meter_is_asked_for_by_one_worker(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "5", "7")
    now = await deliver(resources)
    later = now + ASK_AFTER
    assert sum(await asyncio.gather(*(reconcile_sent(resources, later) for _ in range(4)))) == 1
    assert await count_questions(fake_stripe) == 1


async def test_a_worker_that_died_while_asking_is_replaced_after_its_lease(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    now = await deliver(resources)
    rule = {"path": "*event_summaries", "kind": "slow", "seconds": "0.3", "times": 1}
    (await fake_stripe.control.post("/_fake/faults", json=rule)).raise_for_status()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reconcile_sent(resources, now + ASK_AFTER), 0.2)
    assert await reconcile_sent(resources, now + ASK_AFTER) == 0
    assert await reconcile_sent(resources, now + ASK_AFTER + LEASE) == 1
    assert await read_all(resources, STATES) == [(5, "confirmed", None)]


async def test_a_question_that_stripe_does_not_answer_is_asked_again(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    now = await deliver(resources)
    rule = {"path": "*event_summaries", "kind": "error_500", "times": 1}
    (await fake_stripe.control.post("/_fake/faults", json=rule)).raise_for_status()
    assert await reconcile_sent(resources, now + ASK_AFTER) == 0
    assert await reconcile_sent(resources, now + 2 * ASK_AFTER) == 1
    assert await read_all(resources, STATES) == [(5, "confirmed", None)]


async def test_more_hours_than_stripe_lists_at_once_are_all_compared(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciliation, "SUMMARIES_PER_PAGE", 2)
    await make_deliveries(resources, fake_stripe, *["1"] * 5)
    now = await deliver(resources)
    await reconcile_sent(resources, now + ASK_AFTER)
    assert (await conservation(resources)).confirmed == 5
    assert await count_questions(fake_stripe) >= 3  # more if a call had to be made again


async def make_deliveries_of_two(resources: Resources, fake: FakeStripe) -> tuple[str, str]:
    """The same delivery for each of two customers; their ids."""
    first = await make_deliveries(resources, fake, "5")
    second = (await fake.client.v1.customers.create_async({})).id
    await make_customer(resources, ref="globex", customer=second)
    await run(
        resources,
        """
        INSERT INTO usage_deliveries (total_id, seal, opened_seal, customer, event_name, identifier, payload, value,
                                      timestamp)
        SELECT total_id, 9, 9, :second, event_name, 'other',
               jsonb_set(payload, '{stripe_customer_id}', to_jsonb(CAST(:second AS text))), value, timestamp
          FROM usage_deliveries
        """,
        second=second,
    )
    return first, second


async def test_a_run_with_a_failure_ends_when_all_that_it_began_has_ended(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    works, fails = await make_deliveries_of_two(resources, fake_stripe)
    now = await deliver(resources)
    # A database that refuses what is written of this customer stands for any bug of ours.
    bug = f"CHECK (customer <> '{fails}' OR checked_at IS NULL)"
    await run(resources, f"ALTER TABLE usage_checks ADD CONSTRAINT a_bug {bug}")
    touch = text("UPDATE usage_deliveries SET value = value WHERE customer = :customer")
    sessions = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"

    async def both_wait() -> bool:
        return await read_all(resources, f"SELECT count(*) {sessions} AND wait_event_type = 'Lock'") == [(2,)]

    async def one_is_left() -> bool:
        busy = f"SELECT count(*) {sessions} AND state <> 'idle'"  # it, and the test's own that holds it up
        return await read_all(resources, busy) == [(2,)]

    try:
        async with resources.engine.connect() as holding, resources.engine.connect() as letting_go:
            await holding.execute(touch, {"customer": works})
            await letting_go.execute(touch, {"customer": fails})
            running = asyncio.create_task(reconcile_sent(resources, now + ASK_AFTER))
            await wait_until(both_wait)
            await letting_go.rollback()
            await wait_until(one_is_left)
            assert not running.done()
            await holding.rollback()
            with pytest.raises(IntegrityError):
                await running
    finally:
        await run(resources, "ALTER TABLE usage_checks DROP CONSTRAINT a_bug")
    confirmed = await read_all(resources, "SELECT customer FROM usage_deliveries WHERE state = 'confirmed'")
    assert confirmed == [(works,)]


async def test_a_customer_with_a_draft_invoice_is_asked_for_first(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    now = datetime.now(UTC)
    waits, ends = await make_deliveries_of_two(resources, fake_stripe)
    await make_period(resources, now - timedelta(days=30), now, customer=ends)
    await make_invoice(resources, customer=ends)
    now = await deliver(resources)
    await reconcile_sent(resources, now + ASK_AFTER_WITH_DRAFT)
    confirmed = await read_all(resources, "SELECT customer FROM usage_deliveries WHERE state = 'confirmed'")
    assert confirmed == [(ends,)]
    assert waits != ends


async def test_each_has_its_turn_though_the_oldest_never_agrees(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciliation, "PAIRS_PER_RUN", 1)
    oldest, _ = await make_deliveries_of_two(resources, fake_stripe)
    now = await deliver(resources)
    await configure(fake_stripe, summary_lag_seconds=3600)
    older = "UPDATE usage_deliveries SET settled_at = settled_at - interval '1 minute' WHERE customer = :customer"
    await run(resources, older, customer=oldest)
    for turn in (1, 2):
        assert await reconcile_sent(resources, now + turn * ASK_AFTER) == 1
    assert await read_all(resources, "SELECT count(*) FROM usage_checks WHERE checked_at IS NOT NULL") == [(2,)]


def limited(resources: Resources, calls_per_second: int) -> Resources:
    settings = resources.settings.model_copy(update={"stripe_calls_per_second": calls_per_second})
    return dataclasses.replace(resources, settings=settings)


async def test_asking_stays_within_the_limit_that_deliveries_have(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    slow = limited(resources, 20)
    await make_deliveries(slow, fake_stripe, "5")
    now = await deliver(slow)
    # Ten are half a second's calls; those that are missing take 0.2 s.
    await run(resources, "UPDATE rate_limits SET tokens = 6, refilled_at = clock_timestamp()")
    began = asyncio.get_running_loop().time()
    assert await reconcile_sent(slow, now + ASK_AFTER) == 1
    assert asyncio.get_running_loop().time() - began > 0.2


@pytest.mark.parametrize("calls_per_second", [1, 2, 20])
async def test_asking_leaves_calls_for_what_is_to_be_told(
    resources: Resources, fake_stripe: FakeStripe, calls_per_second: int
) -> None:
    slow = limited(resources, calls_per_second)
    await make_deliveries(slow, fake_stripe, "5")
    await run(resources, "INSERT INTO rate_limits VALUES ('stripe', 1, clock_timestamp())")
    asking = [asyncio.create_task(wait_to_ask(slow)) for _ in range(reconciliation.CONCURRENCY)]
    try:
        await wait_until(lambda: has_looked(resources))
        assert await deliver_once(slow, datetime.now(UTC)) == 1
        # What telling leaves is asked with.
        await run(resources, "UPDATE rate_limits SET tokens = 20")
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def has_looked(resources: Resources) -> bool:
    """Whether somebody has looked into the bucket and left what is in it."""
    return await read_all(resources, "SELECT tokens > 1 FROM rate_limits") == [(True,)]
