"""Invoices, their lines and payments, and invoice items for what is charged once."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe import invoice_lines, invoicing, payments
from tallystick.dev.fake_stripe.errors import invalid
from tallystick.dev.fake_stripe.events import changing, emit
from tallystick.dev.fake_stripe.invoice_lines import decimal_text
from tallystick.dev.fake_stripe.rendering import render
from tallystick.dev.fake_stripe.resources import (
    PAGING,
    Route,
    find,
    in_range,
    listing,
    merge_metadata,
    named,
    page,
    retrieving,
    set_fields,
)
from tallystick.dev.fake_stripe.settings import DAY_SECONDS
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

PLAIN = "description footer due_date automatically_finalizes_at auto_advance"


def create(account: Account, call: Call) -> Object:
    """POST /v1/invoices: a one-off draft, with the customer's pending invoice items unless they are excluded."""
    params = call.params
    customer = named(account, call, "customer", "customer")
    sends = params.get("collection_method", "charge_automatically") == "send_invoice"
    if sends and "days_until_due" not in params and "due_date" not in params:
        raise invalid("With collection_method send_invoice, days_until_due or due_date is needed.")
    pending: list[Object] = []
    if params.get("pending_invoice_items_behavior", "exclude") == "include":
        pending = [
            item for item in account.state.where("invoiceitem", "customer", customer["id"]) if not item["invoice"]
        ]
    days = params.get("days_until_due")
    invoice = invoicing.make_invoice(
        account,
        customer,
        params.get("currency") or (pending[0]["currency"] if pending else "usd"),
        [invoice_lines.line_of_invoice_item(account, item) for item in pending],
        subscription=None,
        collection_method="send_invoice" if sends else "charge_automatically",
        # Stripe finalizes a one-off invoice by itself only when it was asked to.
        auto_advance=params.get("auto_advance", False),
        due_date=params.get("due_date") or (account.now() + days * DAY_SECONDS if days else None),
        description=params.get("description"),
        metadata=dict(params.get("metadata") or {}),
    )
    for item in pending:
        account.state.put(item | {"invoice": invoice["id"]})
    return render(account, invoice)


def retrieve(account: Account, call: Call) -> Object:
    """GET /v1/invoices/{id}: of a draft, with the usage up to now."""
    invoice = find(account, "invoice", call.arguments["id"])
    invoicing.refresh(account, invoice)
    return render(account, invoice)


def update(account: Account, call: Call) -> Object:
    """POST /v1/invoices/{id}."""
    invoice = find(account, "invoice", call.arguments["id"])
    if invoice["status"] != "draft" and call.params.keys() - {"metadata", "auto_advance", "default_payment_method"}:
        raise invalid("A finalized invoice can no longer be changed so.", code="invoice_not_editable")
    customer = find(account, "customer", invoice["customer"])
    card = call.params.get("default_payment_method")
    card = payments.attached(account, customer, card, "default_payment_method") if card else None
    with changing(account, invoice):
        set_fields(invoice, call.params, PLAIN)
        merge_metadata(invoice, call.params)
        if "default_payment_method" in call.params:
            invoice["default_payment_method"] = card["id"] if card else None
        _replan_finalization(account, invoice, call)
    invoicing.plan(account, invoice)
    return render(account, invoice)


def _replan_finalization(account: Account, invoice: Object, call: Call) -> None:
    if invoice["status"] != "draft":
        return
    if call.params.get("automatically_finalizes_at"):
        # A time set by hand holds whatever the webhook's answer.
        invoice["webhooks_delivered_at"] = invoice["webhooks_delivered_at"] or account.now()
    elif "auto_advance" in call.params:
        delay = account.settings.finalization_delay_seconds
        invoice["automatically_finalizes_at"] = account.now() + delay if invoice["auto_advance"] else None


def delete(account: Account, call: Call) -> Object:
    """DELETE /v1/invoices/{id}: a draft that belongs to no subscription."""
    invoice = _in_status(account, call, "draft")
    if invoice["_subscription"] is not None:
        raise invalid("A subscription's invoice cannot be deleted: void it.", code="invoice_not_editable")
    account.state.remove("invoice", invoice["id"])
    emit(account, "invoice.deleted", invoice)
    return {"id": invoice["id"], "object": "invoice", "deleted": True}


