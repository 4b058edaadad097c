"""Invoices from draft to final: their lines, what usage they bill, and when they are finalized.

While an invoice is a draft its metered lines follow the usage; finalizing fixes them, and what is reported later for
the same period is on no invoice.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tallystick.dev.fake_stripe import payments
from tallystick.dev.fake_stripe.events import changing, emit
from tallystick.dev.fake_stripe.invoice_lines import fill
from tallystick.dev.fake_stripe.settings import DAY_SECONDS, HOUR_SECONDS
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

UNANSWERED_SECONDS = 72 * HOUR_SECONDS
"""Without a 2xx to `invoice.created` an invoice is finalized after this time all the same."""


def make_invoice(
    account: Account,
    customer: Object,
    currency: str,
    lines: list[Object],
    *,
    subscription: Object | None,
    **fields: Any,
) -> Object:
    """Makes a draft and tells of it by `invoice.created`. `fields` are set on the invoice as they are."""
    invoice = blank_invoice(account, customer, currency, lines, subscription, **fields)
    invoice["id"] = account.ids.new("in")
    for line in lines:
        line["invoice"] = invoice["id"]
    if invoice["auto_advance"]:
        invoice["automatically_finalizes_at"] = account.now() + account.settings.finalization_delay_seconds
    refresh(account, invoice)
    event = emit(account, "invoice.created", invoice)
    invoice["_created_event"] = event["id"]
    if not event["_webhooks"]:
        invoice["webhooks_delivered_at"] = account.now()
    plan(account, invoice)
    return invoice


def blank_invoice(
    account: Account,
    customer: Object,
    currency: str,
    lines: list[Object],
    subscription: Object | None,
    **fields: Any,
) -> Object:
    """An invoice as it would be made now, without an id, and without its metered lines and totals."""
    now = account.now()
    parent = None
    if subscription is not None:
        details = {"metadata": dict(subscription["metadata"]), "subscription": subscription["id"]}
        parent = {"type": "subscription_details", "quote_details": None, "subscription_details": details}
    return {
        "object": "invoice",
        "account_country": "US",
        "account_name": "fake Stripe",
        "account_tax_ids": None,
        "amount_due": 0,
        "amount_overpaid": 0,
        "amount_paid": 0,
        "amount_remaining": 0,
        "amount_shipping": 0,
        "application": None,
        "attempt_count": 0,
        "attempted": False,
        "auto_advance": True,
        "automatic_tax": {
            "disabled_reason": None,
            "enabled": False,
            "liability": None,
            "provider": None,
            "status": None,
        },
        "automatically_finalizes_at": None,
        "billing_reason": "manual",
        "collection_method": "charge_automatically",
        "created": now,
        "currency": currency,
        "custom_fields": None,
        "customer": customer["id"],
        "customer_account": None,
        "customer_address": None,
        "customer_email": customer["email"],
        "customer_name": customer["name"],
        "customer_phone": customer["phone"],
        "customer_shipping": None,
        "customer_tax_exempt": "none",
        "customer_tax_ids": [],
        "default_payment_method": None,
        "default_source": None,
        "default_tax_rates": [],
        "description": None,
        "discounts": [],
        "due_date": None,
        "effective_at": None,
        "ending_balance": None,
        "footer": None,
        "from_invoice": None,
        "hosted_invoice_url": None,
        "invoice_pdf": None,
        "issuer": {"type": "self"},
        "last_finalization_error": None,
        "latest_revision": None,
        "livemode": False,
        "metadata": {},
        "next_payment_attempt": None,
        "number": None,
        "on_behalf_of": None,
        "parent": parent,
        "payment_settings": {"default_mandate": None, "payment_method_options": None, "payment_method_types": None},
        "period_end": now,
        "period_start": now,
        "post_payment_credit_notes_amount": 0,
        "pre_payment_credit_notes_amount": 0,
        "receipt_number": None,
        "rendering": None,
        "shipping_cost": None,
        "shipping_details": None,
        "starting_balance": 0,
        "statement_descriptor": None,
        "status": "draft",
        "status_transitions": {
            "finalized_at": None,
            "marked_uncollectible_at": None,
            "paid_at": None,
            "voided_at": None,
        },
        "subtotal": 0,
        "subtotal_excluding_tax": 0,
        "test_clock": None,
        "total": 0,
        "total_discount_amounts": [],
        "total_excluding_tax": 0,
        "total_pretax_credit_amounts": [],
        "total_taxes": [],
        "webhooks_delivered_at": None,
        "_lines": lines,
        "_subscription": subscription["id"] if subscription else None,
        "_days_until_due": subscription["days_until_due"] if subscription else None,
        "_created_event": None,
        "_overslept": False,
        "_failed_attempts": 0,
        "_behavior": None,
        **fields,
    }


def refresh(account: Account, invoice: Object) -> None:
    """Brings a draft's metered lines and totals up to date; a finalized invoice stays as it is."""
    if invoice["status"] == "draft":
        compute(account, invoice)
        account.state.put(invoice)


