"""What an operator does about parked deliveries, by the command line and over HTTP."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from tallystick import cli, db
from tallystick.resources import Resources
from tallystick.stripe_limits import METER_EVENT_MAX_AGE
from tallystick.usage.delivery import deliver, deliver_all
from tallystick.usage.error_reports import fetch_error_reports, find_error_reports
from tallystick.usage.late import carry
from tallystick.usage.ledger import record_events
from tallystick.usage.parked import ALTERNATIVES, Decision, explain, list_parked, resend, void
from tallystick.usage.parking import PARKED
from tallystick.usage.sealing import seal_due, seal_everything
from tests.conftest import FakeStripe
from tests.usage.making import (
    METER,
    conservation,
    last_hour,
    make_customer,
    make_event,
    make_meter,
    make_period,
    read_all,
    run,
)
from tests.usage.test_delivery import make_deliveries, misbehave, taken_by_stripe
from tests.usage.test_error_reports import make_unbillable, report
from tests.usage.test_late import make_closed

STATES = "SELECT value, state, split_part(reason, ':', 1) FROM usage_deliveries ORDER BY value"
TRIES = "SELECT attempt, outcome, reason FROM usage_delivery_attempts ORDER BY delivery_id, attempt"


async def identifiers(resources: Resources) -> list[str]:
    """Of all deliveries, by value."""
    return [str(row[0]) for row in await read_all(resources, "SELECT identifier FROM usage_deliveries ORDER BY value")]


async def send_again(resources: Resources, *ids: str, carried: bool = False) -> list[Decision]:
    now = datetime.now(UTC)
    async with db.transaction(resources.engine) as connection:
        return await resend(connection, ids, resources.rules.current(now), now, by="a test", carried=carried)


async def make_refused(resources: Resources, fake: FakeStripe, *values: str) -> str:
    """Deliveries that Stripe refuses at once, because their meter's name is not known there."""
    customer = await make_deliveries(resources, fake, *values)
    await run(resources, "UPDATE usage_deliveries SET event_name = 'gone'")
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT DISTINCT state FROM usage_deliveries") == [("parked",)]
    await run(resources, "UPDATE usage_deliveries SET event_name = :meter", meter=METER)
    return customer


