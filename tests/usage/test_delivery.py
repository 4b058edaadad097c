import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Literal

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tallystick import db
from tallystick.resources import Resources, open_resources
from tallystick.usage import delivery
from tallystick.usage.agreement import LAG
from tallystick.usage.delivery import CHOOSE, SETTLE, backoff, deliver, deliver_all, lease
from tallystick.usage.late import UNKNOWN_FOR_AT_MOST
from tallystick.usage.ledger import record_events
from tallystick.usage.meters import refresh_meters
from tallystick.usage.parts import OLDEST_TO_SEND
from tallystick.usage.rates import wait_to_ask
from tallystick.usage.reconciliation import reconcile_sent
from tallystick.usage.sealing import seal_everything
from tallystick.usage.senders.meter_events import send_meter_events
from tests.conftest import FakeStripe
from tests.usage.making import (
    METER,
    conservation,
    count_looks,
    last_hour,
    make_customer,
    make_event,
    make_meter,
    nodes_of,
    read_all,
    run,
)
from tests.waiting import wait_until

Formula = Literal["sum", "count", "last"]

STATES = "SELECT state, count(*) FROM usage_deliveries GROUP BY state ORDER BY state"


async def make_deliveries(
    resources: Resources, fake: FakeStripe, *values: str, customer: str | None = None, formula: Formula = "sum"
) -> str:
    """One sealed delivery an hour with these values, for a customer that the fake Stripe knows; the customer's id."""
    now = datetime.now(UTC)
    if customer is None:
        await fake.client.v1.billing.meters.create_async(
            {"display_name": "API", "event_name": METER, "default_aggregation": {"formula": formula}}
        )
        await refresh_meters(resources, now)
        customer = (await fake.client.v1.customers.create_async({})).id
        await make_customer(resources, customer=customer)
    events = [make_event(f"e{n}", at=last_hour() - timedelta(hours=n), value=value) for n, value in enumerate(values)]
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)
    await seal_everything(resources, now)
    return customer


async def misbehave(fake: FakeStripe, kind: str, times: int | None = 1, **more: object) -> None:
    rule = {"method": "POST", "path": "/v1/billing/meter_events", "kind": kind, "times": times} | more
    (await fake.control.post("/_fake/faults", json=rule)).raise_for_status()


async def taken_by_stripe(fake: FakeStripe) -> list[tuple[str, Decimal]]:
    events = (await fake.control.get("/_fake/meter_events")).json()["meter_events"]
    return [(event["identifier"], Decimal(event["value"])) for event in events]


async def next_due(resources: Resources) -> datetime:
    """A moment at which whatever is to be retried is due."""
    ((at,),) = await read_all(resources, "SELECT max(greatest(next_attempt_at, lease_until)) FROM usage_deliveries")
    assert isinstance(at, datetime)
    return at + timedelta(seconds=1)


