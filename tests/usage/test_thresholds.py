import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tallystick import db
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.usage import thresholds
from tallystick.usage.events import UsageEvent
from tallystick.usage.ledger import record_events
from tallystick.usage.sealing import seal_everything
from tallystick.usage.thresholds import announce_thresholds
from tests.usage.making import METER, make_customer, make_event, make_meter, make_period, read_all, run

TOLD = """
    SELECT customer, data ->> 'threshold', data ->> 'quantity', data ->> 'period_start' FROM notifications
     WHERE type = 'usage.threshold_reached' ORDER BY number
"""
NOW = datetime.now(UTC).replace(microsecond=0)
START = NOW - timedelta(days=3)


@pytest.fixture
async def prepared(resources: Resources) -> Resources:
    """A customer whose period began three days ago, and the one before it; two thresholds."""
    resources.rules.rules = Rules.model_validate({"meters": {METER: {"thresholds": ["10", "20.5"]}}})
    await make_customer(resources, boundaries=(START,))
    await make_meter(resources)
    await make_period(resources, START - timedelta(days=30), START)
    await make_period(resources, START, START + timedelta(days=30))
    return resources


async def record(resources: Resources, *events: UsageEvent) -> None:
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)


async def told(resources: Resources) -> list[tuple[object, object]]:
    await announce_thresholds(resources, datetime.now(UTC))
    return [(threshold, quantity) for _, threshold, quantity, _ in await read_all(resources, TOLD)]


async def test_a_threshold_is_told_once_a_period_when_it_is_reached(prepared: Resources) -> None:
    await record(prepared, make_event("a", value="9.999999999999"))
    assert await told(prepared) == []
    await record(prepared, make_event("b", value="0.000000000001"))
    assert await told(prepared) == [("10", "10")]
    await record(prepared, make_event("c", value="1"))
    assert await told(prepared) == [("10", "10")]
    ((customer, _, _, start),) = await read_all(prepared, TOLD)
    assert (customer, start) == ("cus_acme", START.isoformat())


async def test_several_that_are_reached_at_once_are_told_in_order(prepared: Resources) -> None:
    await record(prepared, make_event(value="100"))
    assert await told(prepared) == [("10", "100"), ("20.5", "100")]


async def test_all_references_of_a_customer_count_together(prepared: Resources) -> None:
    await record(prepared, make_event(value="6"), make_event("e2", value="5", customer_ref="cus_acme"))
    assert await told(prepared) == [("10", "11")]
    await run(prepared, "INSERT INTO customer_links (ref, customer) VALUES ('old-name', 'cus_acme')")
    await record(prepared, make_event("e3", value="9.5", customer_ref="old-name"))
    assert await told(prepared) == [("10", "11"), ("20.5", "20.5")]


async def test_late_usage_counts_in_the_period_that_it_belongs_to(prepared: Resources) -> None:
    await record(prepared, make_event(value="8"), make_event("late", value="12", at=START - timedelta(seconds=1)))
    assert await told(prepared) == [("10", "12")]
    ((_, _, _, start),) = await read_all(prepared, TOLD)
    assert start == (START - timedelta(days=30)).isoformat()


async def test_what_was_sealed_between_two_runs_is_seen(prepared: Resources) -> None:
    await record(prepared, make_event(value="12"))
    await seal_everything(prepared, datetime.now(UTC))
    assert await told(prepared) == [("10", "12")]


async def test_what_was_sealed_while_nobody_looked_is_seen_when_somebody_does(prepared: Resources) -> None:
    await record(prepared, make_event("a", value="8"))
    assert await told(prepared) == []
    await record(prepared, make_event("b", value="4"))
    await seal_everything(prepared, datetime.now(UTC) - timedelta(hours=9))
    assert await told(prepared) == [("10", "12")]
    assert await read_all(prepared, "SELECT count(*) FROM usage_threshold_looks") == [(0,)]


