"""A month and what may go wrong in it: periods, drafts, payments, retries, trials, cancellation."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
import stripe

from tests.fake_stripe.conftest import DAY, START, Fake, Receiver

HOUR = 3600
# 31 January plus one month is clamped; the month after that is counted from the anchor again.
FIRST_END = int(datetime(2026, 2, 28, 9, 15, 7, tzinfo=UTC).timestamp())
SECOND_END = int(datetime(2026, 3, 31, 9, 15, 7, tzinfo=UTC).timestamp())


def test_month_with_odd_second_anchor_is_billed_to_the_last_digit(fake: Fake) -> None:
    customer = fake.customer()
    subscription = fake.subscribe(customer, fake.price(fake.meter(), "0.25"))
    assert subscription["items"].data[0].current_period_start == START
    assert subscription["items"].data[0].current_period_end == FIRST_END

    fake.use(customer, "0.000000000001", at=START)
    fake.use(customer, "123456.789012345")
    fake.use(customer, "5", at=START - 1)  # before the period: on no invoice of it
    fake.move(FIRST_END - 10)
    fake.use(customer, "7", at=FIRST_END - 1)
    fake.use(customer, "11", at=FIRST_END)  # the end belongs to the next period

    fake.move(FIRST_END + HOUR)
    invoice = fake.invoices(customer)[0]
    line = invoice.lines.data[0]
    assert (line.period.start, line.period.end) == (START, FIRST_END)
    assert line.quantity_decimal == Decimal("123463.789012345001")
    assert line.quantity == 123463
    assert invoice.amount_due == 30866  # 30865.947… cents
    assert invoice.status == "paid"
    assert invoice.parent.subscription_details.subscription == subscription.id

    fake.move(SECOND_END + HOUR)
    assert fake.invoices(customer)[0].lines.data[0].quantity_decimal == Decimal(11)


def test_period_rolls_with_previous_attributes(fake: Fake, receiver: Receiver) -> None:
    fake.subscribe(fake.customer(), fake.price(fake.meter()))
    fake.listen(receiver)
    fake.move(FIRST_END)
    receiver.wait_for("customer.subscription.updated", "invoice.created")
    event = receiver.events("customer.subscription.updated")[0]
    assert event["created"] == FIRST_END
    now, before = event["data"]["object"]["items"]["data"][0], event["data"]["previous_attributes"]["items"]["data"][0]
    assert (before["current_period_start"], before["current_period_end"]) == (START, FIRST_END)
    assert (now["current_period_start"], now["current_period_end"]) == (FIRST_END, SECOND_END)


def test_draft_follows_the_usage_and_finalizing_fixes_it(fake: Fake) -> None:
    customer = fake.customer()
    fake.subscribe(customer, fake.price(fake.meter(), "100"))
    fake.use(customer, "1")
    fake.move(FIRST_END + 60)
    draft = fake.invoices(customer)[0]
    assert (draft.status, draft.amount_due) == ("draft", 100)
    fake.use(customer, "2.5", at=FIRST_END - 1)
    draft = fake.client.v1.invoices.retrieve(draft.id)
    assert (draft.status, draft.amount_due) == ("draft", 350)

    fake.use(customer, "0.5", at=FIRST_END - 1)  # nobody looks at the draft after this
    fake.move(FIRST_END + HOUR)
    fake.use(customer, "7", at=FIRST_END - 1)  # too late for this invoice, and on no other
    final = fake.client.v1.invoices.retrieve(draft.id)
    assert (final.status, final.amount_paid, final.lines.data[0].quantity_decimal) == ("paid", 400, Decimal(4))
    fake.move(SECOND_END + HOUR)
    assert fake.invoices(customer)[0].amount_due == 0


def test_negative_total_bills_as_zero(fake: Fake) -> None:
    customer = fake.customer()
    fake.subscribe(customer, fake.price(fake.meter()))
    fake.use(customer, "-3")
    fake.move(FIRST_END + HOUR)
    invoice = fake.invoices(customer)[0]
    assert (invoice.amount_due, invoice.lines.data[0].quantity_decimal) == (0, Decimal(0))


def test_declined_payment_is_retried_and_paying_late_makes_active_again(fake: Fake) -> None:
    customer = fake.customer("pm_card_chargeCustomerFail")
    subscription = fake.subscribe(customer, fake.price(fake.meter())).id
    fake.use(customer, "3")
    fake.move(FIRST_END + HOUR)
    finalized = FIRST_END + HOUR
    invoice = fake.invoices(customer)[0]
    assert (invoice.status, invoice.attempt_count) == ("open", 1)
    assert invoice.next_payment_attempt == finalized + 3 * DAY
    assert fake.status(subscription) == "past_due"
    types = fake.event_types()
    assert types.index("invoice.payment_failed") < len(types) - 1 - types[::-1].index("customer.subscription.updated")

    performed = fake.move(finalized + 6 * DAY)
    assert [entry["at"] for entry in performed] == [finalized + 3 * DAY, finalized + 5 * DAY]
    with pytest.raises(stripe.CardError):
        fake.client.v1.invoices.pay(invoice.id)

    card = fake.client.v1.payment_methods.attach("pm_card_visa", {"customer": customer}).id
    fake.client.v1.customers.update(customer, {"invoice_settings": {"default_payment_method": card}})
    paid = fake.client.v1.invoices.pay(invoice.id, {"expand": ["payments"]})
    assert paid.status == "paid"
    assert paid.payments is not None
    assert paid.payments.data[0].amount_paid == 300
    assert fake.status(subscription) == "active"
    assert {"invoice.paid", "invoice.payment_succeeded"} <= set(fake.event_types())


@pytest.mark.parametrize("outcome", ["unpaid", "canceled", "past_due"])
def test_what_follows_the_last_retry_is_a_setting(fake: Fake, outcome: str) -> None:
    fake.post("settings", {"after_last_retry": outcome})
    customer = fake.customer("pm_card_chargeCustomerFail")
    subscription = fake.subscribe(customer, fake.price(fake.meter())).id
    fake.use(customer, "3")
    fake.move(FIRST_END + HOUR + 7 * DAY)
    assert fake.status(subscription) == outcome
    assert fake.invoices(customer)[0].attempt_count == 4
    assert ("customer.subscription.deleted" in fake.event_types()) is (outcome == "canceled")


def test_paid_out_of_band_is_no_payment(fake: Fake) -> None:
    customer = fake.customer(None)
    subscription = fake.subscribe(customer, fake.price(fake.meter())).id
    fake.use(customer, "3")
    fake.move(FIRST_END + HOUR)
    assert "invoice.payment_failed" in fake.event_types()  # also without any payment method
    before = fake.event_types().count("invoice.payment_succeeded")
    fake.client.v1.invoices.pay(fake.invoices(customer)[0].id, {"paid_out_of_band": True})
    assert fake.event_types().count("invoice.payment_succeeded") == before
    assert fake.event_types().count("invoice.paid") > before
    assert fake.status(subscription) == "active"


def test_finalization_waits_for_the_answer_to_invoice_created(fake: Fake, receiver: Receiver) -> None:
    customer = fake.customer()
    fake.subscribe(customer, fake.price(fake.meter()))
    fake.listen(receiver, "invoice.created")
    receiver.always = 500
    fake.move(FIRST_END + 2 * HOUR, settle_seconds=0)
    draft = fake.invoices(customer)[0]
    assert draft.status == "draft"
    receiver.always = 200
    receiver.wait_for("invoice.created")
    fake.post("settle")
    # The hour begins with the answer, which came after two hours.
    assert fake.client.v1.invoices.retrieve(draft.id).automatically_finalizes_at == FIRST_END + 3 * HOUR
    fake.move(FIRST_END + 3 * HOUR - 1)
    assert fake.client.v1.invoices.retrieve(draft.id).status == "draft"
    fake.move(FIRST_END + 3 * HOUR)
    assert fake.client.v1.invoices.retrieve(draft.id).status == "paid"


def test_moving_the_clock_waits_for_an_answer_on_its_way(fake: Fake, receiver: Receiver) -> None:
    customer = fake.customer()
    fake.subscribe(customer, fake.price(fake.meter()))
    fake.listen(receiver, "invoice.created")
    receiver.answers = [500, 503]
    fake.move(FIRST_END + HOUR)
    assert [entry["status"] for entry in receiver.got] == [500, 503, 200]
    assert fake.invoices(customer)[0].status == "paid"


def test_unanswered_invoice_is_finalized_after_72_hours(fake: Fake, receiver: Receiver) -> None:
    customer = fake.customer()
    fake.subscribe(customer, fake.price(fake.meter()))
    fake.listen(receiver, "invoice.created")
    receiver.always = 302
    fake.move(FIRST_END + 72 * HOUR - 1, settle_seconds=0)
    assert fake.invoices(customer)[0].status == "draft"
    fake.move(FIRST_END + 72 * HOUR, settle_seconds=0)
    assert fake.invoices(customer)[0].status == "paid"


def test_upcoming_invoice_has_no_id(fake: Fake, receiver: Receiver) -> None:
    fake.post("settings", {"upcoming_invoice_days": 0})
    customer = fake.customer()
    subscription = fake.subscribe(customer, fake.price(fake.meter(), "100"), fake.price(amount="900"))
    fake.post("settings", {"upcoming_invoice_days": 7})
    fake.listen(receiver, "invoice.upcoming")
    fake.use(customer, "2")
    fake.move(FIRST_END - 2)
    receiver.wait_for("invoice.upcoming")
    fake.client.v1.subscriptions.update(subscription.id, {"metadata": {"a": "b"}})
    fake.move(FIRST_END - 1)
    fake.post("settle")
    events = receiver.events("invoice.upcoming")
    assert [event["created"] for event in events] == [FIRST_END - 7 * DAY]
    upcoming = events[0]["data"]["object"]
    assert "id" not in upcoming
    assert (upcoming["amount_due"], upcoming["customer"]) == (1100, customer)
    assert upcoming["parent"]["subscription_details"]["subscription"] == subscription.id
    assert len(fake.invoices(customer)) == 1
    fake.post("settings", {"upcoming_invoice_days": 0})
    fake.move(SECOND_END)
    fake.post("settle")
    assert len(receiver.events("invoice.upcoming")) == 1


def test_trial_ends_with_notice_and_shows_its_usage_for_nothing(fake: Fake) -> None:
    customer = fake.customer()
    trial_end = START + 10 * DAY
    subscription = fake.subscribe(customer, fake.price(fake.meter()), fake.price(amount="900"), trial_period_days=10)
    assert (subscription.status, subscription.trial_end) == ("trialing", trial_end)
    fake.use(customer, "4")
    performed = fake.move(trial_end + HOUR)
    performed = [entry for entry in performed if entry["transition"] != "subscription.invoice_upcoming"]
    assert [(entry["at"], entry["transition"]) for entry in performed][:2] == [
        (trial_end - 3 * DAY, "subscription.trial_will_end"),
        (trial_end, "subscription.period_end"),
    ]
    assert fake.status(subscription.id) == "active"
    invoice = fake.invoices(customer)[0]
    assert [(line.amount, line.quantity) for line in invoice.lines.data] == [(0, 4), (900, 1)]
    assert fake.client.v1.subscriptions.retrieve(subscription.id).billing_cycle_anchor == trial_end


def test_trial_without_payment_method_can_pause_and_resume(fake: Fake) -> None:
    customer = fake.customer(None)
    settings = {"end_behavior": {"missing_payment_method": "pause"}}
    subscription = fake.subscribe(customer, fake.price(amount="900"), trial_period_days=1, trial_settings=settings).id
    fake.move(START + DAY)
    assert fake.status(subscription) == "paused"
    fake.client.v1.payment_methods.attach("pm_card_visa", {"customer": customer})
    resumed = fake.client.v1.subscriptions.resume(subscription)
    assert resumed.status == "past_due"  # attached, but not anybody's default
    assert {"customer.subscription.paused", "customer.subscription.resumed"} <= set(fake.event_types())


def test_cancel_at_period_end_bills_the_usage_on_a_last_invoice(fake: Fake) -> None:
    customer = fake.customer()
    subscription = fake.subscribe(customer, fake.price(fake.meter()), fake.price(amount="900")).id
    assert fake.invoices(customer)[0].amount_paid == 900
    fake.use(customer, "2")
    updated = fake.client.v1.subscriptions.update(subscription, {"cancel_at_period_end": True})
    assert updated.cancel_at == FIRST_END
    fake.move(FIRST_END + HOUR)
    ended = fake.client.v1.subscriptions.retrieve(subscription)
    assert (ended.status, ended.ended_at) == ("canceled", FIRST_END)
    assert [line.amount for line in fake.invoices(customer)[0].lines.data] == [200]
    assert fake.move(SECOND_END + HOUR) == []
    with pytest.raises(stripe.InvalidRequestError):
        fake.client.v1.subscriptions.update(subscription, {"metadata": {"a": "b"}})


def test_paused_collection_keeps_drafts_and_the_status(fake: Fake) -> None:
    customer = fake.customer()
    subscription = fake.subscribe(customer, fake.price(fake.meter())).id
    fake.client.v1.subscriptions.update(subscription, {"pause_collection": {"behavior": "keep_as_draft"}})
    fake.use(customer, "2")
    fake.move(FIRST_END + 5 * DAY)
    assert (fake.status(subscription), fake.invoices(customer)[0].status) == ("active", "draft")


def test_first_payment_declined_leaves_incomplete_which_expires(fake: Fake) -> None:
    customer = fake.customer("pm_card_chargeCustomerFail")
    price = fake.price(amount="900")
    with pytest.raises(stripe.CardError):
        fake.subscribe(customer, price, payment_behavior="error_if_incomplete")
    subscription = fake.subscribe(customer, price).id
    assert fake.status(subscription) == "incomplete"
    fake.move(START + 23 * HOUR)
    assert fake.status(subscription) == "incomplete_expired"
    assert fake.invoices(customer)[0].status == "void"


def test_anchor_ahead_cuts_the_first_period_short(fake: Fake) -> None:
    anchor = START + 7 * DAY
    subscription = fake.subscribe(fake.customer(), fake.price(amount="2800"), billing_cycle_anchor=anchor)
    assert subscription["items"].data[0].current_period_end == anchor
    invoice = fake.client.v1.invoices.retrieve(subscription.latest_invoice)
    assert invoice.amount_paid == 700  # 7 of the 28 days from 7 February


def test_sent_invoice_becomes_overdue(fake: Fake) -> None:
    customer = fake.customer(None)
    subscription = fake.subscribe(
        customer, fake.price(fake.meter()), collection_method="send_invoice", days_until_due=10
    ).id
    fake.use(customer, "1")
    fake.move(FIRST_END + HOUR + 10 * DAY)
    assert fake.invoices(customer)[0].due_date == FIRST_END + HOUR + 10 * DAY
    assert "invoice.overdue" in fake.event_types()
    assert fake.status(subscription) == "past_due"


def test_void_and_uncollectible_invoices(fake: Fake) -> None:
    customer = fake.customer("pm_card_chargeCustomerFail")
    subscription = fake.subscribe(customer, fake.price(fake.meter())).id
    fake.use(customer, "1")
    fake.move(FIRST_END + HOUR)
    invoice = fake.invoices(customer)[0].id
    assert fake.client.v1.invoices.mark_uncollectible(invoice).status == "uncollectible"
    assert fake.status(subscription) == "active"
    paid = fake.client.v1.invoices.pay(invoice, {"payment_method": "pm_card_visa"})
    assert paid.status == "paid"  # uncollectible → paid can happen
    with pytest.raises(stripe.InvalidRequestError):
        fake.client.v1.invoices.void_invoice(invoice)


def test_items_change_within_a_subscription(fake: Fake) -> None:
    customer, first, second = fake.customer(), fake.price(amount="100"), fake.price(amount="200")
    subscription = fake.subscribe(customer, first)
    item = subscription["items"].data[0].id
    updated = fake.client.v1.subscriptions.update(
        subscription.id, {"items": [{"id": item, "quantity": 3}, {"price": second}]}
    )
    assert [entry.quantity for entry in updated["items"].data] == [3, 1]
    with pytest.raises(stripe.InvalidRequestError):  # nothing is changed by half of a bad call
        fake.client.v1.subscriptions.update(
            subscription.id, {"description": "x", "items": [{"id": item, "quantity": 9}, {"id": "si_unknown"}]}
        )
    unchanged = fake.client.v1.subscriptions.retrieve(subscription.id)
    assert (unchanged.description, unchanged["items"].data[0].quantity) == (None, 3)
    fake.move(FIRST_END + HOUR)
    assert fake.invoices(customer)[0].amount_paid == 500
