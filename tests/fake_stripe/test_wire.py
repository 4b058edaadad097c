"""The wire: keys, parameters, lists, idempotency, and misbehaviour on demand."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import stripe

from tests.fake_stripe.conftest import DAY, START, Fake


def test_an_api_key_is_needed(fake: Fake) -> None:
    assert fake.control.get("/v1/customers").status_code == 401
    assert fake.raw("GET", "/v1/customers", Authorization="Bearer sk_live_1").status_code == 401
    assert fake.control.get("/v1/customers", auth=("sk_test_1", "")).status_code == 200
    with pytest.raises(stripe.AuthenticationError):
        fake.sdk("pk_test_1").v1.customers.list()


def test_unknown_urls_are_404_as_stripe_writes_them(fake: Fake) -> None:
    for method, path in (("GET", "/v1/nothing"), ("DELETE", "/v1/customers"), ("PUT", "/v1/customers"), ("GET", "/x")):
        answer = fake.raw(method, path)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "params", "param", "code"),
    [
        ("customers", {"nmae": "x"}, "nmae", "parameter_unknown"),
        ("subscriptions", {"items[0][prize]": "x"}, "items[0][prize]", "parameter_unknown"),
        ("prices", {"unit_amount": "1"}, "currency", "parameter_missing"),
        ("prices", {"currency": "usd", "recurring[usage_type]": "metered"}, "recurring[interval]", "parameter_missing"),
        ("prices", {"currency": "usd", "unit_amount": "1.5"}, "unit_amount", "parameter_invalid_integer"),
        ("subscriptions", {"cancel_at_period_end": "yes"}, "cancel_at_period_end", "parameter_invalid_boolean"),
        ("subscriptions", {"payment_behavior": "sometimes"}, "payment_behavior", None),
        ("customers", {"balance": "5"}, "balance", None),  # the SDK has it, the fake does nothing with it
        ("subscriptions", {"customer": "cus_unknown"}, "customer", "resource_missing"),
    ],
)
def test_parameters_that_stripe_would_not_take(
    fake: Fake, path: str, params: dict[str, str], param: str, code: str | None
) -> None:
    answer = fake.raw("POST", f"/v1/{path}", params)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error.get("code")) == (400, param, code)
    assert answer.headers["request-id"].startswith("req_")


def test_metadata_merges_and_unsets(fake: Fake) -> None:
    customers = fake.client.v1.customers
    customer = customers.create({"name": "A", "metadata": {"a": "1", "b": "2"}})
    updated = customers.update(customer.id, {"metadata": {"a": "", "c": "3"}}).to_dict()
    assert updated["metadata"] == {"b": "2", "c": "3"}
    updated = customers.update(customer.id, {"metadata": "", "name": ""}).to_dict()
    assert (updated["metadata"], updated["name"]) == ({}, None)
    assert customers.delete(customer.id).deleted
    assert customers.retrieve(customer.id).deleted


def test_lists_page_both_ways(fake: Fake) -> None:
    made = [fake.client.v1.customers.create({"name": str(number)}).id for number in range(5)]
    newest_first = made[::-1]
    page = fake.client.v1.customers.list({"limit": 2})
    assert ([entry.id for entry in page.data], page.has_more) == (newest_first[:2], True)
    assert [entry.id for entry in page.auto_paging_iter()] == newest_first
    page = fake.client.v1.customers.list({"limit": 2, "ending_before": newest_first[4]})
    assert ([entry.id for entry in page.data], page.has_more) == (newest_first[2:4], True)
    page = fake.client.v1.customers.list({"limit": 2, "starting_after": newest_first[2]})
    assert ([entry.id for entry in page.data], page.has_more) == (newest_first[3:], False)
    for limit in (0, 101):
        with pytest.raises(stripe.InvalidRequestError):
            fake.client.v1.customers.list({"limit": limit})


def test_events_are_filtered_and_kept_30_days(fake: Fake) -> None:
    events = fake.client.v1.events
    customer = fake.customer()
    fake.move(START + 10)
    fake.client.v1.customers.update(customer, {"name": "Other"})
    assert [event.type for event in events.list({"types": ["customer.updated"]}).data] == ["customer.updated"]
    assert {event.type for event in events.list({"type": "customer.*"}).data} == {
        "customer.created",
        "customer.updated",
    }
    later = events.list({"created": {"gt": START}}).data
    assert [event.data.to_dict()["previous_attributes"] for event in later] == [{"name": "Acme"}]
    assert later[0].request is not None
    assert later[0].request.idempotency_key
    with pytest.raises(stripe.InvalidRequestError):
        events.list({"types": ["customer.created"] * 21})
    fake.move(START + 30 * DAY + 5)
    assert [event.type for event in events.list().data] == ["customer.updated"]


def test_expansion(fake: Fake) -> None:
    customer = fake.customer()
    subscription: Any = fake.subscribe(customer, fake.price(amount="900"), expand=["latest_invoice.customer"])
    assert subscription.latest_invoice.customer.id == customer
    listed: Any = fake.client.v1.subscriptions.list({"expand": ["data.customer"]}).data[0]
    assert listed.customer.name == "Acme"
    with pytest.raises(stripe.InvalidRequestError):
        fake.client.v1.customers.retrieve(customer, {"expand": ["nothing"]})


def test_same_key_replays_the_first_answer(fake: Fake) -> None:
    first = fake.raw("POST", "/v1/customers", {"name": "A"}, Idempotency_Key="k")
    again = fake.raw("POST", "/v1/customers", {"name": "A"}, Idempotency_Key="k")
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    with pytest.raises(stripe.IdempotencyError):
        fake.client.v1.customers.create({"name": "B"}, {"idempotency_key": "k"})
    fake.move(START + DAY)
    assert fake.raw("POST", "/v1/customers", {"name": "A"}, Idempotency_Key="k").json()["id"] != first.json()["id"]


def test_refused_parameters_are_not_kept_under_the_key(fake: Fake) -> None:
    assert fake.raw("POST", "/v1/customers", {"nmae": "A"}, Idempotency_Key="k").status_code == 400
    assert fake.raw("POST", "/v1/customers", {"name": "A"}, Idempotency_Key="k").status_code == 200


def test_500_is_replayed_and_a_new_key_gets_through(fake: Fake) -> None:
    fake.post("faults", {"kind": "error_500", "method": "POST", "path": "/v1/customers", "times": 1})
    for _ in range(2):
        with pytest.raises(stripe.APIError) as failed:
            fake.client.v1.customers.create({"name": "A"}, {"idempotency_key": "k"})
        assert failed.value.http_status == 500
    assert fake.client.v1.customers.list().data == []
    fake.client.v1.customers.create({"name": "A"}, {"idempotency_key": "other"})
    assert fake.get("faults")["faults"][0]["struck"] == 1


@pytest.mark.parametrize("cached", [True, False])
def test_429_is_replayed_only_if_cached(fake: Fake, cached: bool) -> None:
    fake.post("faults", {"kind": "rate_limit", "times": 1, "cached": cached})
    with pytest.raises(stripe.RateLimitError):
        fake.client.v1.customers.create({"name": "A"}, {"idempotency_key": "k"})
    assert fake.raw("POST", "/v1/customers", {"name": "A"}, Idempotency_Key="k").status_code == (429 if cached else 200)


def test_dropped_before_is_not_done_and_dropped_after_is(fake: Fake) -> None:
    for kind, done in (("drop_before", 0), ("timeout_after", 1), ("error_500_after", 2)):
        fake.post("faults", {"kind": kind, "method": "POST", "times": 1, "seconds": "0.05"})
        with pytest.raises((stripe.APIConnectionError, stripe.APIError)) as failed:
            fake.client.v1.customers.create({"name": "A"})
        assert "Timeout" not in str(failed.value)
        assert len(fake.client.v1.customers.list().data) == done


def test_sdk_retry_with_one_key_does_the_work_once(fake: Fake) -> None:
    fake.post("faults", {"kind": "drop_before", "method": "POST", "times": 1})
    fake.post("faults", {"kind": "timeout_after", "method": "POST", "times": 1, "seconds": 0})
    fake.sdk(retries=2).v1.customers.create({"name": "A"})
    assert len(fake.client.v1.customers.list().data) == 1
    calls = [call for call in fake.get("requests")["requests"] if call["method"] == "POST"]
    assert len({call["idempotency_key"] for call in calls}) == 1
    assert [call["status"] for call in calls] == [200, 200, None]


def test_key_in_use_is_409(fake: Fake) -> None:
    fake.post("faults", {"kind": "slow", "method": "POST", "times": 1, "seconds": 1})
    create = fake.client.v1.customers.create
    first = threading.Thread(target=create, args=({"name": "A"}, {"idempotency_key": "k"}))
    first.start()
    while not fake.get("faults")["faults"][0]["struck"]:
        assert first.is_alive()
    with pytest.raises(stripe.APIError) as refused:
        create({"name": "A"}, {"idempotency_key": "k"})
    assert refused.value.http_status == 409
    assert refused.value.error is not None
    assert refused.value.error.code == "idempotency_key_in_use"
    first.join()


def test_rate_limits_can_be_switched_on(fake: Fake) -> None:
    fake.post("settings", {"rate_limit_per_second": 1})
    statuses = {fake.raw("GET", "/v1/customers").status_code for _ in range(20)}
    assert statuses == {200, 429}
    assert fake.control.post("/_fake/settings", json={"rate_limit_per_second": "many"}).status_code == 400


def test_faults_are_chosen_by_chance_from_the_seed(fake: Fake) -> None:
    outcomes = []
    for _ in range(2):
        fake.post("reset", {"seed": 7})
        fake.post("faults", {"kind": "rate_limit", "path": "/v1/cust*", "probability": "0.5"})
        outcomes.append([fake.raw("GET", "/v1/customers").status_code for _ in range(20)])
    assert outcomes[0] == outcomes[1]
    assert set(outcomes[0]) == {200, 429}
    assert fake.raw("GET", "/v1/prices").status_code == 200
    fake.control.delete("/_fake/faults")
    assert {fake.raw("GET", "/v1/customers").status_code for _ in range(20)} == {200}


def test_malformed_control_calls_are_refused(fake: Fake) -> None:
    for path, body in (
        ("faults", {"kind": "nothing"}),
        ("clock", {"to": "tomorrow"}),
        ("clock", {"advance_seconds": 10**12}),
        ("webhooks", {"loud": True}),
        ("settings", {"nothing": 1}),
    ):
        fake.post(path, body, status=400)
    assert fake.control.post("/_fake/clock", content=b"{").status_code == 400
