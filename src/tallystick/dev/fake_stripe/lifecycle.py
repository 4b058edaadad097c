"""A subscription's life on the clock: periods that roll, trials that end, cancellations that come due."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe import entitlements, invoice_lines, invoicing
from tallystick.dev.fake_stripe.events import changing, emit
from tallystick.dev.fake_stripe.payments import card_for, change_status, end_subscription
from tallystick.dev.fake_stripe.periods import next_boundary
from tallystick.dev.fake_stripe.settings import DAY_SECONDS, HOUR_SECONDS
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

LIVE = frozenset({"active", "past_due", "unpaid", "trialing"})
"""The statuses in which periods roll on."""

TRIAL_NOTICE_SECONDS = 3 * DAY_SECONDS
INCOMPLETE_SECONDS = 23 * HOUR_SECONDS


def items_of(account: Account, subscription: Object) -> list[Object]:
    """A subscription's items, oldest first."""
    return account.state.where("subscription_item", "subscription", subscription["id"])


def price_of(account: Account, item: Object) -> Object:
    """A subscription item's price."""
    price = account.state.get("price", item["price"])
    assert price is not None, f"{item['id']} has a price that was never made"
    return price


def is_metered(price: Object) -> bool:
    """Whether a price bills usage, in arrears, or a quantity, in advance."""
    return bool(price["recurring"]["usage_type"] == "metered")


def period_end(account: Account, subscription: Object) -> int:
    """The end of the present period, the same for all items."""
    return int(items_of(account, subscription)[0]["current_period_end"])


def plan(account: Account, subscription: Object) -> None:
    """Puts what is due for a subscription on the agenda."""
    subscription_id, agenda = subscription["id"], account.agenda
    if subscription["status"] in LIVE:
        agenda.plan(period_end(account, subscription), "subscription.period_end", subscription_id)
        if subscription["cancel_at"] is not None:
            agenda.plan(subscription["cancel_at"], "subscription.cancel", subscription_id)
    notice = upcoming_notice_at(account, subscription)
    if notice is not None:
        agenda.plan(notice, "subscription.invoice_upcoming", subscription_id)
    if subscription["status"] == "trialing" and subscription["_trial_notice_at"] is not None:
        agenda.plan(subscription["_trial_notice_at"], "subscription.trial_will_end", subscription_id)
    if subscription["status"] == "incomplete":
        agenda.plan(subscription["created"] + INCOMPLETE_SECONDS, "subscription.incomplete_expires", subscription_id)
    pause = subscription["pause_collection"]
    if pause is not None and pause["resumes_at"] is not None:
        agenda.plan(pause["resumes_at"], "subscription.resume_collection", subscription_id)


def upcoming_notice_at(account: Account, subscription: Object) -> int | None:
    """When `invoice.upcoming` is due; None when it was sent for this period, or will not be."""
    days = account.settings.upcoming_invoice_days
    if not days or subscription["status"] not in LIVE or subscription["cancel_at"] is not None:
        return None
    start = items_of(account, subscription)[0]["current_period_start"]
    notice = period_end(account, subscription) - days * DAY_SECONDS
    return notice if notice > start and subscription["_upcoming_sent_for"] != start else None


def tell_of_upcoming_invoice(account: Account, subscription: Object) -> str:
    """The `subscription.invoice_upcoming` transition: what the next invoice would be by now. It has no id."""
    customer = account.state.get("customer", subscription["customer"])
    assert customer is not None, f"{subscription['id']} has a customer that was never made"
    lines = []
    for item in items_of(account, subscription):
        price = price_of(account, item)
        metered, recurring = is_metered(price), price["recurring"]
        start, end = item["current_period_start"], item["current_period_end"]
        if not metered:
            anchor = subscription["billing_cycle_anchor"]
            start, end = end, next_boundary(anchor, recurring["interval"], recurring["interval_count"], after=end)
        free = metered and subscription["status"] == "trialing"
        lines.append(invoice_lines.line_of(account, subscription, item, start, end, metered=metered, free=free))
    invoice = invoicing.blank_invoice(
        account, customer, subscription["currency"], lines, subscription, billing_reason="upcoming"
    )
    invoicing.compute(account, invoice)
    emit(account, "invoice.upcoming", invoice)
    subscription["_upcoming_sent_for"] = items_of(account, subscription)[0]["current_period_start"]
    account.state.put(subscription)
    return "told of the upcoming invoice"


def cycle(account: Account, subscription: Object) -> str:
    """The `subscription.period_end` transition: bill the period that ended, and begin the next or end."""
    now = account.now()
    if subscription["cancel_at"] == now:
        cancel(account, subscription, None)
        return "canceled"
    if subscription["status"] == "trialing" and card_of(account, subscription) is None:
        behavior = subscription["trial_settings"]["end_behavior"]["missing_payment_method"]
        if behavior == "cancel":
            end_subscription(account, subscription, "payment_failed")
            return "canceled"
        if behavior == "pause":
            change_status(account, subscription, "paused")
            emit(account, "customer.subscription.paused", subscription)
            return "paused"
    lines = arrears_lines(account, subscription)
    was_trialing = subscription["status"] == "trialing"
    with changing(account, subscription):
        if was_trialing:
            subscription["status"] = "active"
            if subscription["_anchor_from_trial"]:
                subscription["billing_cycle_anchor"] = now
        roll_items(account, subscription, now)
        lines += advance_lines(account, subscription)
        invoice = invoice_subscription(account, subscription, lines, "subscription_cycle")
        subscription["latest_invoice"] = invoice["id"]
    plan(account, subscription)
    return f"next period, invoice {invoice['id']}"