async def test_what_stripe_refused_is_sent_again_under_its_own_identifier(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_refused(resources, fake_stripe, "1")
    (identifier,) = await identifiers(resources)
    assert await send_again(resources, identifier) == [Decision(identifier, sent_as=identifier)]
    await deliver_all(resources, datetime.now(UTC))
    assert [name for name, _ in await taken_by_stripe(fake_stripe)] == [identifier]
    tries = await read_all(resources, TRIES)
    assert [(number, outcome) for number, outcome, _ in tries] == [(1, "parked"), (2, "retry"), (3, "sent")]
    assert tries[1][2] == "resent by a test"
    assert (await conservation(resources)).sent == 1
    assert await send_again(resources, identifier) == [Decision(identifier, "not_parked")]


async def test_what_stripe_took_and_could_not_bill_is_sent_again_under_a_new_identifier(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_unbillable(resources, fake_stripe)
    await report(fake_stripe)
    await find_error_reports(resources, datetime.now(UTC))
    await fetch_error_reports(resources, datetime.now(UTC))
    before = await identifiers(resources)
    other = (await fake_stripe.client.v1.customers.create_async({})).id
    await run(
        resources,
        "UPDATE usage_deliveries SET customer = :other, payload = jsonb_set(payload, '{stripe_customer_id}',"
        " to_jsonb(CAST(:other AS text)))",
        other=other,
    )
    decisions = await send_again(resources, *before)
    assert {decision.sent_as for decision in decisions} == {f"{identifier}-r2" for identifier in before}
    await deliver_all(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [(1, "sent", None), (2, "sent", None)]
    assert {name for name, _ in await taken_by_stripe(fake_stripe)} == {*before, *await identifiers(resources)}
    assert any(
        f"no longer as {before[0]}, which Stripe took" in str(reason)
        for _, _, reason in await read_all(resources, TRIES)
    )


async def test_an_unknown_outcome_is_never_sent_again_by_hand(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    await deliver(resources, datetime.now(UTC))
    await deliver(resources, datetime.now(UTC) + timedelta(hours=24))
    (identifier,) = await identifiers(resources)
    for carried in (False, True):
        assert await send_again(resources, identifier, carried=carried) == [Decision(identifier, "outcome_unknown")]


async def test_a_refusal_after_a_try_whose_outcome_is_unknown_is_not_believed(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe, "1")
    await misbehave(fake_stripe, "timeout_after", seconds=0)
    await deliver(resources, datetime.now(UTC))
    await run(resources, "UPDATE usage_deliveries SET event_name = 'gone', next_attempt_at = now()")
    await deliver(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == [(1, "parked", "outcome_unknown")]


async def test_what_is_too_late_is_refused_with_the_alternatives_or_carried(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_closed(resources, fake_stripe, "1", "2", "3", "4")
    await deliver_all(resources, datetime.now(UTC))
    _, second, third, fourth = await identifiers(resources)
    assert await send_again(resources, second) == [Decision(second, "period_closed")]
    assert "invoice item" in ALTERNATIVES["period_closed"]
    await run(resources, "UPDATE usage_deliveries SET aggregation = 'max' WHERE value = 3")
    await run(resources, "UPDATE meters SET formula = 'last'")
    for carried in (False, True):
        assert await send_again(resources, third, carried=carried) == [Decision(third, "cannot_be_carried")]
    async with db.transaction(resources.engine) as connection:
        told = await explain(connection, third, resources.rules.current(datetime.now(UTC)), datetime.now(UTC))
        listed = await list_parked(connection, limit=10)
    assert told is not None
    assert (told["resend"], "carry" in told["remedy"]) == ("cannot_be_carried", False)
    assert {each["quantity"]: "carry" in each["remedy"] for each in listed} == {"2": True, "3": False, "4": True}
    await run(resources, "UPDATE meters SET formula = 'sum'")
    now = datetime.now(UTC)
    assert await send_again(resources, second, carried=True) == [Decision(second, sent_as=second)]
    await deliver_all(resources, datetime.now(UTC))
    ((state, at, carried_from),) = await read_all(
        resources, "SELECT state, timestamp, carried_from IS NOT NULL FROM usage_deliveries WHERE value = 2"
    )
    assert (state, carried_from) == ("sent", True)
    assert isinstance(at, int)
    assert at >= int(now.timestamp())
    await run(resources, "DELETE FROM billing_periods WHERE period_end > now()")
    assert await send_again(resources, fourth, carried=True) == [Decision(fourth, "no_open_period")]
    await conservation(resources)


async def test_many_counted_events_that_were_too_old_are_not_carried_to_be_counted_as_one(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    """They belonged to no customer for five weeks; one delivery says of all of them that it was too long."""
    customer = await make_deliveries(resources, fake_stripe, formula="count")
    events = [make_event(f"e{n}", at=last_hour()) for n in range(3)]
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)
    now = datetime.now(UTC)
    await seal_everything(resources, now + METER_EVENT_MAX_AGE)
    assert await read_all(resources, "SELECT events, state, reason FROM usage_deliveries") == [
        (3, "parked", "older_than_35_days")
    ]
    await run(resources, "UPDATE usage_deliveries SET timestamp = timestamp - 35 * 86400")
    await make_period(resources, now - timedelta(days=1), now + timedelta(days=29), customer=customer)
    (identifier,) = await identifiers(resources)
    assert await send_again(resources, identifier, carried=True) == [Decision(identifier, "cannot_be_carried")]
    async with db.transaction(resources.engine) as connection:
        ((id,),) = await read_all(resources, "SELECT id FROM usage_deliveries")
        assert isinstance(id, int)
        assert await carry(connection, [id], resources.rules.current(now), now) == set()
    assert await taken_by_stripe(fake_stripe) == []


async def test_what_is_older_than_stripe_takes_is_refused(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_refused(resources, fake_stripe, "1")
    at = int((datetime.now(UTC) - timedelta(days=35)).timestamp())
    await run(resources, "UPDATE usage_deliveries SET timestamp = :at", at=at)
    (identifier,) = await identifiers(resources)
    assert await send_again(resources, identifier) == [Decision(identifier, "older_than_35_days")]


async def test_what_is_voided_is_never_sent_and_stays_counted(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_refused(resources, fake_stripe, "5")
    (identifier,) = await identifiers(resources)
    async with db.transaction(resources.engine) as connection:
        decisions = await void(connection, [identifier, "unknown"], datetime.now(UTC), by="a test", note="waived")
    assert decisions == [Decision(identifier)]
    await deliver_all(resources, datetime.now(UTC) + timedelta(days=1))
    assert await read_all(resources, "SELECT state, reason FROM usage_deliveries") == [
        ("voided", "voided by a test: waived")
    ]
    assert (await conservation(resources)).voided == 5
    assert await send_again(resources, identifier) == [Decision(identifier, "not_parked")]


async def test_explain_tells_every_try_and_what_can_be_done(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_closed(resources, fake_stripe, "1", "2")
    await misbehave(fake_stripe, "rate_limit")
    now = datetime.now(UTC)
    await deliver_all(resources, now)
    first, second = await identifiers(resources)
    async with db.transaction(resources.engine) as connection:
        rules = resources.rules.current(now)
        waiting = await explain(connection, first, rules, now)
        late = await explain(connection, second, rules, now)
        assert await explain(connection, "unknown", rules, now) is None
        (listed,) = await list_parked(connection, reason="period_closed", meter=METER, limit=5)
        assert await list_parked(connection, reason="period_closed", meter="other", limit=5) == []
        assert await list_parked(connection, after=listed["number"], limit=5) == []
    assert listed["identifier"] == second
    assert waiting is not None
    assert late is not None
    assert [(each["outcome"], each["reason"], each["http_status"]) for each in waiting["tries"]] == [
        ("retry", "rate_limit", 429)
    ]
    assert waiting["tries"][0]["request_id"].startswith("req_")
    assert (waiting["state"], waiting["resend"]) == ("pending", "not_parked")
    assert (late["tries"], late["resend"], late["happened"]) == ([], "period_closed", PARKED["period_closed"].happened)


# HTTP


async def test_parked_usage_over_http(
    client: httpx.AsyncClient, anonymous: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    customer = await make_refused(resources, fake_stripe, "1", "2", "3")
    first, second, third = await identifiers(resources)
    page = (await client.get("/v1/usage/parked", params={"customer": "acme", "limit": 2})).json()
    assert [(row["quantity"], row["customer"]) for row in page["data"]] == [("3", customer), ("2", customer)]
    rest = (await client.get("/v1/usage/parked", params={"after": page["next"], "limit": 2})).json()
    assert ([row["identifier"] for row in rest["data"]], rest["next"]) == ([first], None)
    assert (await client.get("/v1/usage/parked", params={"reason": "period_closed"})).json()["data"] == []

    again = await client.post(f"/v1/usage/parked/{first}/resend")
    assert (again.status_code, again.json()) == (200, {"identifier": first, "sent_as": first})
    refused = await client.post(f"/v1/usage/parked/{first}/resend", json={"carry": True})
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:tallystick:problem:not-parked")
    voided = await client.post(f"/v1/usage/parked/{second}/void", json={"note": "a goodwill gesture"})
    assert (voided.status_code, voided.json()["sent_as"]) == (200, None)
    note = {"note": "paid with 4242 4242 4242 4242"}
    assert (await client.post(f"/v1/usage/parked/{third}/void", json=note)).json()["field"] == "note"
    assert (await client.post("/v1/usage/parked/unknown/resend")).status_code == 404
    assert (await anonymous.post(f"/v1/usage/parked/{third}/resend")).status_code == 401
    reasons = await read_all(resources, "SELECT reason FROM usage_deliveries WHERE state = 'voided'")
    assert re.fullmatch(r"voided by key [0-9a-f]{12}: a goodwill gesture", str(reasons[0][0]))


async def test_what_the_seal_itself_parked_is_listed(client: httpx.AsyncClient, resources: Resources) -> None:
    now = datetime.now(UTC)
    await make_customer(resources)
    await make_meter(resources)
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, [make_event(at=now - timedelta(days=34))], accepted_already=True)
    sealed_at = now + timedelta(days=2)
    assert await seal_due(resources, sealed_at) == 1
    answer = await client.get("/v1/usage/parked")
    assert answer.status_code == 200, answer.text
    (row,) = answer.json()["data"]
    assert (row["reason"], datetime.fromisoformat(row["since"])) == ("older_than_35_days", sealed_at)


async def test_only_an_operator_may_decide(client: httpx.AsyncClient, resources: Resources) -> None:
    await run(resources, "UPDATE api_keys SET scopes = '{usage:write,usage:read}'")
    assert (await client.get("/v1/usage/parked")).status_code == 200
    assert (await client.post("/v1/usage/parked/x/resend")).status_code == 403
    assert (await client.post("/v1/usage/parked/x/void", json={"note": "x"})).status_code == 403


# The command line


@pytest.fixture
def command(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = resources.settings
    for name, value in {
        "DATABASE_URL": settings.database_url.replace("+asyncpg", ""),
        "REDIS_URL": settings.redis_url,
        "STRIPE_API_KEY": "sk_test_for_tests",
        "STRIPE_WEBHOOK_SECRET": "whsec_for_tests",
    }.items():
        monkeypatch.setenv(name, value)


async def parked(*arguments: str) -> Result:
    import asyncio

    # A command has an event loop of its own.
    return await asyncio.to_thread(CliRunner().invoke, cli.app, ["parked", *arguments], catch_exceptions=False)


@pytest.mark.usefixtures("command")
async def test_parked_usage_on_the_command_line(resources: Resources, fake_stripe: FakeStripe) -> None:
    assert (await parked("list")).stdout == "Nothing is parked.\n"
    await make_closed(resources, fake_stripe, "1", "2", "3")
    await deliver_all(resources, datetime.now(UTC))
    _, second, third = await identifiers(resources)
    assert second in (await parked("list", "--customer", "acme")).stdout
    assert (await parked("list", "--reason", "period_close")).stdout == "Nothing of this is parked.\n"
    listed = json.loads((await parked("list", "--json")).stdout)
    assert [row["quantity"] for row in listed] == ["3", "2"]
    rows = (await parked("list")).stdout.splitlines()
    assert [listed[0]["customer"] in row and listed[0]["reason"] in row for row in rows] == [False, True, True]
    shown = (await parked("explain", second)).stdout
    assert PARKED["period_closed"].happened in shown
    assert "It was never tried." in shown

    assert "name the deliveries" in (await parked("resend")).stderr
    refused = await parked("resend", "--all")
    assert (refused.exit_code, refused.stdout) == (1, "To be sent again: 0.\n")
    assert ALTERNATIVES["period_closed"] in refused.stderr
    done = await parked("resend", "--reason", "period_closed", "--carry", "--json")
    assert [each["refused"] for each in json.loads(done.stdout)["decisions"]] == [None, None]
    await run(resources, "UPDATE usage_deliveries SET state = 'parked', reason = 'no_meter' WHERE value = 3")
    assert (await parked("void", third, "--note", "waived")).stdout == "Voided: 1.\n"
    assert (await parked("void", "unknown", "--note", "waived")).exit_code == 1
    assert await read_all(resources, "SELECT state FROM usage_deliveries ORDER BY value") == [
        ("sent",),
        ("pending",),
        ("voided",),
    ]


# The page


def test_the_page_explains_every_reason(project_root: Path) -> None:
    page = (project_root / "docs" / "deliveries.md").read_text()
    table = page.partition("## Why usage is parked")[2].partition("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == set(PARKED)
