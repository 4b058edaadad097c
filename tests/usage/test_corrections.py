import asyncio
import json
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from typer.testing import CliRunner

from tallystick import cli, db
from tallystick.auth import create_key
from tallystick.errors import InvalidRequest
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.usage.cancellations import ASK_AGAIN, cancel_events
from tallystick.usage.delivery import deliver_all
from tallystick.usage.events import UsageEvent
from tallystick.usage.ledger import record_events
from tallystick.usage.sealing import seal_everything
from tests.conftest import FakeStripe
from tests.usage.making import (
    CUSTOMER,
    METER,
    conservation,
    last_hour,
    make_customer,
    make_event,
    make_invoice,
    make_meter,
    make_period,
    read_all,
    run,
    wait_until_blocked,
)
from tests.usage.test_delivery import make_deliveries, misbehave, taken_by_stripe

ROWS = "SELECT id, method, state, why FROM usage_corrections ORDER BY requested_at, id"
QUANTITY = "SELECT coalesce(sum(quantity), 0) FROM usage_totals"
ADJUSTMENTS = "/v1/billing/meter_event_adjustments"


async def record(resources: Resources, *events: UsageEvent) -> None:
    async with db.transaction(resources.engine) as connection:
        rules = resources.rules.rules.meters
        await record_events(connection, events, accepted_already=True, rules=rules)


async def correct(client: httpx.AsyncClient, id: str = "c1", event_id: str = "e1", **more: Any) -> httpx.Response:
    body = {"id": id, "event_id": event_id, "action": "void", "reason": "a test"} | more
    return await client.post("/v1/usage/corrections", json=body)


async def adjust(client: httpx.AsyncClient, id: str, value: str, event_id: str = "e1") -> httpx.Response:
    return await correct(client, id, event_id, action="adjust", value=value)


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].rpartition(":")[2]


async def prepare(resources: Resources, *events: UsageEvent, formula: str = "sum") -> None:
    await make_customer(resources)
    await make_meter(resources, formula=formula)
    await record(resources, *events)


async def close_period(resources: Resources, *, finalized: bool) -> None:
    now = datetime.now(UTC)
    await make_period(resources, now - timedelta(days=30), now)
    await make_invoice(resources, finalized_at=now if finalized else None)


async def test_a_voided_event_is_outweighed_by_a_second_one(client: httpx.AsyncClient, resources: Resources) -> None:
    await prepare(resources, make_event(value="2.5"), make_event("e2", value="4"))
    answer = await correct(client)
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    assert (shown["method"], shown["state"], shown["delta"], shown["value"]) == ("compensate", "done", "-2.5", None)
    assert await read_all(resources, QUANTITY) == [(4,)]
    counted = await conservation(resources)
    assert (counted.accepted, counted.events) == (Decimal(4), 3)
    ledger = "SELECT value, timestamp = (SELECT timestamp FROM usage_events WHERE id = 'e1') FROM usage_events"
    assert (Decimal("-2.5"), True) in await read_all(resources, ledger)


