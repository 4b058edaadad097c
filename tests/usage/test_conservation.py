from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import httpx
import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.metrics import LATE_USAGE_EVENTS, UNBILLED_EVENTS
from tallystick.resources import Resources
from tallystick.usage.board import list_open_periods, measure_periods
from tallystick.usage.conservation import Slice, count_conservation, count_slices, find_first_day
from tallystick.usage.ledger import record_events
from tallystick.usage.partitions import drop_partitions, make_partitions
from tallystick.usage.sealing import seal_everything
from tests.usage.making import (
    CUSTOMER,
    METER,
    REF,
    conservation,
    last_hour,
    make_customer,
    make_event,
    make_invoice,
    make_meter,
    make_period,
    read_all,
    run,
)

PATIENCE = timedelta(seconds=20)


async def record(resources: Resources, *events: object) -> None:
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)  # type: ignore[arg-type]


async def test_a_slice_says_where_its_events_are(client: httpx.AsyncClient, resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    early, late = last_hour(0) - timedelta(hours=2), last_hour(0)
    await record(resources, make_event("e1", at=early, value="2.5"), make_event("e2", at=early, customer_ref=CUSTOMER))
    await seal_everything(resources, datetime.now(UTC))
    await record(resources, make_event("e3", at=late), make_event("e4", at=late, customer_ref="nobody", value="7"))
    await run(resources, "UPDATE usage_deliveries SET state = 'confirmed' WHERE value = 2.5")

    answer = (await client.get("/v1/usage/conservation", params={"customer": REF})).json()
    (part,) = answer["data"]
    assert (part["customer"], part["meter"], answer["holds"]) == (CUSTOMER, METER, True)
    assert part["quantity"] | {"difference": "0"} == part["quantity"]
    assert {state: number for state, number in part["quantity"].items() if number != "0"} == {
        "accepted": "4.5", "open": "1", "pending": "1", "confirmed": "2.5"
    }  # fmt: skip
    assert part["events"]["accepted"] == 3
    before = {"customer": REF, "to": late.isoformat()}
    assert (await client.get("/v1/usage/conservation", params=before)).json()["data"][0]["events"]["accepted"] == 2
    everybody = (await client.get("/v1/usage/conservation", params={"meter": METER})).json()["data"]
    assert [part["customer"] for part in everybody] == [CUSTOMER, "nobody"]


async def test_a_slice_of_nobody_is_not_found(client: httpx.AsyncClient, resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    for kind, name in (("customer", "acmee"), ("meter", "api_request")):
        answer = await client.get("/v1/usage/conservation", params={"customer": REF, "meter": METER} | {kind: name})
        assert (answer.status_code, answer.json()["type"]) == (404, f"urn:tallystick:problem:unknown-{kind}")
    of_a_new_customer = await client.get("/v1/usage/conservation", params={"customer": REF, "meter": METER})
    assert of_a_new_customer.json()["holds"]
    backwards = {"from": "2026-02-01T00:00:00Z", "to": "2026-01-01T00:00:00Z"}
    refused = await client.get("/v1/usage/conservation", params=backwards)
    assert (refused.status_code, refused.json()["field"]) == (422, "to")


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM usage_events WHERE id = 'e1'",
        "UPDATE usage_events SET value = 9 WHERE id = 'e1'",
        "DELETE FROM usage_deliveries",
        "UPDATE usage_deliveries SET events = 3",
        "UPDATE usage_totals SET sealed_events = 0",
    ],
)
async def test_damage_is_a_difference_in_the_slice_and_in_the_whole(
    client: httpx.AsyncClient, resources: Resources, damage: str
) -> None:
    await make_customer(resources)
    await make_meter(resources)
    await record(resources, make_event("e1", at=last_hour()), make_event("e2", at=last_hour()))
    await seal_everything(resources, datetime.now(UTC))
    await conservation(resources)
    await run(resources, damage)
    async with db.transaction(resources.engine) as connection:
        assert not (await count_conservation(connection)).holds
    assert not (await client.get("/v1/usage/conservation")).json()["holds"]