async def test_what_was_sealed_is_sent_once(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1.5", "2", "0.000000000001")
    now = datetime.now(UTC)
    assert await deliver_all(resources, now) == 3
    assert await deliver_all(resources, now) == 0
    assert sorted(value for _, value in await taken_by_stripe(fake_stripe)) == [
        Decimal("0.000000000001"),
        Decimal("1.5"),
        Decimal(2),
    ]
    assert (await conservation(resources)).sent == Decimal("3.500000000001")


async def test_a_call_that_timed_out_after_stripe_did_the_work_is_repeated_and_counts_once(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    await deliver(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT state, unknown_since IS NOT NULL FROM usage_deliveries") == [
        ("pending", True)
    ]
    await deliver(resources, await next_due(resources))
    assert [value for _, value in await taken_by_stripe(fake_stripe)] == [Decimal(5)]
    assert await read_all(resources, "SELECT state, reason, attempts FROM usage_deliveries") == [("sent", "repeat", 2)]


@pytest.mark.parametrize("kind", ["error_500", "rate_limit", "drop_before"])
async def test_what_stripe_could_not_take_is_tried_again_with_the_same_words(
    resources: Resources, fake_stripe: FakeStripe, kind: str
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await misbehave(fake_stripe, kind, times=2)
    for _ in range(3):
        await deliver(resources, await next_due(resources))
    assert await read_all(resources, "SELECT state, attempts FROM usage_deliveries") == [("sent", 3)]
    requests = [
        request
        for request in (await fake_stripe.control.get("/_fake/requests")).json()["requests"]
        if request["path"] == "/v1/billing/meter_events"
    ]
    assert len({str(request["params"]) for request in requests}) == 1
    keys = [request["idempotency_key"] for request in requests]
    assert len(set(keys)) == len(keys), "an answer that Stripe cached under an old key would be replayed"


async def test_a_refusal_is_parked_with_stripes_reason_and_does_not_stop_the_others(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5", "6")
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("UPDATE usage_deliveries SET event_name = 'gone', payload = '{}' WHERE value = 5")
        )
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [("parked", 1), ("sent", 1)]
    ((reason,),) = await read_all(resources, "SELECT reason FROM usage_deliveries WHERE state = 'parked'")
    assert reason
    counted = await conservation(resources)
    assert (counted.parked, counted.sent) == (Decimal(5), Decimal(6))


async def test_one_delivery_of_a_customer_and_meter_is_on_its_way_at_a_time(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1", "2", "3")
    now = datetime.now(UTC)
    assert await deliver(resources, now) == 1
    assert sum(await asyncio.gather(*(deliver(resources, now) for _ in range(4)))) <= 2
    await deliver_all(resources, now)
    assert await read_all(resources, STATES) == [("sent", 3)]


async def is_sending(resources: Resources) -> bool:
    return await read_all(resources, STATES) == [("sending", 1)]


async def test_a_worker_that_died_while_sending_is_replaced_after_its_lease(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    now = datetime.now(UTC)
    await misbehave(fake_stripe, "slow", seconds="0.3")
    dies = asyncio.create_task(deliver(resources, now))
    await wait_until(lambda: is_sending(resources))
    dies.cancel()
    await asyncio.gather(dies, return_exceptions=True)
    assert await deliver(resources, now + lease(resources.settings) - timedelta(seconds=1)) == 0
    assert await deliver(resources, now + lease(resources.settings)) == 1
    while await read_all(resources, STATES) != [("sent", 1)]:
        # Stripe may still be busy with the call whose caller has died.
        await deliver(resources, await next_due(resources))
    assert len(await taken_by_stripe(fake_stripe)) == 1
    assert (await conservation(resources)).sent == 1


@pytest.mark.parametrize("minutes", range(0, 60, 15))
async def test_what_stripe_still_takes_is_sent_as_late_in_its_hour_as_need_be(
    resources: Resources, fake_stripe: FakeStripe, minutes: int
) -> None:
    """Sealed when the hour's beginning is too old already, and its end is not."""
    await make_deliveries(resources, fake_stripe)
    start = last_hour(0) - timedelta(days=33)
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, [make_event(at=start + timedelta(minutes=30))], accepted_already=True)
    now = start + OLDEST_TO_SEND + timedelta(minutes=minutes)
    await seal_everything(resources, now)
    await deliver_all(resources, now)
    assert await read_all(resources, "SELECT state, reason FROM usage_deliveries") == [("sent", None)]


async def test_an_outcome_unknown_for_too_long_is_not_sent_again(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    now = datetime.now(UTC)
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    await deliver(resources, now)
    await deliver(resources, now + UNKNOWN_FOR_AT_MOST)
    assert await read_all(resources, "SELECT state, reason FROM usage_deliveries") == [("parked", "outcome_unknown")]
    assert len(await taken_by_stripe(fake_stripe)) == 1


async def test_refusals_do_not_start_the_clock_of_the_unknown(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    now = datetime.now(UTC)
    await misbehave(fake_stripe, "rate_limit")
    await deliver(resources, now)
    await deliver(resources, now + timedelta(days=2))
    assert await read_all(resources, STATES) == [("sent", 1)]


async def test_the_rate_limit_is_shared_by_all_workers(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    now = datetime.now(UTC)
    for n in range(6):
        customer = (await fake_stripe.client.v1.customers.create_async({})).id
        await make_customer(resources, ref=f"other-{n}", customer=customer)
        async with db.transaction(resources.engine) as connection:
            event = make_event(f"other-{n}", at=last_hour(), customer_ref=f"other-{n}")
            await record_events(connection, [event], accepted_already=True)
    await seal_everything(resources, now)
    slow = dataclasses.replace(resources, settings=resources.settings.model_copy(update={"stripe_calls_per_second": 3}))
    tried = await asyncio.gather(deliver(slow, now), deliver(slow, now))
    # Three tokens at first, and whatever a slow machine lets grow back between the two claims.
    assert 3 <= sum(tried) <= 6
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("UPDATE rate_limits SET tokens = 0, refilled_at = clock_timestamp()"))
    assert await deliver(slow, now) <= 1
    assert await deliver_all(resources, now) >= 1
    assert await read_all(resources, STATES) == [("sent", 7)]


@pytest.mark.parametrize("tokens", [0, 80])
async def test_a_clock_of_postgresql_that_is_set_back_stops_nothing(
    resources: Resources, fake_stripe: FakeStripe, tokens: int
) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    await run(
        resources,
        "INSERT INTO rate_limits VALUES ('stripe', :tokens, clock_timestamp() + interval '1 hour')",
        tokens=tokens,
    )
    async with asyncio.timeout(5):
        assert await deliver_all(resources, datetime.now(UTC)) == 1
        await wait_to_ask(resources)


async def test_every_try_is_recorded_and_its_key_names_the_delivery(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    for kind in ("rate_limit", "timeout_after"):
        await misbehave(fake_stripe, kind, seconds=0)
    now = datetime.now(UTC)
    for _ in range(3):
        await deliver(resources, max(now, await next_due(resources)))
    assert await read_all(
        resources,
        "SELECT attempt, outcome, reason, http_status, starts_with(request_id, 'req_')"
        "  FROM usage_delivery_attempts ORDER BY attempt",
    ) == [
        (1, "retry", "rate_limit", 429, True),
        (2, "retry", "ServerDisconnectedError", None, None),
        (3, "sent", "repeat", 400, True),
    ]
    requests = (await fake_stripe.control.get("/_fake/requests")).json()["requests"]
    keys = [each["idempotency_key"] for each in reversed(requests) if each["path"] == "/v1/billing/meter_events"]
    ((identifier,),) = await read_all(resources, "SELECT identifier FROM usage_deliveries")
    assert [re.sub("[0-9a-f]{4}$", "", key) for key in keys] == [f"{identifier}.{number}." for number in (1, 2, 3)]


async def test_two_workers_at_once_send_each_delivery_once_and_never_get_into_each_others_way(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, *"12345")
    for n in range(4):
        customer = (await fake_stripe.client.v1.customers.create_async({})).id
        await make_customer(resources, ref=f"other-{n}", customer=customer)
        events = [
            make_event(f"{n}-{hour}", at=last_hour() - timedelta(hours=hour), customer_ref=f"other-{n}")
            for hour in range(5)
        ]
        async with db.transaction(resources.engine) as connection:
            await record_events(connection, events, accepted_already=True)
    await seal_everything(resources, datetime.now(UTC))
    await fake_stripe.control.post("/_fake/settings", json={"meter_event_milliseconds": 5})
    async with open_resources(resources.settings, application_name="tests") as other:
        now = datetime.now(UTC)
        sent = await asyncio.gather(deliver_all(resources, now), deliver_all(other, now))
        await deliver_all(resources, datetime.now(UTC))
    assert sum(sent) == 25
    assert len(await taken_by_stripe(fake_stripe)) == 25
    requests = (await fake_stripe.control.get("/_fake/requests")).json()["requests"]
    assert {each["status"] for each in requests if each["path"] == "/v1/billing/meter_events"} == {200}


async def test_claims_wait_for_each_other_whichever_rate_limit_they_take_from(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1")

    async def waits() -> bool:
        waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
        return await read_all(resources, waiting) == [(True,)]

    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": delivery.CLAIM_LOCK})
        claiming = asyncio.create_task(deliver_all(resources, datetime.now(UTC)))
        await wait_until(waits)
        assert await read_all(resources, STATES) == [("pending", 1)]
    assert await claiming == 1


class Killed(BaseException):
    """What a kill is to the code that it strikes: no handler runs."""


@pytest.mark.parametrize("step", range(6))
async def test_a_worker_that_dies_at_any_step_leaves_exactly_one_effect(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before and after the commit of the claim, the call, and the commit of what became of it."""
    await make_deliveries(resources, fake_stripe, "7")
    passed = 0

    def pass_step() -> None:
        nonlocal passed
        passed += 1
        if passed == step + 1:
            raise Killed

    @asynccontextmanager
    async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        async with engine.begin() as connection:
            yield connection
            pass_step()
        pass_step()

    send = send_meter_events

    async def send_and_die(*args: object, **more: object) -> object:
        pass_step()
        outcomes = await send(*args, **more)  # type: ignore[arg-type]
        pass_step()
        return outcomes

    monkeypatch.setattr(delivery, "SENDERS", ("meter_events",))
    monkeypatch.setattr(delivery, "send_meter_events", send_and_die)
    monkeypatch.setattr(db, "transaction", transaction)
    with pytest.raises(Killed):
        await deliver(resources, datetime.now(UTC))
    monkeypatch.undo()
    await deliver_all(resources, await next_due(resources))
    assert [value for _, value in await taken_by_stripe(fake_stripe)] == [Decimal(7)]
    assert await read_all(resources, STATES) == [("sent", 1)]
    assert (await conservation(resources)).sent == 7


async def test_what_could_not_reach_stripe_for_a_day_is_sent_afterwards_once(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1", "2", "3")
    nowhere = resources.settings.model_copy(update={"stripe_api_base": "http://127.0.0.1:1"})
    now = datetime.now(UTC)
    async with open_resources(nowhere, application_name="tests") as cut_off:
        for hour in range(0, 26, 5):
            assert await deliver_all(cut_off, now + timedelta(hours=hour)) == 3
    assert await read_all(resources, "SELECT DISTINCT state, reason FROM usage_deliveries") == [
        ("pending", "ClientConnectorError")
    ]
    assert await deliver_all(resources, now + timedelta(hours=26)) == 3
    assert sorted(value for _, value in await taken_by_stripe(fake_stripe)) == [1, 2, 3]


async def test_what_stripe_did_not_answer_for_a_day_is_settled_by_its_summaries(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1", "2")
    now = datetime.now(UTC)
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    await misbehave(fake_stripe, "drop_before", times=None)
    for hour in range(0, 26, 5):
        await deliver_all(resources, now + timedelta(hours=hour))
    assert await read_all(resources, "SELECT DISTINCT state, reason FROM usage_deliveries") == [
        ("parked", "outcome_unknown")
    ]
    await fake_stripe.control.delete("/_fake/faults")
    later = now + timedelta(hours=26) + LAG
    await reconcile_sent(resources, later)
    assert await deliver_all(resources, later) == 1
    assert sorted(value for _, value in await taken_by_stripe(fake_stripe)) == [1, 2]


async def test_deliveries_of_a_last_meter_end_right_in_any_order(resources: Resources, fake_stripe: FakeStripe) -> None:
    customer = await make_deliveries(resources, fake_stripe, "5", "9", "7", formula="last")
    # The latest value goes out first, and the oldest last.
    await run(
        resources, "UPDATE usage_deliveries SET next_attempt_at = now() - make_interval(secs => timestamp / 3600)"
    )
    await deliver_all(resources, datetime.now(UTC))
    assert [value for _, value in await taken_by_stripe(fake_stripe)] == [5, 9, 7]
    (meter,) = await read_all(resources, "SELECT id FROM meters")
    end = last_hour(0) + timedelta(hours=1)
    (summary,) = (
        await fake_stripe.client.v1.billing.meters.event_summaries.list_async(
            str(meter[0]),
            {
                "customer": customer,
                "start_time": int((end - timedelta(days=1)).timestamp()),
                "end_time": int(end.timestamp()),
            },
        )
    ).data
    assert summary.aggregated_value == 5


async def test_a_long_run_goes_round_all_customers(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(delivery.PER_CLAIM, "meter_events", 2)
    monkeypatch.setattr(delivery, "CLAIMS_AT_ONCE", 1)
    await make_deliveries(resources, fake_stripe, "1", "2", "3")
    for n in range(4):
        await make_customer(resources, ref=f"other-{n}", customer=f"cus_zz{n}")
        async with db.transaction(resources.engine) as connection:
            event = make_event(f"other-{n}", at=last_hour(), customer_ref=f"other-{n}")
            await record_events(connection, [event], accepted_already=True)
    await seal_everything(resources, datetime.now(UTC))
    assert await deliver_all(resources, datetime.now(UTC)) == 7
    rows = await read_all(resources, "SELECT customer FROM usage_deliveries ORDER BY settled_at, customer")
    customers = [row[0] for row in rows]
    assert len(set(customers[:5])) == 5, "none waits while another is served twice"


async def test_a_claim_looks_at_what_it_takes_and_not_at_all_that_waits(resources: Resources) -> None:
    async with db.transaction(resources.engine) as connection:
        refs = [f"c{n}" for n in range(40)]
        events = [make_event(ref, at=last_hour(), customer_ref=ref) for ref in refs]
        await record_events(connection, events, accepted_already=True)
    await make_meter(resources)
    for ref in refs:
        await make_customer(resources, ref=ref, customer=f"cus_{ref}")
    await seal_everything(resources, datetime.now(UTC))
    parameters = {"sender": "meter_events", "now": datetime.now(UTC), "limit": 3, "customer": "", "event_name": ""}
    async with db.transaction(resources.engine) as connection:
        # As it is planned when many wait and many are on their way: what can be joined as a whole is.
        await connection.execute(text("SET LOCAL enable_nestloop = off"))
        explained = await connection.execute(text(f"EXPLAIN (ANALYZE, FORMAT JSON) {CHOOSE.text}"), parameters)
        (plan,) = explained.scalar_one()
    walked = [node["Actual Rows"] for node in nodes_of(plan["Plan"]) if node["Node Type"] == "Recursive Union"]
    assert walked == [3]


async def test_a_settlement_begins_with_its_deliveries_whatever_the_statistics_say(
    resources: Resources,
) -> None:
    number = 1_000
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, [make_event(at=last_hour())], accepted_already=True)
        await connection.execute(
            text("""
                INSERT INTO usage_deliveries (total_id, opened_seal, seal, customer, event_name, identifier, payload,
                                              value, timestamp, state)
                SELECT t.id, n, n, 'cus_' || n, 'm', 'i' || n, '{}', 1, 1, 'sent'
                  FROM usage_totals t, generate_series(1, 20 * :number) n
            """),
            {"number": number},
        )
        await connection.execute(text("ANALYZE usage_deliveries"))
    now = datetime.now(UTC)
    ids = [id for (id,) in await read_all(resources, "SELECT id FROM usage_deliveries ORDER BY id")][:number]
    columns = dict.fromkeys(("reason", "unknown_since", "said", "request_id"), [None] * number)
    settlement = columns | {"id": ids, "attempts": [1] * number, "state": ["sent"] * number}
    settlement |= {"next_attempt_at": [now] * number, "outcome": ["sent"] * number, "http_status": [200] * number}
    settlement |= {"at": now, "settled_at": now}
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("UPDATE usage_deliveries SET state = 'sending', attempts = 1"))
        assert await count_looks(connection, SETTLE.text, settlement) == number
        await connection.rollback()


def test_the_wait_between_tries_grows_to_five_minutes() -> None:
    assert timedelta(seconds=1) <= backoff(1) <= timedelta(seconds=2)
    assert timedelta(seconds=150) <= backoff(50) <= timedelta(seconds=300)
