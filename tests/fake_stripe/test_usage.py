"""Meter events: what is refused, what is reported later, what adds up."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Any

import pytest
import stripe

from tests.fake_stripe.conftest import DAY, SECRET, START, Fake, Receiver

MINUTE = START // 60 * 60
HOUR = START // 3600 * 3600


def total(fake: Fake, meter: str, customer: str, **more: Any) -> list[float]:
    params: Any = {"customer": customer, "start_time": HOUR - 35 * DAY, "end_time": HOUR + 2 * DAY, **more}
    return [summary.aggregated_value for summary in fake.client.v1.billing.meters.event_summaries.list(meter, params)]


def test_identifier_is_unique_for_24_hours(fake: Fake) -> None:
    customer, meter = fake.customer(), fake.meter()
    fake.use(customer, "1", "once")
    with pytest.raises(stripe.InvalidRequestError, match=r": An event already exists with identifier once\.$"):
        fake.use(customer, "1", "once")
    fake.move(START + DAY - 1)
    with pytest.raises(stripe.InvalidRequestError, match="An event already exists with identifier"):
        fake.use(customer, "1", "once")
    assert total(fake, meter, customer) == [1]
    fake.move(START + DAY)
    fake.use(customer, "1", "once")
    assert total(fake, meter, customer) == [2]


@pytest.mark.parametrize(("age", "accepted"), [(35 * DAY, True), (35 * DAY + 1, False), (-300, True), (-301, False)])
def test_timestamp_window(fake: Fake, age: int, accepted: bool) -> None:
    customer, meter = fake.customer(), fake.meter()
    if accepted:
        fake.use(customer, "1", at=START - age)
    else:
        with pytest.raises(stripe.InvalidRequestError) as refused:
            fake.use(customer, "1", at=START - age)
        assert refused.value.param == "timestamp"
    assert len(fake.get("meter_events")["meter_events"]) == accepted
    assert meter


@pytest.mark.parametrize(
    ("value", "accepted"),
    [("123456789012345", True), ("1234567890123456", False), ("0.00000000000001", True), ("-2.5", True)]
    + [(value, False) for value in ("1e3", "", "abc", "1_000", "NaN", " 1", "--1")],
)
def test_value_is_a_decimal_of_15_digits(fake: Fake, value: str, accepted: bool) -> None:
    customer, _ = fake.customer(), fake.meter()
    if accepted:
        fake.use(customer, value)
    else:
        with pytest.raises(stripe.InvalidRequestError):
            fake.use(customer, value)


def test_formulas(fake: Fake) -> None:
    customer = fake.customer()
    meters = {formula: fake.meter(formula, formula) for formula in ("sum", "count", "last")}
    for formula in meters:
        for moment, value in ((START, "5"), (START - 7200, "2.5"), (START, "4")):
            payload = {"stripe_customer_id": customer, "value": value}
            params: Any = {"event_name": formula, "payload": payload, "timestamp": moment}
            fake.client.v1.billing.meter_events.create(params)
    assert {formula: total(fake, meter, customer) for formula, meter in meters.items()} == {
        "sum": [11.5],
        "count": [3],
        "last": [4],  # the latest timestamp, and of those the last received
    }


def test_event_time_window_replaces_within_the_hour(fake: Fake) -> None:
    customer, meter = fake.customer(), fake.meter(event_time_window="hour")
    for moment, value in ((HOUR, "5"), (HOUR + 60, "3"), (HOUR - 1, "100")):
        fake.use(customer, value, at=moment)
    assert total(fake, meter, customer) == [103]


def test_summaries_are_aligned_grouped_paged_and_lag(fake: Fake) -> None:
    customer, meter = fake.customer(), fake.meter()
    for hours in range(5):
        fake.use(customer, "1.5", at=HOUR - hours * 3600)
    with pytest.raises(stripe.InvalidRequestError, match="minute"):
        total(fake, meter, customer, start_time=START)
    with pytest.raises(stripe.InvalidRequestError, match="hour"):
        total(fake, meter, customer, start_time=HOUR - 60, value_grouping_window="hour")
    # end_time is exclusive
    assert total(fake, meter, customer, start_time=HOUR - 60, end_time=HOUR) == []
    assert total(fake, meter, customer, start_time=HOUR, end_time=HOUR + 60) == [1.5]
    params: Any = {
        "customer": customer,
        "start_time": HOUR - 4 * 3600,
        "end_time": HOUR + 3600,
        "value_grouping_window": "hour",
        "limit": 2,
    }
    page = fake.client.v1.billing.meters.event_summaries.list(meter, params)
    assert (len(page.data), page.has_more) == (2, True)
    assert len({summary.start_time for summary in page.auto_paging_iter()}) == 5

    fake.post("settings", {"summary_lag_seconds": 30})
    fake.use(customer, "1")
    assert total(fake, meter, customer) == []
    fake.move(START + 29)
    assert total(fake, meter, customer) == []
    fake.move(START + 30)
    assert total(fake, meter, customer) == [8.5]


def test_cancelled_event_counts_no_more_and_keeps_its_identifier(fake: Fake) -> None:
    customer, meter = fake.customer(), fake.meter()
    fake.use(customer, "5", "wrong")
    fake.use(customer, "1", "right")
    cancel: Any = {"event_name": "calls", "type": "cancel", "cancel": {"identifier": "wrong"}}
    fake.client.v1.billing.meter_event_adjustments.create(cancel)
    assert total(fake, meter, customer) == [1]
    with pytest.raises(stripe.InvalidRequestError, match="already exists"):
        fake.use(customer, "5", "wrong")
    fake.move(START + DAY)
    cancel["cancel"]["identifier"] = "right"
    with pytest.raises(stripe.InvalidRequestError):
        fake.client.v1.billing.meter_event_adjustments.create(cancel)


def test_unknown_event_name_is_refused_at_once(fake: Fake) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="No active meter"):
        fake.use(fake.customer(), "1")


def test_unknown_customer_and_archived_meter_are_reported_by_thin_event(fake: Fake, receiver: Receiver) -> None:
    name = "v1.billing.meter.error_report_triggered"
    fake.listen(receiver, "*", name)
    customer, meter = fake.customer(), fake.meter()
    fake.use("cus_nobody", "1", "lost")
    fake.client.v1.billing.meters.deactivate(meter)
    fake.use(customer, "1", "late")
    fake.move(START + 60)
    delivered = next(entry for entry in receiver.wait_for(name) if entry["event"]["type"] == name)
    assert "data" not in delivered["event"]

    notification: Any = fake.client.parse_event_notification(delivered["body"], delivered["header"], SECRET)
    event = notification.fetch_event()
    assert event.data.reason.error_count == 2
    codes = {kind.code: kind.sample_errors[0].request.identifier for kind in event.data.reason.error_types}
    assert codes.keys() == {"meter_event_customer_not_found", "archived_meter"}
    assert notification.fetch_related_object().id == meter
    assert total(fake, meter, customer) == []


def test_thin_events_are_listed_by_page_type_object_and_time(fake: Fake) -> None:
    meters = [fake.meter("calls"), fake.meter("other")]
    for event_name in ("calls", "other"):
        payload = {"stripe_customer_id": "cus_nobody", "value": "1"}
        fake.client.v1.billing.meter_events.create({"event_name": event_name, "payload": payload})
        fake.move(fake.now() + 60)
    events = fake.client.v2.core.events
    name = "v1.billing.meter.error_report_triggered"
    listed = [event.id for event in events.list({"limit": 1, "types": [name]}).auto_paging_iter()]
    assert len(set(listed)) == 2
    assert [event.id for event in events.list({"object_id": meters[0]}).data] == listed[1:]
    second = datetime.fromtimestamp(START + 120, UTC).isoformat()
    assert [event.id for event in events.list({"created": {"gte": second}}).data] == listed[:1]
    assert events.list({"types": ["v1.billing.meter.no_meter_found"]}).data == []
    fake.move(START + 31 * DAY)
    assert events.list().data == []


def test_stream_takes_events_with_a_session_token_and_checks_them_later(fake: Fake, receiver: Receiver) -> None:
    no_meter = "v1.billing.meter.no_meter_found"
    fake.listen(receiver, no_meter)
    customer, meter = fake.customer(), fake.meter()
    session = fake.client.v2.billing.meter_event_session.create()
    stream = fake.sdk(session.authentication_token).v2.billing.meter_event_stream
    payload = {"stripe_customer_id": customer, "value": "2.25"}
    good: Any = {"event_name": "calls", "payload": payload, "identifier": "s1", "timestamp": "2026-01-31T09:15:00Z"}
    stream.create({"events": [good, good, {"event_name": "nothing", "payload": payload}]})
    assert total(fake, meter, customer) == [2.25]
    with pytest.raises(stripe.InvalidRequestError):
        stream.create({"events": [good] * 101})
    with pytest.raises(stripe.AuthenticationError):
        fake.client.v2.billing.meter_event_stream.create({"events": [good]})
    fake.move(START + 60)
    receiver.wait_for(no_meter)
    fake.move(START + 15 * 60)
    with pytest.raises(stripe.TemporarySessionExpiredError):
        stream.create({"events": [good]})


def test_meter_event_of_v2(fake: Fake) -> None:
    customer, meter = fake.customer(), fake.meter()
    params: Any = {"event_name": "calls", "payload": {"stripe_customer_id": customer, "value": "3"}, "identifier": "x"}
    assert fake.client.v2.billing.meter_events.create(params).timestamp == "2026-01-31T09:15:07.000Z"
    with pytest.raises(stripe.InvalidRequestError, match="already exists"):
        fake.client.v2.billing.meter_events.create(params)
    assert total(fake, meter, customer) == [3]


def test_usage_records_answer_to_versions_before_basil_only(fake: Fake) -> None:
    old: Any = {"Stripe_Version": "2025-02-24.acacia"}
    product = fake.client.v1.products.create({"name": "Old"}).id
    price = {"currency": "usd", "unit_amount": "10", "product": product, "recurring[interval]": "month"}
    price["recurring[usage_type]"] = "metered"
    assert fake.raw("POST", "/v1/prices", price).status_code == 400
    price_id = fake.raw("POST", "/v1/prices", price, **old).json()["id"]
    customer = fake.customer()
    subscription = fake.subscribe(customer, price_id)
    path = f"/v1/subscription_items/{subscription['items'].data[0].id}/usage_records"
    record = {"quantity": "5", "timestamp": str(START)}
    assert fake.raw("POST", path, record).status_code == 404
    assert fake.raw("POST", path, record | {"timestamp": str(START - 1)}, **old).status_code == 400
    assert fake.raw("POST", path, record | {"quantity": "1.5"}, **old).status_code == 400
    for _ in range(2):
        assert fake.raw("POST", path, record, Idempotency_Key="a", **old).status_code == 200
    fake.raw("POST", path, record, Idempotency_Key="b", **old)
    fake.raw("POST", path, {"quantity": "7", "timestamp": str(START + 1), "action": "set"}, **old)
    fake.raw("POST", path, {"quantity": "3", "timestamp": str(START + 1), "action": "set"}, **old)
    answer = fake.raw("GET", f"/v1/subscriptions/{subscription.id}", **old).json()
    assert "current_period_end" in answer
    fake.move(answer["current_period_end"] + 3600)
    assert fake.invoices(customer)[0].amount_paid == 130


def test_one_call_at_a_time_for_a_customer_and_meter(fake: Fake) -> None:
    customer, other, _ = fake.customer(), fake.customer(), fake.meter()
    fake.post("faults", {"kind": "slow", "path": "/v1/billing/meter_events", "times": 1, "seconds": 1})
    first = threading.Thread(target=fake.use, args=(customer, "1", "first"))
    first.start()
    while not fake.get("faults")["faults"][0]["struck"]:  # each look is a round trip: no busy loop
        assert first.is_alive()
    with pytest.raises(stripe.RateLimitError) as refused:
        fake.use(customer, "1", "second")
    assert refused.value.error is not None
    assert refused.value.error.code == "lock_timeout"
    fake.use(other, "1")
    first.join()
    fake.use(customer, "1", "second")
    assert len(fake.get("meter_events")["meter_events"]) == 3
