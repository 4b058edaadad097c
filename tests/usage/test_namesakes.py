"""A meter that is deactivated at Stripe and made anew under its event name: another id, perhaps another formula."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.agreement import LAG
from tallystick.usage.delivery import deliver, deliver_all
from tallystick.usage.late import UNKNOWN_FOR_AT_MOST
from tallystick.usage.ledger import record_events
from tallystick.usage.meters import refresh_meters
from tallystick.usage.parked import explain, resend
from tallystick.usage.reconciliation import reconcile_sent
from tallystick.usage.sealing import seal_everything
from tests.conftest import SOURCE, FakeStripe
from tests.usage.making import METER, REF, conservation, last_hour, make_event, read_all, run
from tests.usage.test_delivery import make_deliveries, misbehave, taken_by_stripe

STATES = "SELECT value, state, reason FROM usage_deliveries ORDER BY value"


async def make_anew(fake: FakeStripe, resources: Resources | None, formula: Any = "sum") -> None:
    meters = fake.client.v1.billing.meters
    for meter in (await meters.list_async({"status": "active"})).data:
        await meters.deactivate_async(meter.id)
    await meters.create_async({"display_name": "API", "event_name": METER, "default_aggregation": {"formula": formula}})
    if resources is not None:
        await refresh_meters(resources, datetime.now(UTC))


@pytest.mark.parametrize("formula", ["sum", "count"])
async def test_what_the_earlier_meter_was_told_is_found_in_its_own_summaries(
    resources: Resources, fake_stripe: FakeStripe, formula: str
) -> None:
    await make_deliveries(resources, fake_stripe, "5", "7")
    await deliver_all(resources, datetime.now(UTC))
    await make_anew(fake_stripe, resources, formula)
    assert await reconcile_sent(resources, datetime.now(UTC) + LAG) == 1
    assert await read_all(resources, "SELECT * FROM usage_drifts") == []
    assert await read_all(resources, STATES) == [(5, "confirmed", None), (7, "confirmed", None)]


async def test_one_hour_told_to_two_meters_is_compared_with_both(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await deliver_all(resources, datetime.now(UTC))
    await make_anew(fake_stripe, resources, "sum")
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, [make_event("same", at=last_hour(), value="0.5")], accepted_already=True)
    await seal_everything(resources, datetime.now(UTC))
    await deliver_all(resources, datetime.now(UTC))
    # The same hour, by another reference of the customer's, when the third meter counts.
    await make_anew(fake_stripe, resources, "count")
    await run(
        resources, "INSERT INTO customer_links (ref, customer) SELECT 'too', customer FROM usage_deliveries LIMIT 1"
    )
    async with db.transaction(resources.engine) as connection:
        counted = make_event("counted", at=last_hour(), customer_ref="too")
        await record_events(connection, [counted], accepted_already=True)
    await seal_everything(resources, datetime.now(UTC))
    await deliver_all(resources, datetime.now(UTC))
    await reconcile_sent(resources, datetime.now(UTC) + LAG)
    assert await read_all(resources, "SELECT * FROM usage_drifts") == []
    assert await read_all(resources, STATES) == [
        (Decimal("0.5"), "confirmed", None),
        (1, "confirmed", None),
        (5, "confirmed", None),
    ]
    await run(resources, "UPDATE usage_deliveries SET state = 'sent', value = 6 WHERE value = 5")
    await reconcile_sent(resources, datetime.now(UTC) + 2 * LAG)
    drifts = "SELECT ours, stripes, resolved_at FROM usage_drifts"
    assert await read_all(resources, drifts) == [(Decimal("6.5"), Decimal("5.5"), None)], "counting agrees"


async def test_usage_that_the_earlier_meter_may_have_taken_is_not_told_to_the_new_one(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    now = datetime.now(UTC)
    await deliver(resources, now)
    await make_anew(fake_stripe, resources)
    await deliver_all(resources, now + UNKNOWN_FOR_AT_MOST)
    assert await read_all(resources, STATES) == [(5, "parked", "outcome_unknown")]
    await reconcile_sent(resources, now + UNKNOWN_FOR_AT_MOST + LAG)
    assert await read_all(resources, STATES) == [(5, "confirmed", "found_in_summary")]
    assert len(await taken_by_stripe(fake_stripe)) == 1


async def test_a_sum_is_not_told_to_a_meter_that_counts(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "500", "7")
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    now = datetime.now(UTC)
    assert await deliver(resources, now) == 1
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, [make_event("open", at=last_hour())], accepted_already=True)
    await make_anew(fake_stripe, resources, "count")
    await deliver_all(resources, now + timedelta(seconds=5))
    # Of the one that was tried Stripe may have what the earlier meter bills.
    reasons = "SELECT reason FROM usage_deliveries ORDER BY reason"
    assert await read_all(resources, reasons) == [("meter_changed",), ("outcome_unknown",)]
    assert len(await taken_by_stripe(fake_stripe)) == 1
    assert await seal_everything(resources, now) == 0
    (event,) = (await client.get("/v1/usage/events/open", params={"source": SOURCE})).json()["events"]
    assert event["total"]["open_because"] == "meter_changed"
    await conservation(resources)

    parked = [str(row[0]) for row in await read_all(resources, "SELECT identifier FROM usage_deliveries")]
    rules = resources.rules.current(now)
    for carried in (False, True):
        async with db.transaction(resources.engine) as connection:
            decisions = await resend(connection, parked, rules, now, by="a test", carried=carried)
            told = [await explain(connection, identifier, rules, now) for identifier in parked]
        assert sorted(str(each.refused) for each in decisions) == ["meter_changed", "outcome_unknown"]
        assert sorted(each["resend"] for each in told if each) == ["meter_changed", "outcome_unknown"]
    await deliver_all(resources, now + timedelta(seconds=10))
    assert len(await taken_by_stripe(fake_stripe)) == 1, "the name is the new meter's still"
    for formula in ("sum", "sum"):
        await make_anew(fake_stripe, resources, formula)
    async with db.transaction(resources.engine) as connection:
        decisions = await resend(connection, parked, rules, now, by="a test", carried=False)
    assert sorted(str(each.refused) for each in decisions) == ["None", "outcome_unknown"]
    assert await seal_everything(resources, now) == 1
    await deliver_all(resources, now + timedelta(seconds=15))
    states = "SELECT DISTINCT state FROM usage_deliveries WHERE reason IS DISTINCT FROM 'outcome_unknown'"
    assert await read_all(resources, states) == [("sent",)]


async def test_usage_is_taken_at_once_for_a_meter_that_was_made_anew(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await run(resources, "UPDATE meters SET status = 'inactive'")
    await make_anew(fake_stripe, None)
    usage = {"id": "new", "customer": REF, "meter": METER}
    assert (await client.post("/v1/usage", json=usage)).status_code == 202


async def test_a_meter_that_is_not_active_is_refused_though_stripe_cannot_be_asked(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await run(resources, "UPDATE meters SET status = 'inactive'")
    await misbehave(fake_stripe, "error_500", method="GET", path="/v1/billing/meters", times=None)
    usage = {"id": "new", "customer": REF, "meter": METER}
    for _ in range(2):
        answer = await client.post("/v1/usage", json=usage)
        assert (answer.status_code, answer.json()["rejected"][0]["code"]) == (422, "unsupported_meter")
    asked = (await fake_stripe.control.get("/_fake/requests")).json()["requests"]
    assert [request["status"] for request in asked if request["path"] == "/v1/billing/meters"][:2].count(500) == 1
