"""Collecting invoices: cards that pay and cards that do not, retries, and what that makes of the subscription."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe import entitlements
from tallystick.dev.fake_stripe.errors import StripeError, missing
from tallystick.dev.fake_stripe.events import changing, emit
from tallystick.dev.fake_stripe.settings import DAY_SECONDS
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

RETRY_DAYS = (3, 5, 7)
"""Days after the first failed attempt on which a payment is tried again."""

# Stripe's test cards: attaching works for all but the declined one, charging fails for chargeCustomerFail.
TEST_CARDS: dict[str, Object] = {
    "pm_card_visa": {"brand": "visa", "last4": "4242", "pays": True},
    "pm_card_mastercard": {"brand": "mastercard", "last4": "4444", "pays": True},
    "pm_card_amex": {"brand": "amex", "last4": "8431", "pays": True},
    "pm_card_chargeCustomerFail": {"brand": "visa", "last4": "0341", "pays": False},
    "pm_card_chargeDeclined": {"brand": "visa", "last4": "0002", "pays": False},
}


def declined() -> StripeError:
    """The 402 of a card that its bank refused."""
    return StripeError(
        402, "Your card was declined.", type="card_error", code="card_declined", decline_code="generic_decline"
    )


def make_card(account: Account, test_card: str, customer: str | None) -> Object:
    """A payment method made from one of the test cards."""
    card = TEST_CARDS[test_card]
    address = {"city": None, "country": None, "line1": None, "line2": None, "postal_code": None, "state": None}
    return account.state.put(
        {
            "id": account.ids.new("pm"),
            "object": "payment_method",
            "allow_redisplay": "unspecified",
            "billing_details": {"address": address, "email": None, "name": None, "phone": None, "tax_id": None},
            "card": {
                "brand": card["brand"],
                "country": "US",
                "display_brand": card["brand"],
                "exp_month": 12,
                "exp_year": 2034,
                "fingerprint": None,
                "funding": "credit",
                "last4": card["last4"],
            },
            "created": account.now(),
            "customer": customer,
            "customer_account": None,
            "livemode": False,
            "metadata": {},
            "type": "card",
            "_pays": card["pays"],
        }
    )


def attached(account: Account, customer: Object, payment_method: str, param: str) -> Object:
    """The customer's payment method of this id; a test card's id makes and attaches a new one.

    Raises StripeError 400 when it does not exist or belongs to no or another customer, 402 for a declined test card.
    """
    if payment_method in TEST_CARDS:
        if payment_method == "pm_card_chargeDeclined":
            raise declined()
        found = make_card(account, payment_method, customer["id"])
        emit(account, "payment_method.attached", found)
        return found
    known = account.state.get("payment_method", payment_method)
    if known is None or known["customer"] != customer["id"]:
        raise missing("PaymentMethod", payment_method, param)
    return known


def card_for(account: Account, invoice: Object) -> Object | None:
    """What an invoice would be charged to: its own payment method, its subscription's, or the customer's default."""
    customer = account.state.get("customer", invoice["customer"])
    subscription = account.state.get("subscription", invoice["_subscription"] or "")
    choices = (
        invoice["default_payment_method"],
        subscription and subscription["default_payment_method"],
        customer and customer["invoice_settings"]["default_payment_method"],
    )
    for choice in choices:
        if choice and (card := account.state.get("payment_method", choice)) is not None:
            return card
    return None


def attempt(account: Account, invoice: Object, card: Object | None = None) -> bool:
    """Charges an open invoice. False when that failed; the invoice, its subscription and the retries follow."""
    card = card or card_for(account, invoice)
    invoice["attempted"] = True
    invoice["attempt_count"] += 1
    if card is not None and card["_pays"]:
        settle(account, invoice, paid_by=card)
        return True
    _record_failure(account, invoice)
    return False


def settle(account: Account, invoice: Object, *, paid_by: Object | None, out_of_band: bool = False) -> None:
    """Marks an invoice paid. Without a card nothing was due, or it was paid out of band."""
    now = account.now()
    if invoice["amount_due"] > 0 and not out_of_band:
        _record_payment(account, invoice, paid_by)
    invoice |= {
        "status": "paid",
        "attempted": True,
        "amount_paid": invoice["amount_due"],
        "amount_remaining": 0,
        "next_payment_attempt": None,
        "auto_advance": False,
    }
    invoice["status_transitions"]["paid_at"] = now
    account.state.put(invoice)
    emit(account, "invoice.paid", invoice)
    if not out_of_band:
        emit(account, "invoice.payment_succeeded", invoice)
    after_collection(account, invoice)


def _record_payment(account: Account, invoice: Object, card: Object | None) -> None:
    amount, now = invoice["amount_remaining"], account.now()
    intent = account.state.put(
        {
            "id": account.ids.new("pi"),
            "object": "payment_intent",
            "amount": amount,
            "amount_received": amount,
            "created": now,
            "currency": invoice["currency"],
            "customer": invoice["customer"],
            "livemode": False,
            "metadata": {},
            "payment_method": card["id"] if card else None,
            "payment_method_types": ["card"],
            "status": "succeeded",
        }
    )
    payment = account.state.put(
        {
            "id": account.ids.new("inpay"),
            "object": "invoice_payment",
            "amount_paid": amount,
            "amount_requested": amount,
            "created": now,
            "currency": invoice["currency"],
            "invoice": invoice["id"],
            "is_default": True,
            "livemode": False,
            "payment": {"type": "payment_intent", "payment_intent": intent["id"]},
            "status": "paid",
            "status_transitions": {"canceled_at": None, "paid_at": now},
        }
    )
    emit(account, "invoice_payment.paid", payment)


def _record_failure(account: Account, invoice: Object) -> None:
    failed = invoice["_failed_attempts"]
    invoice["_failed_attempts"] = failed + 1
    retries = invoice["auto_advance"] and invoice["billing_reason"] != "subscription_create"
    first = invoice["status_transitions"]["finalized_at"] or account.now()
    # Attempts by hand, through `pay`, do not use the scheduled ones up.
    upcoming = [first + days * DAY_SECONDS for days in RETRY_DAYS if first + days * DAY_SECONDS > account.now()]
    invoice["next_payment_attempt"] = None
    if retries and upcoming:
        invoice["next_payment_attempt"] = upcoming[0]
        account.agenda.plan(upcoming[0], "invoice.retry", invoice["id"])
    account.state.put(invoice)
    emit(account, "invoice.payment_failed", invoice)
    customer = account.state.get("customer", invoice["customer"])
    if customer is not None and not customer["delinquent"]:
        with changing(account, customer):
            customer["delinquent"] = True
    subscription = account.state.get("subscription", invoice["_subscription"] or "")
    if subscription is None:
        return
    if subscription["status"] == "active":
        change_status(account, subscription, "past_due")
    elif subscription["status"] == "past_due" and retries and not upcoming:
        _give_up(account, subscription)


def _give_up(account: Account, subscription: Object) -> None:
    match account.settings.after_last_retry:
        case "unpaid":
            change_status(account, subscription, "unpaid")
        case "canceled":
            end_subscription(account, subscription, "payment_failed")
        case _:
            pass


def retry(account: Account, invoice: Object) -> str:
    """The `invoice.retry` transition."""
    return "paid" if attempt(account, invoice) else "payment failed"


def change_status(account: Account, subscription: Object, status: str) -> None:
    """Sets a subscription's status, with its event and what it means for entitlements."""
    with changing(account, subscription):
        subscription["status"] = status
    entitlements.recompute(account, subscription["customer"])


