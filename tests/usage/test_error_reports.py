"""What Stripe took and could not bill: noted with its webhook, fetched, and settled on the deliveries that it names."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from tallystick.resources import Resources
from tallystick.stripe_gateway import Connections
from tallystick.usage.delivery import deliver, deliver_all
from tallystick.usage.error_reports import fetch_error_reports, find_error_reports
from tests.conftest import WEBHOOK_SECRET, FakeStripe
from tests.serving import serve
from tests.usage.making import METER, conservation, read_all, run
from tests.usage.test_delivery import make_deliveries, misbehave, next_due

STATES = "SELECT value, state, split_part(reason, ':', 1) FROM usage_deliveries ORDER BY value"
REPORTED = [(1, "parked", "meter_event_customer_not_found"), (2, "parked", "meter_event_customer_not_found")]
TYPE = "v1.billing.meter.error_report_triggered"


async def make_unbillable(resources: Resources, fake: FakeStripe, *, send: bool = True) -> None:
    """Two deliveries for a customer that Stripe deletes before they are sent: it takes them, and bills nothing."""
    customer = await make_deliveries(resources, fake, "1", "2")
    await fake.client.v1.customers.delete_async(customer)
    if send:
        await deliver_all(resources, datetime.now(UTC))
        assert await read_all(resources, "SELECT DISTINCT state FROM usage_deliveries") == [("sent",)]


async def report(fake: FakeStripe) -> None:
    """Stripe gathers errors for a minute."""
    (await fake.control.post("/_fake/clock", json={"advance_seconds": 60})).raise_for_status()


async def test_a_report_parks_exactly_the_deliveries_that_it_names(
    app: object, resources: Resources, fake_stripe: FakeStripe
) -> None:
    async with serve(app) as url:
        endpoint = {"url": f"{url}/webhooks/stripe", "secret": WEBHOOK_SECRET, "enabled_events": [TYPE]}
        (await fake_stripe.control.post("/_fake/webhook_endpoints", json=endpoint)).raise_for_status()
        await make_unbillable(resources, fake_stripe)
        await report(fake_stripe)
        (await fake_stripe.control.post("/_fake/settle", json={})).raise_for_status()
    assert await fetch_error_reports(resources, datetime.now(UTC)) == 1
    assert await read_all(resources, STATES) == REPORTED
    assert await read_all(resources, "SELECT errors, found, meter IS NOT NULL FROM meter_error_reports") == [
        (2, 2, True)
    ]
    tries = "SELECT attempt, outcome, starts_with(request_id, 'evt_') FROM usage_delivery_attempts ORDER BY delivery_id"
    assert sorted(await read_all(resources, tries)) == [(1, "sent", False)] * 2 + [(2, "parked", True)] * 2
    told = "SELECT split_part(data->>'reason', ':', 1) FROM notifications WHERE type = 'usage.parked'"
    assert await read_all(resources, told) == [("meter_event_customer_not_found",)] * 2
    await conservation(resources)

    assert await fetch_error_reports(resources, datetime.now(UTC) + timedelta(days=1)) == 0
    assert await find_error_reports(resources, datetime.now(UTC)) == 1
    assert await fetch_error_reports(resources, datetime.now(UTC)) == 0, "it is known already"


@pytest.mark.parametrize("state", ["confirmed", "unknown", "pending"])
async def test_a_report_parks_a_delivery_whatever_was_believed_of_it(
    resources: Resources, fake_stripe: FakeStripe, state: str
) -> None:
    if state == "confirmed":
        await make_unbillable(resources, fake_stripe)
        await run(resources, "UPDATE usage_deliveries SET state = 'confirmed', confirmed_at = now()")
    else:
        await make_unbillable(resources, fake_stripe, send=False)
        for _ in range(2):
            await misbehave(fake_stripe, "timeout_after", seconds=0)
            await deliver(resources, datetime.now(UTC))
    if state == "unknown":
        await deliver_all(resources, datetime.now(UTC) + timedelta(hours=24))
        assert await read_all(resources, "SELECT DISTINCT reason FROM usage_deliveries") == [("outcome_unknown",)]
    await report(fake_stripe)
    await find_error_reports(resources, datetime.now(UTC))
    await fetch_error_reports(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == REPORTED
    assert await deliver_all(resources, await next_due(resources)) == 0


async def test_a_delivery_that_is_on_its_way_is_waited_for(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_unbillable(resources, fake_stripe)
    await report(fake_stripe)
    await find_error_reports(resources, datetime.now(UTC))
    await run(resources, "UPDATE usage_deliveries SET state = 'sending', lease_until = 'infinity' WHERE value = 2")
    now = datetime.now(UTC)
    assert await fetch_error_reports(resources, now) == 0
    await run(resources, "UPDATE usage_deliveries SET state = 'sent' WHERE value = 2")
    assert await fetch_error_reports(resources, now + timedelta(minutes=1)) == 1
    assert await read_all(resources, STATES) == REPORTED


async def test_a_report_that_cannot_be_fetched_is_tried_again(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_unbillable(resources, fake_stripe)
    await report(fake_stripe)
    await find_error_reports(resources, datetime.now(UTC))
    fault = {"kind": "error_500", "path": "/v2/core/events/*", "times": 1}
    (await fake_stripe.control.post("/_fake/faults", json=fault)).raise_for_status()
    now = datetime.now(UTC)
    assert await fetch_error_reports(resources, now) == 0
    assert await fetch_error_reports(resources, now) == 0, "not at once"
    assert await fetch_error_reports(resources, now + timedelta(seconds=1)) == 1
    assert await read_all(resources, STATES) == REPORTED


async def test_what_a_report_names_and_nobody_knows_is_counted_and_logged(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_unbillable(resources, fake_stripe, send=False)
    for identifier in ("somebody-elses", "unknown.3.0a1b"):
        await fake_stripe.client.v1.billing.meter_events.create_async(
            {
                "event_name": METER,
                "identifier": identifier,
                "payload": {"stripe_customer_id": "cus_nobody", "value": "1"},
            },
            {"idempotency_key": identifier},
        )
    await report(fake_stripe)
    await find_error_reports(resources, datetime.now(UTC))
    with capture_logs() as lines:
        await fetch_error_reports(resources, datetime.now(UTC))
    [line] = [line for line in lines if line["event"] == "usage_not_billed"]
    assert (line["found"], line["named"], line["event_id"].startswith("evt_")) == (0, 2, True)
    assert await read_all(resources, "SELECT errors, found FROM meter_error_reports") == [(2, 0)]
    assert await read_all(resources, "SELECT DISTINCT state FROM usage_deliveries") == [("pending",)]


async def test_stripes_list_that_cannot_be_read_is_no_error(resources: Resources, fake_stripe: FakeStripe) -> None:
    fault = {"kind": "error_500", "path": "/v2/core/events", "times": 1}
    (await fake_stripe.control.post("/_fake/faults", json=fault)).raise_for_status()
    assert await find_error_reports(resources, datetime.now(UTC)) == 0


async def test_both_documented_names_of_a_samples_request_are_read(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_unbillable(resources, fake_stripe)
    await report(fake_stripe)
    await find_error_reports(resources, datetime.now(UTC))
    call = Connections.request_async

    async def rename(self: Connections, *call_of: Any, **more: Any) -> tuple[bytes, int, Mapping[str, str]]:
        body, status, headers = await call(self, *call_of, **more)
        return body.replace(b'{"identifier"', b'{"idempotency_key"'), status, headers

    monkeypatch.setattr(Connections, "request_async", rename)
    await fetch_error_reports(resources, datetime.now(UTC))
    assert await read_all(resources, STATES) == REPORTED


async def test_a_repeat_that_is_reported_parks_nothing(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stripe does not say that it reports repeats. Parked, one could be resent under another identifier."""
    await make_unbillable(resources, fake_stripe)
    await report(fake_stripe)
    await find_error_reports(resources, datetime.now(UTC))
    call = Connections.request_async

    async def rename(self: Connections, *call_of: Any, **more: Any) -> tuple[bytes, int, Mapping[str, str]]:
        body, status, headers = await call(self, *call_of, **more)
        return body.replace(b"meter_event_customer_not_found", b"duplicate_meter_event"), status, headers

    monkeypatch.setattr(Connections, "request_async", rename)
    assert await fetch_error_reports(resources, datetime.now(UTC)) == 1
    assert await read_all(resources, "SELECT DISTINCT state FROM usage_deliveries") == [("sent",)]