def roll_items(account: Account, subscription: Object, start: int) -> None:
    """Sets all items' period to the one that begins at `start` and ends at the anchor's next boundary."""
    for item in items_of(account, subscription):
        recurring = price_of(account, item)["recurring"]
        anchor = subscription["billing_cycle_anchor"]
        item["current_period_start"] = start
        item["current_period_end"] = next_boundary(
            anchor, recurring["interval"], recurring["interval_count"], after=start
        )
        account.state.put(item)


def arrears_lines(account: Account, subscription: Object) -> list[Object]:
    """Lines for the usage of the present period. Usage within a trial is shown but costs nothing."""
    free = subscription["status"] == "trialing"
    return [
        invoice_lines.line_of(
            account,
            subscription,
            item,
            item["current_period_start"],
            min(item["current_period_end"], account.now()),
            metered=True,
            free=free,
        )
        for item in items_of(account, subscription)
        if is_metered(price_of(account, item))
    ]


def advance_lines(account: Account, subscription: Object) -> list[Object]:
    """Lines for what the period that begins now costs in advance."""
    return [
        invoice_lines.line_of(
            account, subscription, item, item["current_period_start"], item["current_period_end"], metered=False
        )
        for item in items_of(account, subscription)
        if not is_metered(price_of(account, item))
    ]


def invoice_subscription(account: Account, subscription: Object, lines: list[Object], reason: str) -> Object:
    """Makes the draft for a subscription, with pending invoice items on it."""
    customer = account.state.get("customer", subscription["customer"])
    assert customer is not None
    pending = [item for item in account.state.where("invoiceitem", "customer", customer["id"]) if not item["invoice"]]
    if reason == "subscription_cycle":
        lines += [invoice_lines.line_of_invoice_item(account, item) for item in pending]
    items = items_of(account, subscription)
    pause = subscription["pause_collection"]
    behavior = pause["behavior"] if pause else None
    invoice = invoicing.make_invoice(
        account,
        customer,
        subscription["currency"],
        lines,
        subscription=subscription,
        billing_reason=reason,
        collection_method=subscription["collection_method"],
        default_payment_method=None,
        # An unpaid subscription's invoices stay drafts until somebody decides.
        auto_advance=subscription["status"] != "unpaid" and behavior != "keep_as_draft",
        period_start=subscription["_last_period_start"] if reason == "subscription_cycle" else account.now(),
        _behavior=behavior,
    )
    subscription["_last_period_start"] = items[0]["current_period_start"]
    if reason == "subscription_cycle":
        for item in pending:
            item["invoice"] = invoice["id"]
            account.state.put(item)
    return invoice


def card_of(account: Account, subscription: Object) -> Object | None:
    """What an invoice of this subscription would be charged to."""
    invoice = {
        "customer": subscription["customer"],
        "default_payment_method": None,
        "_subscription": subscription["id"],
    }
    return card_for(account, invoice)


def cancel(account: Account, subscription: Object, reason: str | None, *, invoice_now: bool = True) -> None:
    """Ends a subscription now; its usage until now goes on a last invoice."""
    lines = arrears_lines(account, subscription) if subscription["status"] in LIVE and invoice_now else []
    if lines:
        invoice = invoice_subscription(account, subscription, lines, "subscription_cycle")
        subscription["latest_invoice"] = invoice["id"]
    end_subscription(account, subscription, reason or subscription["cancellation_details"]["reason"])


def cancel_when_due(account: Account, subscription: Object) -> str:
    """The `subscription.cancel` transition of a `cancel_at` within a period."""
    cancel(account, subscription, None)
    return "canceled"


def trial_will_end(account: Account, subscription: Object) -> str:
    """The `subscription.trial_will_end` transition, three days before the end or at once for shorter trials."""
    subscription["_trial_notice_at"] = None
    account.state.put(subscription)
    emit(account, "customer.subscription.trial_will_end", subscription)
    return "told that the trial will end"


def expire_incomplete(account: Account, subscription: Object) -> str:
    """The `subscription.incomplete_expires` transition: 23 hours without a first payment."""
    change_status(account, subscription, "incomplete_expired")
    invoice = account.state.get("invoice", subscription["latest_invoice"])
    if invoice is not None and invoice["status"] == "open":
        invoicing.void(account, invoice)
    return "expired"


def resume_collection(account: Account, subscription: Object) -> str:
    """The `subscription.resume_collection` transition of `pause_collection.resumes_at`."""
    with changing(account, subscription):
        subscription["pause_collection"] = None
    return "collects again"


def resume(account: Account, subscription: Object) -> None:
    """Starts a paused subscription again, with a period that begins now."""
    with changing(account, subscription):
        subscription["status"] = "active"
        subscription["billing_cycle_anchor"] = account.now()
        roll_items(account, subscription, account.now())
        lines = advance_lines(account, subscription)
        invoice = invoice_subscription(account, subscription, lines, "subscription_update")
        subscription["latest_invoice"] = invoice["id"]
    emit(account, "customer.subscription.resumed", subscription)
    entitlements.recompute(account, subscription["customer"])
    invoicing.finalize(account, invoice)
    plan(account, subscription)