def end_subscription(account: Account, subscription: Object, reason: str | None) -> None:
    """Ends a subscription for good: `customer.subscription.deleted`."""
    now = account.now()
    subscription |= {"status": "canceled", "ended_at": now, "canceled_at": subscription["canceled_at"] or now}
    subscription["cancellation_details"]["reason"] = reason
    account.state.put(subscription)
    emit(account, "customer.subscription.deleted", subscription)
    entitlements.recompute(account, subscription["customer"])


def after_collection(account: Account, invoice: Object) -> None:
    """An invoice was paid, voided or given up: the subscription follows its latest finalized invoice."""
    customer = account.state.get("customer", invoice["customer"])
    if customer is not None and customer["delinquent"] and invoice["status"] == "paid":
        others = account.state.where("invoice", "customer", customer["id"])
        if not any(other["status"] == "open" and other["_failed_attempts"] for other in others):
            with changing(account, customer):
                customer["delinquent"] = False
    subscription = account.state.get("subscription", invoice["_subscription"] or "")
    if subscription is None:
        return
    if subscription["status"] == "incomplete":
        if invoice["status"] == "paid":
            change_status(account, subscription, "active")
        elif invoice["status"] == "void":
            change_status(account, subscription, "incomplete_expired")
        return
    finalized = [
        other
        for other in account.state.where("invoice", "_subscription", subscription["id"])
        if other["status_transitions"]["finalized_at"] is not None
    ]
    settled = finalized and finalized[-1]["status"] in ("paid", "void", "uncollectible")
    if subscription["status"] in ("past_due", "unpaid") and settled:
        change_status(account, subscription, "active")