def _in_status(account: Account, call: Call, *statuses: str) -> Object:
    invoice = find(account, "invoice", call.arguments["id"])
    if invoice["status"] not in statuses:
        message = f"This invoice is {invoice['status']}; the call needs one that is {' or '.join(statuses)}."
        raise invalid(message, code="invoice_not_editable")
    return invoice


def finalize(account: Account, call: Call) -> Object:
    """POST /v1/invoices/{id}/finalize."""
    invoice = _in_status(account, call, "draft")
    invoicing.finalize(account, invoice, auto_advance=call.params.get("auto_advance"))
    return render(account, invoice)


def pay(account: Account, call: Call) -> Object:
    """POST /v1/invoices/{id}/pay. Raises StripeError 402 when the card is declined; that is an attempt all the same."""
    invoice = find(account, "invoice", call.arguments["id"])
    if invoice["status"] == "paid":
        raise invalid("Invoice is already paid", code="invoice_already_paid")
    if invoice["status"] == "void":
        raise invalid("A void invoice cannot be paid.", code="invoice_not_editable")
    customer = find(account, "customer", invoice["customer"])
    given = call.params.get("payment_method")
    card = payments.attached(account, customer, given, "payment_method") if given else None
    if invoice["status"] == "draft":
        invoicing.finalize(account, invoice, auto_advance=False)
        if invoice["status"] == "paid":
            return render(account, invoice)
    if call.params.get("paid_out_of_band"):
        payments.settle(account, invoice, paid_by=None, out_of_band=True)
        return render(account, invoice)
    if card is None and payments.card_for(account, invoice) is None:
        raise invalid(
            "There is no payment method to charge this invoice to.", code="invoice_payment_intent_requires_action"
        )
    if not payments.attempt(account, invoice, card):
        raise payments.declined()
    return render(account, invoice)


def void(account: Account, call: Call) -> Object:
    """POST /v1/invoices/{id}/void."""
    invoice = _in_status(account, call, "open", "uncollectible")
    invoicing.void(account, invoice)
    return render(account, invoice)


def mark_uncollectible(account: Account, call: Call) -> Object:
    """POST /v1/invoices/{id}/mark_uncollectible."""
    invoice = _in_status(account, call, "open")
    invoicing.mark_uncollectible(account, invoice)
    return render(account, invoice)


def list_invoices(account: Account, call: Call) -> Object:
    """GET /v1/invoices."""
    params = call.params
    if "subscription" in params:
        entries = account.state.where("invoice", "_subscription", params["subscription"])
    elif "customer" in params:
        entries = account.state.where("invoice", "customer", params["customer"])
    else:
        entries = account.state.all("invoice")
    chosen = [
        invoice
        for invoice in reversed(entries)
        if all(invoice[name] == params[name] for name in ("status", "customer", "collection_method") if name in params)
        and in_range(invoice["created"], params.get("created"))
    ]
    for invoice in chosen:
        invoicing.refresh(account, invoice)
    return page(account, call, chosen)


def list_lines(account: Account, call: Call) -> Object:
    """GET /v1/invoices/{id}/lines, in the order of the invoice."""
    invoice = find(account, "invoice", call.arguments["id"])
    invoicing.refresh(account, invoice)
    return page(account, call, invoice["_lines"])