async def test_a_repeat_is_answered_the_same_and_another_body_is_a_conflict(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await prepare(resources, make_event(value="2.5"))
    first = await correct(client)
    again = await correct(client)
    assert (again.status_code, again.json()) == (200, first.json())
    assert problem(await correct(client, reason="another")) == (409, "conflict")
    assert problem(await correct(client, event_id="e2")) == (409, "conflict")
    assert await read_all(resources, QUANTITY) == [(0,)]


async def test_several_corrections_of_an_event_go_by_what_it_counts_by_then(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await prepare(resources, make_event(value="999999999999999"))
    deltas = []
    for number, value in enumerate(["0.000000000001", "8", "-3"]):
        deltas.append((await adjust(client, f"c{number}", value)).json()["delta"])
        assert await read_all(resources, QUANTITY) == [(Decimal(value),)]
    assert deltas == ["-999999999999998.999999999999", "7.999999999999", "-11"]
    assert (await correct(client, "last")).json()["delta"] == "3"
    assert await read_all(resources, QUANTITY) == [(0,)]
    await conservation(resources)


async def test_many_corrections_at_once_leave_the_value_of_one_of_them(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await prepare(resources, make_event(value="10"))
    answers = await asyncio.gather(*(adjust(client, f"c{value}", str(value)) for value in range(1, 7)))
    assert {answer.status_code for answer in answers} == {200}
    ((last,),) = await read_all(resources, "SELECT value FROM usage_corrections ORDER BY settled_at DESC LIMIT 1")
    ((quantity,),) = await read_all(resources, QUANTITY)
    assert quantity in range(1, 7)
    ((total,),) = await read_all(resources, "SELECT 10 + sum(delta) FROM usage_corrections")
    assert (quantity, last is not None) == (total, True)


async def test_of_two_voids_at_once_one_is_done(client: httpx.AsyncClient, resources: Resources) -> None:
    await prepare(resources, make_event(value="10"))
    answers = await asyncio.gather(*(correct(client, id) for id in ("one", "two", "one", "two", "one")))
    ((id, *_),) = await read_all(resources, ROWS)
    assert [answer.status_code for answer in answers] == [
        200 if id == each else 409 for each in ("one", "two") * 2 + ("one",)
    ]
    assert await read_all(resources, QUANTITY) == [(0,)]


async def test_an_id_that_comes_for_several_events_at_once_corrects_one(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    hours = [last_hour() - timedelta(hours=number) for number in range(4)]
    await prepare(resources, *(make_event(f"e{number}", at=at) for number, at in enumerate(hours)))
    answers = await asyncio.gather(*(correct(client, "c1", f"e{number}") for number in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    assert await read_all(resources, QUANTITY) == [(3,)]


async def test_what_cannot_be_corrected_is_refused_by_name(client: httpx.AsyncClient, resources: Resources) -> None:
    await prepare(resources, make_event(value="10"), make_event("e2"))
    assert problem(await correct(client, event_id="nobody")) == (404, "unknown-usage-event")
    assert (await correct(client)).status_code == 200
    assert problem(await correct(client, "c2")) == (409, "already-voided")
    assert problem(await adjust(client, "c3", "5")) == (409, "already-voided")
    assert problem(await adjust(client, "c4", "1", "e2")) == (409, "nothing-to-correct")
    for wrong in ({"value": "1"}, {"action": "adjust"}, {"action": "adjust", "value": 1.5}, {"reason": ""}):
        assert (await correct(client, "c5", "e2", **wrong)).status_code == 422, wrong
    assert problem(await correct(client, "c6", "e2", reason="card 4242424242424242"))[0] == 422
    assert len(await read_all(resources, ROWS)) == 1


async def test_a_key_corrects_the_events_of_its_own_source_only(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await prepare(resources, make_event(source="others"))
    assert problem(await correct(client)) == (404, "unknown-usage-event")
    async with db.transaction(resources.engine) as connection:
        key = await create_key(connection, name="reader", source="tests", scopes=["usage:read"])
    assert (await client.get("/v1/usage/corrections", params={"source": "others"})).status_code == 200
    client.headers["Authorization"] = f"Bearer {key}"
    assert problem(await correct(client)) == (403, "forbidden")
    assert problem(await client.get("/v1/usage/corrections", params={"source": "others"})) == (403, "forbidden")


async def test_an_id_that_was_used_on_two_days_needs_the_day(client: httpx.AsyncClient, resources: Resources) -> None:
    now = datetime.now(UTC)
    await prepare(resources, make_event(value="1", at=now))
    await record(resources, make_event(value="2", at=now - timedelta(days=5)))
    assert problem(await correct(client)) == (409, "several-events")
    answer = await correct(client, day=(now - timedelta(days=5)).date().isoformat())
    assert (answer.status_code, answer.json()["delta"]) == (200, "-2")
    assert problem(await correct(client, "c2", day="2020-01-01")) == (404, "unknown-usage-event")


async def test_a_wrong_day_is_answered_with_the_right_one(client: httpx.AsyncClient, resources: Resources) -> None:
    await make_meter(resources)
    await client.post("/v1/usage", json={"id": "e1", "customer": "acme", "meter": METER})
    answer = await correct(client, day="2026-01-01")
    assert problem(answer) == (404, "unknown-usage-event")
    assert "retry-after" not in answer.headers
    ((day,),) = await read_all(resources, "SELECT day FROM usage_events")
    assert str(day) in answer.json()["detail"]
    assert (await correct(client, day=str(day))).status_code == 200


async def test_a_member_that_is_given_twice_is_refused(client: httpx.AsyncClient, resources: Resources) -> None:
    await prepare(resources, make_event())
    body = '{"id": "c1", "event_id": "e1", "action": "void", "reason": "a test", "i\\u0064": "c2"}'
    answer = await client.post("/v1/usage/corrections", content=body, headers={"content-type": "application/json"})
    assert problem(answer) == (422, "invalid-request")
    assert answer.json()["detail"] == "The field 'id' is given twice."
    assert await read_all(resources, ROWS) == []


async def test_an_event_that_still_waits_in_redis_is_recorded_first(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await prepare(resources)
    body = {"id": "e1", "customer": "acme", "meter": METER, "value": "7"}
    assert (await client.post("/v1/usage", json=body)).status_code == 202
    assert await read_all(resources, "SELECT count(*) FROM usage_events") == [(0,)]
    assert (await correct(client)).json()["state"] == "done"
    assert await read_all(resources, QUANTITY) == [(0,)]


async def test_an_event_that_another_drain_has_in_hand_is_named_as_such(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await prepare(resources)
    await client.post("/v1/usage", json={"id": "e1", "customer": "acme", "meter": METER})
    await resources.redis.delete("{tallystick}:usage:stream")
    answer = await correct(client)
    assert problem(answer) == (404, "not-recorded-yet")
    assert answer.headers["Retry-After"] == "1"


async def test_what_was_sent_with_other_usage_is_compensated_at_stripe(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await record(resources, make_event("e5", at=last_hour(), value="7"), make_event("e6", at=last_hour(), value="1"))
    await seal_everything(resources, datetime.now(UTC))
    await deliver_all(resources, datetime.now(UTC))
    assert (await correct(client, event_id="e5")).json()["method"] == "compensate"
    await seal_everything(resources, datetime.now(UTC))
    await deliver_all(resources, datetime.now(UTC))
    assert sum(value for _, value in await taken_by_stripe(fake_stripe)) == 6
    assert (await conservation(resources)).sent == 6


async def cancel(resources: Resources, after: timedelta = timedelta(0)) -> None:
    await cancel_events(resources, datetime.now(UTC) + after)


async def cancelled_at_stripe(fake: FakeStripe) -> list[bool]:
    events = (await fake.control.get("/_fake/meter_events")).json()["meter_events"]
    return [event["cancelled"] for event in events]


async def test_what_was_sent_by_itself_is_cancelled_at_stripe(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5", "7")
    await deliver_all(resources, datetime.now(UTC))
    answer = await correct(client)
    assert (answer.json()["method"], answer.json()["state"]) == ("cancel", "pending")
    assert problem(await adjust(client, "c2", "6")) == (409, "correction-open")
    await cancel(resources)
    assert await read_all(resources, ROWS) == [("c1", "cancel", "done", None)]
    assert sorted(await cancelled_at_stripe(fake_stripe)) == [False, True]
    counted = await conservation(resources)
    assert (counted.sent, counted.voided) == (Decimal(5), Decimal(7))
    assert await read_all(resources, QUANTITY) == [(5,)]
    asked = {"customer": "acme", "from": (last_hour(0) - timedelta(hours=3)).isoformat()}
    shown = (await client.get("/v1/usage", params=asked)).json()["data"]
    assert [(row["quantity"], row["events"]) for row in shown] == [("5", 1)]
    await cancel(resources, ASK_AGAIN)
    assert (await conservation(resources)).voided == 7


async def test_cancellations_never_lock_totals_in_another_order_than_the_drain(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    """e1 is of an earlier hour than e0, and asked for later; the drain locks the earlier hour first."""
    await make_deliveries(resources, fake_stripe, "5", "7")
    await correct(client, "c0", event_id="e0")
    await correct(client, "c1", event_id="e1")
    await run(resources, "UPDATE usage_corrections SET requested_at = now() - interval '1 minute' WHERE id = 'c0'")
    in_order = "SELECT id FROM usage_totals ORDER BY bucket_start"
    async with db.transaction(resources.engine) as draining:
        await draining.execute(text(f"{in_order} LIMIT 1 FOR UPDATE"))
        cancelling = asyncio.create_task(cancel_events(resources, datetime.now(UTC)))
        await wait_until_blocked(resources)
        await draining.execute(text(f"{in_order} FOR UPDATE"))
    assert await cancelling == 2
    assert await read_all(resources, ROWS) == [("c0", "cancel", "done", None), ("c1", "cancel", "done", None)]


@pytest.mark.parametrize("kind", ["error_500", "error_500_after", "timeout_after", "drop_before", "rate_limit"])
async def test_a_cancellation_whose_answer_was_lost_is_made_once(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe, kind: str
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await deliver_all(resources, datetime.now(UTC))
    await correct(client, event_id="e0")
    await misbehave(fake_stripe, kind, times=2, path=ADJUSTMENTS, seconds=0)
    for _ in range(4):
        await cancel(resources, ASK_AGAIN)
        await run(resources, "UPDATE usage_corrections SET next_attempt_at = '-infinity'")
    assert await read_all(resources, ROWS) == [("c1", "cancel", "done", None)]
    assert await cancelled_at_stripe(fake_stripe) == [True]
    assert (await conservation(resources)).voided == 5
    assert await read_all(resources, "SELECT count(*) FROM usage_events") == [(1,)]


async def test_what_stripe_refuses_to_cancel_is_compensated(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await deliver_all(resources, datetime.now(UTC))
    await correct(client, event_id="e0")
    (await fake_stripe.control.post("/_fake/clock", json={"advance_seconds": 25 * 3600})).raise_for_status()
    await cancel(resources)
    assert await read_all(resources, ROWS) == [("c1", "compensate", "done", None)]
    assert await read_all(resources, QUANTITY) == [(0,)]
    assert (await conservation(resources)).open == -5


async def test_a_refusal_after_a_call_that_nobody_knows_of_is_for_an_operator(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await deliver_all(resources, datetime.now(UTC))
    await correct(client, event_id="e0")
    await misbehave(fake_stripe, "error_500", path=ADJUSTMENTS)
    await cancel(resources)
    (await fake_stripe.control.post("/_fake/clock", json={"advance_seconds": 25 * 3600})).raise_for_status()
    await cancel(resources, ASK_AGAIN)
    assert await read_all(resources, ROWS) == [("c1", "propose", "proposed", "cancellation_not_known")]
    assert await read_all(resources, QUANTITY) == [(5,)]


async def test_what_is_sealed_alone_and_not_tried_yet_is_never_sent(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    answer = await correct(client, event_id="e0")
    assert (answer.status_code, answer.json().get("method")) == (200, "cancel"), answer.text
    await cancel(resources)
    await deliver_all(resources, datetime.now(UTC))
    assert await taken_by_stripe(fake_stripe) == []
    assert (await conservation(resources)).voided == 5


async def test_a_delivery_on_its_way_is_waited_for(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await correct(client, event_id="e0")
    await run(resources, "UPDATE usage_deliveries SET attempts = 1, unknown_since = now(), state = 'pending'")
    await cancel(resources)
    assert await read_all(resources, ROWS) == [("c1", "cancel", "pending", None)]
    await deliver_all(resources, datetime.now(UTC))
    await cancel(resources, timedelta(minutes=1))
    assert await read_all(resources, ROWS) == [("c1", "cancel", "done", None)]
    assert await cancelled_at_stripe(fake_stripe) == [True]


@pytest.mark.parametrize("finalized", [False, True])
async def test_usage_on_a_final_invoice_is_left_to_an_operator(
    client: httpx.AsyncClient, resources: Resources, finalized: bool
) -> None:
    await prepare(resources, make_event(at=last_hour(), value="10"))
    await close_period(resources, finalized=finalized)
    answer = (await adjust(client, "c1", "4")).json()
    told = await read_all(
        resources, "SELECT customer, data FROM notifications WHERE type = 'usage.correction_proposed'"
    )
    if not finalized:
        assert (answer["method"], told) == ("compensate", [])
        return
    assert (answer["method"], answer["state"], answer["why"]) == ("propose", "proposed", "invoice_final")
    assert (answer["delta"], answer["invoice"]) == ("-6", "in_1")
    assert await read_all(resources, QUANTITY) == [(10,)], "nothing has changed yet"
    ((customer, data),) = told
    assert isinstance(data, dict)
    assert (customer, data["delta"], data["event"], data["meter"]) == (CUSTOMER, "-6", "e1", METER)
    assert problem(await correct(client, "c2")) == (409, "correction-open")


async def move_reference(resources: Resources) -> None:
    """The reference of all usage so far means another customer from now on."""
    await make_customer(resources, ref="other", customer="cus_other")
    await run(resources, "INSERT INTO customer_links (ref, customer) VALUES ('acme', 'cus_other')")


async def test_usage_that_another_customer_was_billed_is_left_to_an_operator(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await prepare(resources, make_event(at=last_hour(), value="10"), make_event("e2", at=last_hour(), value="1"))
    await seal_everything(resources, datetime.now(UTC))
    await record(resources, make_event("open", at=last_hour(), value="2"))
    await move_reference(resources)
    answer = (await adjust(client, "c1", "4")).json()
    assert (answer["method"], answer["why"], answer["invoice"]) == ("propose", "moved", None)
    told = "SELECT customer FROM notifications WHERE type = 'usage.correction_proposed'"
    assert await read_all(resources, told) == [(CUSTOMER,)]
    await close_period(resources, finalized=True)
    answer = (await correct(client, "c2", "e2")).json()
    assert (answer["why"], answer["invoice"]) == ("invoice_final", "in_1"), "the invoice of who was billed"
    answer = (await correct(client, "c3", "open")).json()
    assert answer["method"] == "compensate", "both are the present customer's"
    await seal_everything(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT customer, value FROM usage_deliveries ORDER BY id") == [
        (CUSTOMER, Decimal(11)),
        ("cus_other", Decimal(0)),
    ]
    await conservation(resources)


async def test_what_was_sent_by_itself_is_cancelled_for_the_customer_who_was_billed(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await deliver_all(resources, datetime.now(UTC))
    await move_reference(resources)
    assert (await correct(client, event_id="e0")).json()["method"] == "cancel"
    await cancel(resources)
    assert await read_all(resources, ROWS) == [("c1", "cancel", "done", None)]
    assert await cancelled_at_stripe(fake_stripe) == [True]


async def test_what_stripe_refuses_to_cancel_is_not_compensated_for_another_customer(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await deliver_all(resources, datetime.now(UTC))
    await move_reference(resources)
    await correct(client, event_id="e0")
    (await fake_stripe.control.post("/_fake/clock", json={"advance_seconds": 25 * 3600})).raise_for_status()
    await cancel(resources)
    assert await read_all(resources, ROWS) == [("c1", "propose", "proposed", "moved")]
    assert await read_all(resources, QUANTITY) == [(5,)]


async def test_a_refused_proposal_changes_nothing_and_the_event_can_be_corrected_again(
    client: httpx.AsyncClient, resources: Resources, environment: None
) -> None:
    await prepare(resources, make_event(at=last_hour(), value="10"))
    await close_period(resources, finalized=True)
    await adjust(client, "c1", "4")
    listed = await command("list", "--json")
    assert [(row["id"], row["customer"], row["delta"]) for row in json.loads(listed)] == [("c1", "acme", "-6")]
    (row,) = json.loads(listed)
    assert (row["timestamp"][-1], row["requested_at"][-1]) == ("Z", "Z")
    assert "in_1" in await command("list")
    for decision in ("settle", "refuse"):
        refused = await asyncio.to_thread(
            CliRunner().invoke, cli.app, ["corrections", decision, "c1", "--note", "paid by 4242 4242 4242 4242"]
        )
        assert isinstance(refused.exception, InvalidRequest)
        assert (refused.exception.type, refused.exception.field) == ("card-number", "--note")
    await command("refuse", "c1", "--note", "not ours")
    again = (await adjust(client, "c2", "7")).json()
    assert again["delta"] == "-3"
    await command("settle", "c2", "--note", "credit note cn_1")
    assert (await correct(client, "c3")).json()["delta"] == "-7"
    shown = (await client.get("/v1/usage/corrections", params={"event_id": "e1", "limit": 2})).json()
    assert [(row["id"], row["state"]) for row in shown["data"]] == [("c3", "proposed"), ("c2", "settled")]
    assert shown["has_more"]
    rest = (await client.get("/v1/usage/corrections", params={"before": "c2"})).json()
    assert [(row["state"], row["note"]) for row in rest["data"]] == [("refused", "not ours")]
    assert "there is no proposed correction" in await command("settle", "c1", "--note", "x", code=1)


async def test_an_operator_names_the_source_where_two_have_the_id(
    client: httpx.AsyncClient, resources: Resources, environment: None
) -> None:
    await prepare(resources, make_event(at=last_hour()))
    await close_period(resources, finalized=True)
    await correct(client)
    await run(
        resources,
        "INSERT INTO usage_corrections (source, id, event_id, event_day, action, delta, reason, method, state,"
        " requested_at) SELECT 'others', id, event_id, event_day, action, delta, reason, method, state, requested_at"
        "   FROM usage_corrections",
    )
    assert "others, tests" in await command("settle", "c1", "--note", "x", code=1)
    await command("settle", "c1", "--note", "x", "--source", "others")
    assert await read_all(resources, "SELECT source, state FROM usage_corrections ORDER BY 1") == [
        ("others", "settled"),
        ("tests", "proposed"),
    ]


async def command(*arguments: str, code: int = 0) -> str:
    """What the command prints. It runs its own event loop, so it needs a thread."""
    result = await asyncio.to_thread(CliRunner().invoke, cli.app, ["corrections", *arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def environment(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.database_url.replace("+asyncpg", ""))
    monkeypatch.setenv("REDIS_URL", settings.redis_url)
    monkeypatch.setenv("STRIPE_API_KEY", "sk_test_for_tests")
    monkeypatch.setenv("STRIPE_WEBHOOK_SECRET", "whsec_for_tests")
    monkeypatch.setenv("STRIPE_API_BASE", settings.stripe_api_base)


async def test_usage_that_was_parked_is_not_outweighed_by_something_that_might_be_sent(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await run(resources, "UPDATE usage_deliveries SET state = 'parked', reason = 'a test'")
    answer = (await correct(client, event_id="e0")).json()
    assert (answer["method"], answer["why"]) == ("propose", "not_sent")


async def test_an_event_of_a_count_is_left_out_while_nobody_was_told(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await prepare(resources)
    await run(resources, "UPDATE meters SET formula = 'count'")
    await record(resources, make_event(at=last_hour()), make_event("e2", at=last_hour()))
    answer = (await correct(client)).json()
    assert (answer["method"], answer["state"]) == ("cancel", "done")
    counted = await conservation(resources)
    assert (counted.events, counted.open, counted.voided) == (2, Decimal(1), Decimal(1))
    assert await read_all(resources, "SELECT quantity, events FROM usage_totals") == [(1, 1)]
    assert problem(await adjust(client, "c2", "5", "e2")) == (409, "cannot-be-adjusted")
    traced = (await client.get("/v1/usage/events/e1")).json()
    assert [delivery["state"] for delivery in traced["events"][0]["deliveries"]] == ["voided"]
    assert [correction["id"] for correction in traced["corrections"]] == ["c1"]
    await seal_everything(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT id, seal FROM usage_events ORDER BY id") == [("e1", -1), ("e2", 1)]


RULES = Rules.model_validate(
    {
        "meters": {
            "peak": {"aggregation": "max"},
            "users": {"aggregation": "unique_count", "property": "user"},
            METER: {"properties": ["region"]},
        }
    }
)
LEFT = {"peak": ((9, 4), (3, 4), (4, 0)), "users": ((9, 2), (3, 1), (4, 0)), "seats": ((4, 9), (9, 3), (3, 0))}


async def prepare_last(app: FastAPI, resources: Resources, meter: str) -> None:
    """Three events of a meter whose quantity does not add up, in the order of time 3, 9, 4."""
    app.state.resources.rules.rules = resources.rules.rules = RULES
    await make_customer(resources)
    await make_meter(resources, meter, formula="last")
    for number, value in enumerate((3, 9, 4)):
        at = last_hour() + timedelta(seconds=number)
        of = (("user", f"user-{value}"),) if meter == "users" else ()
        await record(resources, make_event(f"e{value}", at=at, value=str(value), meter=meter, properties=of))


@pytest.mark.parametrize("meter", sorted(LEFT))
async def test_what_does_not_add_up_is_found_anew_without_the_voided_event(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, meter: str
) -> None:
    await prepare_last(app, resources, meter)
    for voided, left in LEFT[meter]:
        assert (await correct(client, f"c{voided}", f"e{voided}")).json()["state"] == "done"
        assert await read_all(resources, QUANTITY) == [(left,)]
    counted = await conservation(resources)
    assert counted.events_by_state["voided"] == 3
    assert await seal_everything(resources, datetime.now(UTC)) == 0


@pytest.mark.parametrize("meter", sorted(LEFT))
async def test_what_does_not_add_up_and_was_told_is_left_to_an_operator(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, meter: str
) -> None:
    await prepare_last(app, resources, meter)
    await seal_everything(resources, datetime.now(UTC))
    # A running value tells of the whole period, also of an hour that is not sealed.
    more = make_event("more", at=last_hour() - timedelta(hours=1), value="1", meter=meter, properties=(("user", "x"),))
    await record(resources, more)
    for event, way in (("e9", "propose"), ("more", "cancel" if meter == "seats" else "propose")):
        answer = (await correct(client, event, event)).json()
        assert (answer["method"], answer["why"]) == (way, "does_not_add_up" if way == "propose" else None)
    refused = await adjust(client, "c3", "5", "e4")
    assert (refused.status_code, problem(refused) if meter == "users" else refused.json()["method"]) == (
        (409, (409, "cannot-be-adjusted")) if meter == "users" else (200, "propose")
    )


async def test_a_part_by_property_is_outweighed_or_taken_out_too(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    app.state.resources.rules.rules = resources.rules.rules = RULES
    await make_deliveries(resources, fake_stripe)
    eu, us = (("region", "eu"),), (("region", "us"),)
    await record(resources, make_event(at=last_hour(), value="5", properties=eu))
    await seal_everything(resources, datetime.now(UTC))
    events = (make_event("e2", at=last_hour(), value="3", properties=us), make_event("e3", value="2", properties=us))
    await record(resources, *events)
    await correct(client)
    await cancel(resources)
    await correct(client, "c2", "e2")
    parts = "SELECT value, sum(quantity), sum(events) FROM usage_group_totals GROUP BY 1 ORDER BY 1"
    assert await read_all(resources, parts) == [("eu", 0, 0), ("us", 2, 3)]


async def test_random_corrections_leave_exactly_what_was_meant(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    chance = random.Random(7)
    await make_deliveries(resources, fake_stripe, "100")
    meant: dict[str, Decimal] = {"e0": Decimal(100)} | {f"x{n}": Decimal(chance.randint(1, 99)) / 10 for n in range(12)}
    for id, value in list(meant.items())[1:]:
        at = last_hour() - timedelta(hours=chance.randint(0, 3))
        await record(resources, make_event(id, at=at, value=str(value)))
    voided: set[str] = set()
    for number in range(40):
        id = chance.choice(sorted(meant))
        new = Decimal(chance.randint(-99, 99)) / 10
        taken_back = chance.random() < 0.3
        answer = await (correct(client, f"c{number}", id) if taken_back else adjust(client, f"c{number}", str(new), id))
        possible = id not in voided and (taken_back or new != meant[id])
        assert (answer.status_code == 200) == possible, answer.text
        if possible:
            meant[id] = Decimal(0) if taken_back else new
            voided |= {id} if taken_back else set()
        if chance.random() < 0.3:
            await seal_everything(resources, datetime.now(UTC))
            await deliver_all(resources, datetime.now(UTC))
            await cancel(resources, timedelta(seconds=number * 60))
    await cancel(resources, timedelta(hours=1))
    await seal_everything(resources, datetime.now(UTC))
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT count(*) FROM usage_corrections WHERE state <> 'done'") == [(0,)]
    events = (await fake_stripe.control.get("/_fake/meter_events")).json()["meter_events"]
    billed = sum(Decimal(event["value"]) for event in events if not event["cancelled"])
    assert billed == sum(meant.values())
    assert await read_all(resources, QUANTITY) == [(billed,)]
    await conservation(resources)