async def test_a_threshold_that_is_declared_in_mid_period_is_told_if_it_was_reached(prepared: Resources) -> None:
    before, without = prepared.rules.rules, Rules.model_validate({"meters": {METER: {}}})
    prepared.rules.rules = without
    await make_customer(prepared, ref="other", customer="cus_other")
    used = [make_event(), make_event("old", at=START - timedelta(hours=1)), make_event("b", customer_ref="other")]
    await record(prepared, *(event._replace(value=Decimal(12)) for event in used))
    await seal_everything(prepared, datetime.now(UTC))
    assert await told(prepared) == []
    prepared.rules.rules = before
    assert await told(prepared) == [("10", "12")] * 2, "of the periods that run"
    prepared.rules.rules = Rules.model_validate({"meters": {METER: {"thresholds": ["10", "11"]}}})
    assert await told(prepared) == [("10", "12")] * 2 + [("11", "12")] * 2
    # Taken away and declared again: what was sealed meanwhile counts.
    prepared.rules.rules = without
    assert await told(prepared) == [("10", "12")] * 2 + [("11", "12")] * 2
    await record(prepared, make_event("more", value="9"))
    await seal_everything(prepared, datetime.now(UTC))
    assert await read_all(prepared, "SELECT count(*) FROM usage_threshold_looks") == [(0,)]
    prepared.rules.rules = before
    assert (await told(prepared))[4:] == [("20.5", "21")]


async def test_a_run_that_fails_leaves_what_it_would_have_looked_at(
    prepared: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    await told(prepared)
    await record(prepared, make_event(value="12"))
    await seal_everything(prepared, datetime.now(UTC))
    with monkeypatch.context() as broken:
        broken.setattr(thresholds, "NOTE_REACHED", text("SELECT 1 / 0"))
        with pytest.raises(DBAPIError):
            await told(prepared)
    assert await told(prepared) == [("10", "12")]


async def test_usage_that_is_taken_back_and_comes_again_is_not_told_again(prepared: Resources) -> None:
    await record(prepared, make_event(value="12"))
    assert await told(prepared) == [("10", "12")]
    await record(prepared, make_event("minus", value="-5"))
    assert await told(prepared) == [("10", "12")]
    await record(prepared, make_event("plus", value="4"))
    assert await told(prepared) == [("10", "12")]


async def test_workers_that_announce_at_once_tell_it_once(prepared: Resources) -> None:
    await record(prepared, make_event(value="100"))
    announced = await asyncio.gather(*(announce_thresholds(prepared, datetime.now(UTC)) for _ in range(4)))
    assert sum(announced) == 2
    assert len(await read_all(prepared, TOLD)) == 2


async def test_a_quantity_that_does_not_add_up_is_measured_as_its_meter_does(prepared: Resources) -> None:
    hour = timedelta(hours=1)
    events = [make_event(f"e{n}", value=value, at=NOW - n * hour) for n, value in enumerate(["9", "8", "7"])]
    await record(prepared, *events)
    await run(prepared, "UPDATE usage_totals SET aggregation = 'max'")
    assert await told(prepared) == []
    await record(prepared, make_event("most", value="11", at=NOW - 5 * hour))
    await run(prepared, "UPDATE usage_totals SET aggregation = 'max'")
    assert await told(prepared) == [("10", "11")]


async def test_many_customers_are_looked_at_within_a_run(prepared: Resources) -> None:
    for number in range(30):
        await make_customer(prepared, ref=f"ref{number}", customer=f"cus_{number}")
    await record(prepared, *(make_event(f"e{n}", customer_ref=f"ref{n}", value=str(n)) for n in range(30)))
    await announce_thresholds(prepared, datetime.now(UTC))
    rows = await read_all(prepared, TOLD)
    assert len(rows) == 20 + 9
    assert {Decimal(str(quantity)) for _, _, quantity, _ in rows} == {Decimal(n) for n in range(10, 30)}


async def test_without_thresholds_nothing_is_looked_at(resources: Resources) -> None:
    assert await announce_thresholds(resources, datetime.now(UTC)) == 0