def compute(account: Account, invoice: Object) -> None:
    """Fills in the metered lines and the totals."""
    for line in invoice["_lines"]:
        if line["_metered"]:
            fill(account, line, invoice["customer"])
    total = sum(line["amount"] for line in invoice["_lines"])
    for name in ("subtotal", "subtotal_excluding_tax", "total", "total_excluding_tax"):
        invoice[name] = total
    invoice["amount_due"] = invoice["amount_remaining"] = max(total, 0)


def plan(account: Account, invoice: Object) -> None:
    """Puts what is due for an invoice on the agenda."""
    if invoice["status"] == "draft" and invoice["automatically_finalizes_at"] is not None:
        account.agenda.plan(invoice["automatically_finalizes_at"], "invoice.finalize", invoice["id"])
    if invoice["status"] == "open" and invoice["next_payment_attempt"] is not None:
        account.agenda.plan(invoice["next_payment_attempt"], "invoice.retry", invoice["id"])
    if invoice["status"] == "open" and invoice["due_date"] is not None:
        account.agenda.plan(invoice["due_date"], "invoice.overdue", invoice["id"])


def acknowledge(account: Account, event: Object) -> None:
    """Every endpoint answered `invoice.created` with 2xx: the draft's last hour begins.

    An answer within the settling time counts as given at once: a clock that was moved meanwhile must not make a swift
    receiver look slow.
    """
    invoice = account.state.get("invoice", event["data"]["object"]["id"])
    if invoice is None or invoice["status"] != "draft" or invoice["webhooks_delivered_at"] is not None:
        return
    swift = int(time.time()) - event["_made_at_real_time"] <= account.settle_seconds and not invoice["_overslept"]
    answered_at: int = invoice["created"] if swift else account.now()
    invoice["webhooks_delivered_at"] = answered_at
    if invoice["automatically_finalizes_at"] is not None:
        invoice["automatically_finalizes_at"] = answered_at + account.settings.finalization_delay_seconds
    account.state.put(invoice)
    plan(account, invoice)


def finalize_when_due(account: Account, invoice: Object) -> str | None:
    """The `invoice.finalize` transition. Returns what it did, or None when it waits for the webhook's 2xx."""
    last_moment = invoice["created"] + max(UNANSWERED_SECONDS, account.settings.finalization_delay_seconds)
    if invoice["webhooks_delivered_at"] is None and account.now() < last_moment:
        invoice["_overslept"] = True
        invoice["automatically_finalizes_at"] = last_moment
        account.state.put(invoice)
        plan(account, invoice)
        return None
    finalize(account, invoice)
    return "finalized"


def finalize(account: Account, invoice: Object, *, auto_advance: bool | None = None) -> None:
    """Fixes a draft and collects it, unless collection is paused or `auto_advance` is off."""
    refresh(account, invoice)
    now = account.now()
    customer = account.state.get("customer", invoice["customer"])
    assert customer is not None
    if auto_advance is not None:
        invoice["auto_advance"] = auto_advance
    number = customer["next_invoice_sequence"]
    customer["next_invoice_sequence"] = number + 1
    account.state.put(customer)
    invoice |= {
        "status": "open",
        "number": f"{customer['invoice_prefix']}-{number:04d}",
        "automatically_finalizes_at": None,
        "effective_at": now,
        "ending_balance": 0,
    }
    invoice["status_transitions"]["finalized_at"] = now
    if invoice["collection_method"] == "send_invoice" and invoice["due_date"] is None:
        invoice["due_date"] = now + (invoice["_days_until_due"] or 30) * DAY_SECONDS
    account.state.put(invoice)
    emit(account, "invoice.finalized", invoice)
    if invoice["_behavior"] == "void":
        void(account, invoice)
    elif invoice["_behavior"] == "mark_uncollectible":
        mark_uncollectible(account, invoice)
    elif invoice["amount_due"] == 0:
        payments.settle(account, invoice, paid_by=None)
    elif invoice["collection_method"] == "charge_automatically" and invoice["auto_advance"]:
        payments.attempt(account, invoice)
    plan(account, invoice)


def void(account: Account, invoice: Object) -> None:
    """Cancels an open or uncollectible invoice."""
    invoice |= {"status": "void", "amount_remaining": 0, "next_payment_attempt": None, "auto_advance": False}
    invoice["status_transitions"]["voided_at"] = account.now()
    account.state.put(invoice)
    emit(account, "invoice.voided", invoice)
    payments.after_collection(account, invoice)


def mark_uncollectible(account: Account, invoice: Object) -> None:
    """Gives an open invoice up; it can still be paid."""
    invoice |= {"status": "uncollectible", "next_payment_attempt": None, "auto_advance": False}
    invoice["status_transitions"]["marked_uncollectible_at"] = account.now()
    account.state.put(invoice)
    emit(account, "invoice.marked_uncollectible", invoice)
    payments.after_collection(account, invoice)


def overdue(account: Account, invoice: Object) -> str:
    """The `invoice.overdue` transition of an invoice that was sent and not paid in time."""
    emit(account, "invoice.overdue", invoice)
    subscription = account.state.get("subscription", invoice["_subscription"] or "")
    if subscription is not None and subscription["status"] == "active":
        with changing(account, subscription):
            subscription["status"] = "past_due"
    return "overdue"
