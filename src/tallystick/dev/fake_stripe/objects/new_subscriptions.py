"""Making a subscription: its first period, its trial, and the first invoice, which is final at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe import entitlements, invoice_lines, invoicing, lifecycle, payments
from tallystick.dev.fake_stripe.errors import StripeError, invalid
from tallystick.dev.fake_stripe.events import emit
from tallystick.dev.fake_stripe.lifecycle import TRIAL_NOTICE_SECONDS, is_metered, items_of, price_of
from tallystick.dev.fake_stripe.objects.subscription_items import add_item, check_items
from tallystick.dev.fake_stripe.periods import next_boundary
from tallystick.dev.fake_stripe.resources import find, merge_metadata, set_fields
from tallystick.dev.fake_stripe.settings import DAY_SECONDS
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

PLAIN = "description days_until_due collection_method payment_settings"


def subscribe(account: Account, customer: Object, params: Object) -> Object:
    """Makes a subscription from the parameters of the call above."""
    now = account.now()
    wanted = check_items(account, params.get("items") or [])
    recurring = wanted[0][0]["recurring"]
    trial_end = trial_end_of(params, now)
    anchor = params.get("billing_cycle_anchor", trial_end or now)
    latest = next_boundary(trial_end or now, recurring["interval"], recurring["interval_count"], after=trial_end or now)
    if not now <= anchor <= latest:
        raise invalid("The anchor must lie between now and the end of the first period.", param="billing_cycle_anchor")
    card = card_of(account, customer, params)
    subscription = _blank(account, customer, wanted[0][0]["currency"], anchor)
    subscription |= {
        "status": "trialing" if trial_end else "incomplete",
        "trial_start": now if trial_end else None,
        "trial_end": trial_end,
        "default_payment_method": card["id"] if card else None,
        "_anchor_from_trial": "billing_cycle_anchor" not in params,
        "_trial_notice_at": max(trial_end - TRIAL_NOTICE_SECONDS, now) if trial_end else None,
    }
    set_fields(subscription, params, PLAIN)
    merge_metadata(subscription, params)
    set_trial_settings(subscription, params)
    check_collection(subscription)
    account.state.put(subscription)
    try:
        for price, given in wanted:
            add_item(account, subscription, price, given)
        _set_first_period(account, subscription, trial_end or (anchor if anchor > now else None))
        set_cancellation(account, subscription, params)
        _bill_first(account, subscription, params)
    except StripeError:
        _forget(account, subscription)
        raise
    return subscription


def _blank(account: Account, customer: Object, currency: str, anchor: int) -> Object:
    now = account.now()
    return {
        "id": account.ids.new("sub"),
        "object": "subscription",
        "application": None,
        "application_fee_percent": None,
        "automatic_tax": {"disabled_reason": None, "enabled": False, "liability": None},
        "billing_cycle_anchor": anchor,
        "billing_cycle_anchor_config": None,
        "billing_mode": {"type": "flexible", "flexible": {"proration_discounts": "included"}},
        "billing_thresholds": None,
        "cancel_at": None,
        "cancel_at_period_end": False,
        "canceled_at": None,
        "cancellation_details": {"comment": None, "feedback": None, "reason": None},
        "collection_method": "charge_automatically",
        "created": now,
        "currency": currency,
        "customer": customer["id"],
        "customer_account": None,
        "days_until_due": None,
        "default_payment_method": None,
        "default_source": None,
        "default_tax_rates": [],
        "description": None,
        "discounts": [],
        "ended_at": None,
        "invoice_settings": {"account_tax_ids": None, "issuer": {"type": "self"}},
        "latest_invoice": None,
        "livemode": False,
        "metadata": {},
        "next_pending_invoice_item_invoice": None,
        "on_behalf_of": None,
        "pause_collection": None,
        "payment_settings": None,
        "pending_invoice_item_interval": None,
        "pending_setup_intent": None,
        "pending_update": None,
        "schedule": None,
        "start_date": now,
        "status": "incomplete",
        "test_clock": None,
        "transfer_data": None,
        "trial_end": None,
        "trial_settings": {"end_behavior": {"missing_payment_method": "create_invoice"}},
        "trial_start": None,
        "_anchor_from_trial": True,
        "_trial_notice_at": None,
        "_upcoming_sent_for": None,
        "_last_period_start": now,
    }


def trial_end_of(params: Object, now: int) -> int | None:
    """When the trial that is asked for ends; None without one. Raises StripeError 400 for one that cannot be."""
    end = params.get("trial_end")
    if end is not None and "trial_period_days" in params:
        raise invalid("Give one of trial_end and trial_period_days.", param="trial_end")
    if "trial_period_days" in params:
        days: int = params["trial_period_days"]
        if not 0 <= days <= 730:
            raise invalid("A trial has at most 730 days.", param="trial_period_days")
        return now + days * DAY_SECONDS if days else None
    if end in (None, "now"):
        return None
    if end <= now:
        raise invalid("Invalid timestamp: must be in the future.", param="trial_end")
    return int(end)


def card_of(account: Account, customer: Object, params: Object) -> Object | None:
    """The `default_payment_method` that is asked for, attached to the customer."""
    given = params.get("default_payment_method")
    return payments.attached(account, customer, given, "default_payment_method") if given else None


def set_trial_settings(subscription: Object, params: Object) -> None:
    """What is to become of the subscription if no payment method is there when the trial ends."""
    behavior = ((params.get("trial_settings") or {}).get("end_behavior") or {}).get("missing_payment_method")
    if behavior:
        subscription["trial_settings"] = {"end_behavior": {"missing_payment_method": behavior}}


def check_collection(subscription: Object) -> None:
    """Raises StripeError 400 when invoices are to be sent without a time to pay."""
    sends = subscription["collection_method"] == "send_invoice"
    if sends and subscription["days_until_due"] is None:
        raise invalid("With collection_method send_invoice, days_until_due is needed.", param="days_until_due")


def _set_first_period(account: Account, subscription: Object, end: int | None) -> None:
    """The first period begins now and ends with the trial, at an anchor that lies ahead, or one interval on."""
    now = account.now()
    lifecycle.roll_items(account, subscription, now)
    if end is not None:
        for item in items_of(account, subscription):
            account.state.put(item | {"current_period_end": end})


def _bill_first(account: Account, subscription: Object, params: Object) -> None:
    """The first invoice is final at once. If it cannot be paid, the subscription stays incomplete."""
    now = account.now()
    behavior = params.get("payment_behavior", "allow_incomplete")
    trial = subscription["status"] == "trialing"
    lines = []
    for item in items_of(account, subscription):
        start, end = item["current_period_start"], item["current_period_end"]
        metered = is_metered(price_of(account, item))
        # Of a metered item the first invoice shows that it was subscribed to: nothing has been used yet.
        start, end = (now, now) if metered else (start, end)
        lines.append(invoice_lines.line_of(account, subscription, item, start, end, metered=metered, free=trial))
    if not trial:
        _prorate(account, subscription, lines, params.get("proration_behavior", "create_prorations"))
    due = sum(line["amount"] for line in lines)
    charged = subscription["collection_method"] == "charge_automatically" and due > 0
    card = lifecycle.card_of(account, subscription)
    if charged and card is None and behavior != "default_incomplete":
        raise invalid("This customer has no payment method to charge.", code="resource_missing")
    if charged and behavior == "error_if_incomplete" and card is not None and not card["_pays"]:
        raise payments.declined()
    if not trial and not charged:
        subscription["status"] = "active"
    account.state.put(subscription)
    invoice = lifecycle.invoice_subscription(account, subscription, lines, "subscription_create")
    subscription["latest_invoice"] = invoice["id"]
    account.state.put(subscription)
    # Told of after its invoice, whose id is in it: nothing else would tell of that.
    emit(account, "customer.subscription.created", subscription)
    invoicing.finalize(account, invoice, auto_advance=not (charged and behavior == "default_incomplete"))
    entitlements.recompute(account, subscription["customer"])
    lifecycle.plan(account, subscription)


def _prorate(account: Account, subscription: Object, lines: list[Object], behavior: str) -> None:
    """A first period that is cut short by the anchor costs its share by seconds, or nothing without prorations."""
    for line in lines:
        item = find(account, "subscription_item", line["parent"]["subscription_item_details"]["subscription_item"])
        recurring = price_of(account, item)["recurring"]
        end, start = item["current_period_end"], item["current_period_start"]
        full = next_boundary(end, recurring["interval"], recurring["interval_count"], after=end) - end
        if subscription["billing_cycle_anchor"] > start and end - start < full:
            share = line["amount"] * (end - start) // full if behavior != "none" else 0
            line["amount"] = line["subtotal"] = share


def _forget(account: Account, subscription: Object) -> None:
    for item in items_of(account, subscription):
        account.state.remove("subscription_item", item["id"])
    account.state.remove("subscription", subscription["id"])


def set_cancellation(account: Account, subscription: Object, params: Object) -> None:
    """Sets when a subscription is to end: `cancel_at`, or `cancel_at_period_end`."""
    details = params.get("cancellation_details") or {}
    subscription["cancellation_details"] |= {
        name: value or None for name, value in details.items() if name in ("comment", "feedback")
    }
    now = account.now()
    if "cancel_at" in params:
        moment = params["cancel_at"]
        if isinstance(moment, str) and moment:
            raise invalid("The fake Stripe takes cancel_at as a time.", param="cancel_at")
        if moment != "" and moment <= now:
            raise invalid("cancel_at must be in the future.", param="cancel_at")
        subscription |= {
            "cancel_at": moment or None,
            "cancel_at_period_end": False,
            "canceled_at": now if moment else None,
        }
    elif "cancel_at_period_end" in params:
        at_end: bool = params["cancel_at_period_end"]
        end = lifecycle.period_end(account, subscription)
        subscription |= {
            "cancel_at_period_end": at_end,
            "cancel_at": end if at_end else None,
            "canceled_at": now if at_end else None,
        }
    else:
        return
    requested = subscription["cancel_at"] is not None
    subscription["cancellation_details"]["reason"] = "cancellation_requested" if requested else None
