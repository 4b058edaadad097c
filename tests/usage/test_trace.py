from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tallystick import db
from tallystick.auth import create_key
from tallystick.resources import Resources
from tallystick.usage.drain import drain
from tallystick.usage.ledger import record_events
from tallystick.usage.reconciliation import ASK_AFTER, reconcile_sent
from tallystick.usage.sealing import seal_everything
from tests.conftest import SOURCE, FakeStripe
from tests.usage.making import (
    CUSTOMER,
    METER,
    REF,
    last_hour,
    make_customer,
    make_event,
    make_invoice,
    make_meter,
    make_period,
    run,
)
from tests.usage.test_delivery import make_deliveries
from tests.usage.test_reconciliation import deliver


async def ask(client: httpx.AsyncClient, id: str = "e1", **parameters: str) -> dict[str, Any]:
    answer = await client.get(f"/v1/usage/events/{quote(id, safe='')}", params=parameters)
    assert answer.status_code == 200, answer.text
    traced: dict[str, Any] = answer.json()
    return traced


async def record(resources: Resources, *events: Any) -> None:
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)


async def make_sealed(resources: Resources) -> None:
    """One event of the last hour, sealed, of a customer with a month that bills it and has just ended."""
    await make_customer(resources)
    await make_meter(resources)
    await make_period(resources, last_hour(0) - timedelta(days=30), last_hour(59))
    await record(resources, make_event(at=last_hour(), value="2.5"))
    await seal_everything(resources, datetime.now(UTC))


async def become(resources: Resources, state: str, **changed: object) -> None:
    now = datetime.now(UTC)
    values = {"state": state, "settled_at": now, "reason": None, "taken_late": False} | changed
    names = ", ".join(f"{name} = :{name}" for name in values)
    await run(resources, f"UPDATE usage_deliveries SET {names}", **values)  # noqa: S608  names from here