async def test_meters_that_do_not_add_up_are_counted_in_events(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    await record(resources, make_event("e1", at=last_hour(), value="5"), make_event("e2", at=last_hour(), value="8"))
    await run(resources, "UPDATE usage_totals SET aggregation = 'max', quantity = 8")
    counted = await conservation(resources)
    assert (counted.accepted, counted.events, counted.events_by_state["open"]) == (Decimal(0), 2, 2)
    async with db.transaction(resources.engine) as connection:
        (part,) = await count_slices(connection, Slice(), PATIENCE)
    assert (part.additive, part.counted.holds) == (False, True)


async def test_retired_days_count_in_the_whole_and_slices_begin_after_them(resources: Resources) -> None:
    await record(resources, make_event("old", at=last_hour() - timedelta(days=3)), make_event("new", at=last_hour()))
    await run(resources, "UPDATE usage_totals SET aggregation = 'last' WHERE bucket_start < now() - interval '2 days'")
    today = datetime.now(UTC)
    await drop_partitions(resources, today.date() - timedelta(days=1))
    assert await read_all(resources, "SELECT sum(events), sum(quantity) FROM usage_retired") == [(1, 0)]
    assert (await conservation(resources)).events == 2
    async with db.transaction(resources.engine) as connection:
        first = await find_first_day(connection)
        assert first is not None
        assert first.date() == date.fromordinal(today.date().toordinal() - 1)
        (part,) = await count_slices(connection, Slice(from_=first), PATIENCE)
        assert (part.counted.events, part.counted.holds) == (1, True)
        await make_partitions(connection, today)


async def test_adding_up_is_not_bound_by_a_requests_limits(resources: Resources) -> None:
    async with db.transaction(resources.engine) as connection:
        await count_conservation(connection)
        assert await connection.scalar(text("SHOW statement_timeout")) == "30min"


async def test_the_board_shows_a_draft_with_what_is_not_sent(client: httpx.AsyncClient, resources: Resources) -> None:
    await make_customer(resources, boundaries=(last_hour(59),))
    await make_meter(resources)
    await make_period(resources, last_hour(0) - timedelta(days=30), last_hour(59))
    await make_invoice(resources)
    at = last_hour()
    await record(resources, make_event("e1", at=at, value="2"), make_event("e2", at=at, value="3"))
    await seal_everything(resources, datetime.now(UTC))
    await record(resources, make_event("e3", at=at, value="4"), make_event("next period", at=last_hour(59)))
    now = last_hour(59) + timedelta(minutes=10)
    (period,) = await list_open_periods(resources, now)
    (meter,) = period.meters
    assert (period.invoice, period.left, period.unsent, period.confirmed) == ("in_1", timedelta(minutes=50), 3, False)
    assert meter.quantities == {"open": 4, "pending": 5}
    await measure_periods(resources, now)
    assert UNBILLED_EVENTS._value.get() == 3

    await run(resources, "UPDATE usage_totals SET sealed = quantity, sealed_events = events")
    await run(resources, "UPDATE usage_deliveries SET state = 'confirmed', taken_late = true")
    (shown,) = (await client.get("/v1/periods")).json()["data"]
    assert (shown["unsent_events"], shown["confirmed"], shown["meters"][0]["quantity"]) == (0, True, {"confirmed": "5"})
    await measure_periods(resources, now)
    assert (UNBILLED_EVENTS._value.get(), LATE_USAGE_EVENTS.labels("taken")._value.get()) == (0, 2)


async def test_the_most_urgent_draft_comes_first(resources: Resources) -> None:
    await make_meter(resources)
    for number, (customer, ended) in enumerate((("cus_sent", 50), ("cus_fresh", 5), ("cus_old", 40))):
        await make_customer(resources, ref=f"ref-{number}", customer=customer)
        end = datetime.now(UTC) - timedelta(minutes=ended)
        await make_period(resources, end - timedelta(days=30), end, customer=customer)
        await make_invoice(resources, customer=customer)
        await run(resources, "UPDATE invoices SET id = 'in_' || customer WHERE id = 'in_1'")
        await run(resources, "UPDATE billing_periods SET item = 'si_' || customer WHERE item = 'si_1'")
        if customer != "cus_sent":
            await record(resources, make_event(customer, at=end - timedelta(hours=1), customer_ref=customer))
    order = [period.customer for period in await list_open_periods(resources, datetime.now(UTC))]
    assert order == ["cus_old", "cus_fresh", "cus_sent"]