def create_item(account: Account, call: Call) -> Object:
    """POST /v1/invoiceitems: an amount, or a price by unit; it waits for the next invoice unless one is named."""
    params, now = call.params, account.now()
    customer = named(account, call, "customer", "customer")
    quantity = Decimal(params.get("quantity_decimal", params.get("quantity", 1)))
    price_id = (params.get("pricing") or {}).get("price")
    price = find(account, "price", price_id, "pricing[price]", status=400) if price_id else None
    if price is None and "amount" not in params and "unit_amount_decimal" not in params:
        raise invalid("Give an amount, a unit_amount_decimal or a price.", param="amount")
    unit = price["unit_amount_decimal"] if price else decimal_text(Decimal(params.get("unit_amount_decimal", 0)))
    amount = (
        params["amount"] if "amount" in params else invoice_lines.amount_of({"unit_amount_decimal": unit}, quantity)
    )
    item: Object = {
        "id": account.ids.new("ii"),
        "object": "invoiceitem",
        "amount": amount,
        "currency": price["currency"] if price else params.get("currency", "usd").lower(),
        "customer": customer["id"],
        "customer_account": None,
        "date": now,
        "description": params.get("description"),
        "discountable": True,
        "discounts": [],
        "invoice": None,
        "livemode": False,
        "metadata": {},
        "net_amount": amount,
        "parent": None,
        "period": {"start": now, "end": now, **(params.get("period") or {})},
        "pricing": {
            "type": "price_details",
            "price_details": {"price": price["id"], "product": price["product"]} if price else None,
            "unit_amount_decimal": str(amount) if "amount" in params else unit,
        },
        "proration": False,
        "quantity": int(quantity),
        "quantity_decimal": decimal_text(quantity),
        "tax_rates": [],
        "test_clock": None,
    }
    merge_metadata(item, call.params)
    if params.get("invoice"):
        invoice = find(account, "invoice", params["invoice"], "invoice", status=400)
        if invoice["status"] != "draft" or invoice["customer"] != customer["id"]:
            raise invalid("The invoice must be a draft of the same customer.", param="invoice")
        item["invoice"] = invoice["id"]
        invoice["_lines"].append(invoice_lines.line_of_invoice_item(account, item) | {"invoice": invoice["id"]})
        invoicing.refresh(account, invoice)
    account.state.put(item)
    emit(account, "invoiceitem.created", item)
    return render(account, item)


def list_payments(account: Account, call: Call) -> Object:
    """GET /v1/invoice_payments."""
    params = call.params
    if "invoice" in params:
        entries = account.state.where("invoice_payment", "invoice", params["invoice"])
    else:
        entries = account.state.all("invoice_payment")
    return page(
        account, call, (entry for entry in reversed(entries) if params.get("status", "paid") == entry["status"])
    )


ONE = "/v1/invoices/{id}"

ROUTES = [
    Route(
        "POST",
        "/v1/invoices",
        create,
        "InvoiceCreateParams",
        "customer currency description metadata auto_advance collection_method days_until_due due_date "
        "pending_invoice_items_behavior",
    ),
    Route(
        "GET",
        "/v1/invoices",
        list_invoices,
        "InvoiceListParams",
        f"{PAGING} customer subscription status collection_method created",
    ),
    Route("GET", ONE, retrieve, "InvoiceRetrieveParams"),
    Route("POST", ONE, update, "InvoiceUpdateParams", f"{PLAIN} metadata default_payment_method"),
    Route("DELETE", ONE, delete, "InvoiceDeleteParams"),
    Route("GET", f"{ONE}/lines", list_lines, "InvoiceLineItemListParams", PAGING),
    Route("POST", f"{ONE}/finalize", finalize, "InvoiceFinalizeInvoiceParams", "auto_advance"),
    Route("POST", f"{ONE}/pay", pay, "InvoicePayParams", "payment_method paid_out_of_band off_session"),
    Route("POST", f"{ONE}/void", void, "InvoiceVoidInvoiceParams"),
    Route("POST", f"{ONE}/mark_uncollectible", mark_uncollectible, "InvoiceMarkUncollectibleParams"),
    Route(
        "POST",
        "/v1/invoiceitems",
        create_item,
        "InvoiceItemCreateParams",
        "customer amount currency description invoice metadata period pricing quantity quantity_decimal "
        "unit_amount_decimal",
    ),
    Route("GET", "/v1/invoiceitems/{id}", retrieving("invoiceitem"), "InvoiceItemRetrieveParams"),
    Route(
        "GET",
        "/v1/invoiceitems",
        listing("invoiceitem", "customer", "invoice", created=False),
        "InvoiceItemListParams",
        f"{PAGING} customer invoice",
    ),
    Route("GET", "/v1/invoice_payments", list_payments, "InvoicePaymentListParams", f"{PAGING} invoice status"),
    Route("GET", "/v1/payment_intents/{id}", retrieving("payment_intent"), "PaymentIntentRetrieveParams"),
]