async def test_an_event_is_shown_from_its_id_to_stripes_summary(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1.5")
    await run(resources, "UPDATE usage_events SET id = 'a/b c%?#é'")
    now = await deliver(resources)
    await reconcile_sent(resources, now + ASK_AFTER)
    traced = await ask(client, "a/b c%?#é")
    (event,) = traced["events"]
    assert (traced["source"], event["customer"], event["meter"], event["value"]) == (SOURCE, REF, METER, "1.5")
    assert (event["total"]["state"], event["total"]["aggregation"], event["total"]["quantity"]) == (
        "sealed",
        "sum",
        "1.5",
    )
    (delivery,) = event["deliveries"]
    assert (delivery["state"], delivery["drift"]) == ("confirmed", None)
    assert delivery["confirmed_at"] is not None
    assert delivery["summary_checked_at"] is not None
    (attempt,) = delivery["attempts"]
    assert (attempt["attempt"], attempt["outcome"], attempt["reason"]) == (1, "sent", None)


async def test_an_open_event_says_what_it_waits_for(client: httpx.AsyncClient, resources: Resources) -> None:
    async def why() -> str:
        (event,) = (await ask(client))["events"]
        assert event["total"]["state"] == "open"
        assert event["deliveries"] == []
        assert event["invoice"]["place"] == "not_sent_yet"
        return str(event["total"]["open_because"])

    await record(resources, make_event(at=last_hour()))
    assert await why() == "reference_not_linked"
    await make_customer(resources, subscribed=False)
    assert await why() == "meter_not_known"
    await make_meter(resources)
    assert await why() == "no_subscription"
    await run(
        resources,
        "INSERT INTO subscriptions (id, customer, status) VALUES ('s', :customer, 'active')",
        customer=CUSTOMER,
    )
    assert await why() == "sealed_at_next_run"
    await run(resources, "UPDATE usage_totals SET bucket_end = now() + interval '1 minute'")
    assert await why() == "hour_not_ended"


LATER, EARLIER = timedelta(minutes=1), timedelta(minutes=-1)


@pytest.mark.parametrize(
    ("state", "changed", "finalized", "place", "because"),
    [
        ("pending", {}, None, "not_sent_yet", None),
        ("sending", {}, None, "not_sent_yet", None),
        ("sent", {}, None, "draft", None),
        ("confirmed", {}, None, "draft", None),
        ("sent", {}, LATER, "final", None),
        ("confirmed", {"reason": "found_in_summary"}, LATER, "final", None),
        ("sent", {}, EARLIER, "none", "taken_after_finalization"),
        ("sent", {"taken_late": True}, LATER, "none", "taken_after_finalization"),
        ("parked", {"reason": "period_closed"}, EARLIER, "none", "parked"),
        ("parked", {"reason": "outcome_unknown"}, LATER, "not_known", "outcome_unknown"),
        ("voided", {"reason": "superseded"}, LATER, "none", "voided"),
    ],
)
async def test_every_state_has_a_word_for_where_the_quantity_lies(
    client: httpx.AsyncClient,
    resources: Resources,
    state: str,
    changed: dict[str, Any],
    finalized: timedelta | None,
    place: str,
    because: str | None,
) -> None:
    await make_sealed(resources)
    await make_invoice(resources, finalized_at=datetime.now(UTC) + finalized if finalized is not None else None)
    await become(resources, state, **changed)
    (event,) = (await ask(client))["events"]
    (delivery,) = event["deliveries"]
    assert (delivery["state"], delivery["invoice"]["place"], delivery["invoice"]["because"]) == (state, place, because)
    assert (delivery["invoice"]["invoice"], delivery["invoice"]["status"]) == (
        "in_1",
        "draft" if finalized is None else "open",
    )


async def test_what_was_tried_on_both_sides_of_the_finalization_is_not_claimed_to_be_billed(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await make_sealed(resources)
    now = datetime.now(UTC)
    await make_invoice(resources, finalized_at=now)
    await become(resources, "sent", settled_at=now + LATER, reason="repeat")
    await run(
        resources,
        "INSERT INTO usage_delivery_attempts SELECT id, 1, :at, 'retry', 'ReadTimeout' FROM usage_deliveries",
        at=now + EARLIER,
    )
    (event,) = (await ask(client))["events"]
    place = event["deliveries"][0]["invoice"]
    assert (place["place"], place["because"]) == ("not_known", "tried_before_and_after_finalization")


async def test_a_period_without_its_invoice_and_usage_without_a_period_are_told_apart(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await make_sealed(resources)
    await become(resources, "sent")
    (event,) = (await ask(client))["events"]
    assert event["deliveries"][0]["invoice"]["place"] == "not_drafted_yet"
    await run(resources, "DELETE FROM billing_periods")
    (event,) = (await ask(client))["events"]
    assert event["deliveries"][0]["invoice"]["because"] == "no_subscription_bills_it"


async def test_a_drift_of_its_hour_is_shown_with_both_numbers(client: httpx.AsyncClient, resources: Resources) -> None:
    await make_sealed(resources)
    await run(
        resources,
        "INSERT INTO usage_drifts SELECT customer, event_name, :hour, 2.5, 0, now(), now() FROM usage_deliveries",
        hour=last_hour(0),
    )
    (event,) = (await ask(client))["events"]
    drift = event["deliveries"][0]["drift"]
    assert (drift["ours"], drift["stripes"], drift["resolved_at"]) == ("2.5", "0", None)


async def test_an_event_on_its_way_through_redis_is_not_unknown(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await make_meter(resources)
    answer = await client.post("/v1/usage", json={"id": "e1", "customer": REF, "meter": METER})
    assert answer.status_code == 202
    answer = await client.get("/v1/usage/events/e1")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:tallystick:problem:not-recorded-yet")
    await drain(resources, datetime.now(UTC))
    assert len((await ask(client))["events"]) == 1
    answer = await client.get("/v1/usage/events/e2")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:tallystick:problem:unknown-usage-event")


async def test_conflicts_and_other_days_of_an_id_are_listed(client: httpx.AsyncClient, resources: Resources) -> None:
    at = last_hour()
    await record(resources, make_event(at=at), make_event(at=at, value="7"))
    await record(resources, make_event(at=at - timedelta(days=2)))
    traced = await ask(client)
    assert len(traced["events"]) == 2
    assert [conflict["value"] for conflict in traced["conflicts"]] == ["7"]


async def test_corrections_are_on_the_trace(client: httpx.AsyncClient, resources: Resources) -> None:
    await make_sealed(resources)
    await run(
        resources,
        "INSERT INTO usage_corrections (source, id, event_id, event_day, action, delta, reason, method, state,"
        " requested_at)"
        " VALUES (:source, 'c1', 'e1', current_date, 'void', -2.50, 'by mistake', 'compensate', 'done', now())",
        source=SOURCE,
    )
    (correction,) = (await ask(client))["corrections"]
    assert (correction["id"], correction["delta"], correction["state"]) == ("c1", "-2.5", "done")


async def test_another_source_needs_the_scope_admin(
    client: httpx.AsyncClient, anonymous: httpx.AsyncClient, resources: Resources
) -> None:
    await record(resources, make_event(source="other"))
    async with db.transaction(resources.engine) as connection:
        reader = await create_key(connection, name="reader", source=SOURCE, scopes=["usage:read"])
    headers = {"Authorization": f"Bearer {reader}"}
    assert (await anonymous.get("/v1/usage/events/e1", headers=headers)).status_code == 404
    assert (await anonymous.get("/v1/usage/events/e1?source=other", headers=headers)).status_code == 403
    assert len((await ask(client, source="other"))["events"]) == 1
