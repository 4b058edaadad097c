"""Subscriptions: how they are made, changed and ended by calls. What the clock does to them is in `lifecycle`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tallystick.dev.fake_stripe import entitlements, lifecycle
from tallystick.dev.fake_stripe.errors import invalid
from tallystick.dev.fake_stripe.events import changing
from tallystick.dev.fake_stripe.lifecycle import TRIAL_NOTICE_SECONDS, items_of
from tallystick.dev.fake_stripe.objects.new_subscriptions import (
    PLAIN,
    card_of,
    check_collection,
    set_cancellation,
    set_trial_settings,
    subscribe,
    trial_end_of,
)
from tallystick.dev.fake_stripe.objects.subscription_items import change_items
from tallystick.dev.fake_stripe.rendering import render
from tallystick.dev.fake_stripe.resources import (
    PAGING,
    Route,
    find,
    in_range,
    merge_metadata,
    named,
    page,
    retrieving,
    set_fields,
)
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

ENDED = frozenset({"canceled", "incomplete_expired"})


def create(account: Account, call: Call) -> Object:
    """POST /v1/subscriptions: bills what is due in advance at once; usage is billed when the period ends."""
    customer = named(account, call, "customer", "customer")
    return render(account, subscribe(account, customer, call.params))


def update(account: Account, call: Call) -> Object:
    """POST /v1/subscriptions/{id}. Items that change count from now on; nothing is prorated."""
    subscription = _living(account, call)
    params = call.params
    customer = find(account, "customer", subscription["customer"])
    if params.get("proration_behavior", "none") != "none":
        raise invalid("The fake Stripe does not prorate: give proration_behavior none.", param="proration_behavior")
    card = card_of(account, customer, params)
    with changing(account, subscription):
        set_fields(subscription, call.params, PLAIN)
        check_collection(subscription)
        merge_metadata(subscription, call.params)
        set_trial_settings(subscription, params)
        if "default_payment_method" in params:
            subscription["default_payment_method"] = card["id"] if card else None
        if "pause_collection" in params:
            _set_pause(subscription, params["pause_collection"])
        if "items" in params:
            change_items(account, subscription, params["items"])
        if "trial_end" in params:
            _move_trial_end(account, subscription, params)
        set_cancellation(account, subscription, params)
        if _resets_anchor(params):
            _restart_period(account, subscription)
    if subscription["status"] == "trialing" and subscription["trial_end"] == account.now():
        lifecycle.cycle(account, subscription)
    entitlements.recompute(account, subscription["customer"])
    lifecycle.plan(account, subscription)
    return render(account, subscription)


def _living(account: Account, call: Call) -> Object:
    subscription = find(account, "subscription", call.arguments["id"])
    if subscription["status"] in ENDED:
        raise invalid(f"A subscription that is {subscription['status']} cannot be changed.", code="resource_missing")
    return subscription


def _set_pause(subscription: Object, given: Any) -> None:
    if given == "":
        subscription["pause_collection"] = None
    else:
        subscription["pause_collection"] = {"behavior": given["behavior"], "resumes_at": given.get("resumes_at")}


def _move_trial_end(account: Account, subscription: Object, params: Object) -> None:
    now = account.now()
    if subscription["status"] != "trialing":
        raise invalid("The fake Stripe moves the end of a running trial only.", param="trial_end")
    end = now if params["trial_end"] == "now" else trial_end_of(params, now)
    subscription["trial_end"] = end
    subscription["_trial_notice_at"] = None if end == now or end is None else max(end - TRIAL_NOTICE_SECONDS, now)
    for item in items_of(account, subscription):
        account.state.put(item | {"current_period_end": end})


def _resets_anchor(params: Object) -> bool:
    anchor = params.get("billing_cycle_anchor")
    return bool(anchor and anchor["type"] == "now")


def _restart_period(account: Account, subscription: Object) -> None:
    """A new period begins now; what was used in the old one is billed."""
    lines = lifecycle.arrears_lines(account, subscription)
    subscription["billing_cycle_anchor"] = account.now()
    lifecycle.roll_items(account, subscription, account.now())
    lines += lifecycle.advance_lines(account, subscription)
    invoice = lifecycle.invoice_subscription(account, subscription, lines, "subscription_update")
    subscription["latest_invoice"] = invoice["id"]


def cancel(account: Account, call: Call) -> Object:
    """DELETE /v1/subscriptions/{id}: ends it now. `invoice_now` bills the usage so far on a last invoice."""
    subscription = _living(account, call)
    details = call.params.get("cancellation_details") or {}
    subscription["cancellation_details"] |= {
        name: value or None for name, value in details.items() if name in ("comment", "feedback")
    }
    if call.params.get("prorate"):
        raise invalid("The fake Stripe does not prorate.", param="prorate")
    invoice_now = call.params.get("invoice_now", False)
    lifecycle.cancel(account, subscription, "cancellation_requested", invoice_now=invoice_now)
    return render(account, subscription)


def resume(account: Account, call: Call) -> Object:
    """POST /v1/subscriptions/{id}/resume: of a paused subscription; a new period begins now."""
    subscription = _living(account, call)
    if subscription["status"] != "paused":
        raise invalid(f"Only a paused subscription can be resumed; this one is {subscription['status']}.")
    lifecycle.resume(account, subscription)
    return render(account, subscription)


def list_subscriptions(account: Account, call: Call) -> Object:
    """GET /v1/subscriptions: all but canceled ones, unless `status` says otherwise (`all`, `ended`, or a status)."""
    params = call.params
    status = params.get("status")
    if "customer" in params:
        entries = reversed(account.state.where("subscription", "customer", params["customer"]))
    else:
        entries = reversed(account.state.all("subscription"))

    def meets(subscription: Object) -> bool:
        if status is None and subscription["status"] == "canceled":
            return False
        if status == "ended" and subscription["status"] not in ENDED:
            return False
        if status not in (None, "all", "ended", subscription["status"]):
            return False
        items = items_of(account, subscription)
        return (
            ("price" not in params or any(item["price"] == params["price"] for item in items))
            and in_range(subscription["created"], params.get("created"))
            and in_range(items[0]["current_period_end"], params.get("current_period_end"))
            and in_range(items[0]["current_period_start"], params.get("current_period_start"))
        )

    return page(account, call, (entry for entry in entries if meets(entry)))


BOTH = (
    f"{PLAIN} items metadata default_payment_method cancel_at cancel_at_period_end trial_end trial_settings "
    "proration_behavior off_session"
)

ROUTES = [
    Route(
        "POST",
        "/v1/subscriptions",
        create,
        "SubscriptionCreateParams",
        f"{BOTH} customer billing_cycle_anchor trial_period_days payment_behavior",
    ),
    Route(
        "GET",
        "/v1/subscriptions",
        list_subscriptions,
        "SubscriptionListParams",
        f"{PAGING} customer status price created current_period_start current_period_end",
    ),
    Route("GET", "/v1/subscriptions/{id}", retrieving("subscription"), "SubscriptionRetrieveParams"),
    Route(
        "POST",
        "/v1/subscriptions/{id}",
        update,
        "SubscriptionUpdateParams",
        f"{BOTH} pause_collection cancellation_details billing_cycle_anchor",
    ),
    Route(
        "DELETE",
        "/v1/subscriptions/{id}",
        cancel,
        "SubscriptionCancelParams",
        "invoice_now prorate cancellation_details",
    ),
    Route("POST", "/v1/subscriptions/{id}/resume", resume, "SubscriptionResumeParams"),
]
