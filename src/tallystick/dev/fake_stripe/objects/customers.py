"""Customers and their payment methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe import payments
from tallystick.dev.fake_stripe.errors import invalid
from tallystick.dev.fake_stripe.events import changing, emit
from tallystick.dev.fake_stripe.rendering import render
from tallystick.dev.fake_stripe.resources import (
    PAGING,
    Route,
    find,
    listing,
    merge_metadata,
    named,
    page,
    retrieving,
    set_fields,
)
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

PLAIN = "name email phone description"


def create(account: Account, call: Call) -> Object:
    """POST /v1/customers."""
    return render(account, make_customer(account, call.params))


def make_customer(account: Account, params: Object) -> Object:
    """Makes a customer from the parameters of the call above, and tells of it."""
    customer_id = account.ids.new("cus")
    customer: Object = {
        "id": customer_id,
        "object": "customer",
        "address": None,
        "balance": 0,
        "created": account.now(),
        "currency": None,
        "default_source": None,
        "delinquent": False,
        "description": None,
        "discount": None,
        "email": None,
        "invoice_prefix": customer_id.removeprefix("cus_")[:8].upper(),
        "invoice_settings": {
            "custom_fields": None,
            "default_payment_method": None,
            "footer": None,
            "rendering_options": None,
        },
        "livemode": False,
        "metadata": {},
        "name": None,
        "next_invoice_sequence": 1,
        "phone": None,
        "preferred_locales": [],
        "shipping": None,
        "tax_exempt": "none",
        "test_clock": None,
    }
    set_fields(customer, params, PLAIN)
    merge_metadata(customer, params)
    given = params.get("payment_method")
    made = payments.attached(account, customer, given, "payment_method") if given else None
    default = (params.get("invoice_settings") or {}).get("default_payment_method")
    if default:
        # The same test card named twice is one payment method.
        card = made if default == given else None
        card = card or payments.attached(account, customer, default, "invoice_settings[default_payment_method]")
        customer["invoice_settings"]["default_payment_method"] = card["id"]
    account.state.put(customer)
    emit(account, "customer.created", customer)
    return customer


def update(account: Account, call: Call) -> Object:
    """POST /v1/customers/{id}."""
    customer = find(account, "customer", call.arguments["id"])
    if customer.get("deleted"):
        find(account, "customer", customer["id"], status=400)
    default = (call.params.get("invoice_settings") or {}).get("default_payment_method")
    card = None
    if default:
        card = payments.attached(account, customer, default, "invoice_settings[default_payment_method]")
    with changing(account, customer):
        set_fields(customer, call.params, PLAIN)
        merge_metadata(customer, call.params)
        if default is not None:
            customer["invoice_settings"]["default_payment_method"] = card["id"] if card else None
    return render(account, customer)


def delete(account: Account, call: Call) -> Object:
    """DELETE /v1/customers/{id}: ends all subscriptions at once; the id is known for ever as deleted."""
    customer = find(account, "customer", call.arguments["id"])
    if not customer.get("deleted"):
        for subscription in account.state.where("subscription", "customer", customer["id"]):
            if subscription["status"] not in ("canceled", "incomplete_expired"):
                payments.end_subscription(account, subscription, "cancellation_requested")
        for card in account.state.where("payment_method", "customer", customer["id"]):
            account.state.put(card | {"customer": None})
        emit(account, "customer.deleted", customer)
        customer["deleted"] = True
        account.state.put(customer)
    return render(account, customer)


def create_payment_method(account: Account, call: Call) -> Object:
    """POST /v1/payment_methods: a card by a test token (`tok_visa`, `tok_chargeCustomerFail`)."""
    if call.params.get("type") != "card":
        raise invalid("The fake Stripe has payment methods of type card only.", param="type")
    token = (call.params.get("card") or {}).get("token", "")
    test_card = f"pm_card_{token.removeprefix('tok_')}"
    if not token.startswith("tok_") or test_card not in payments.TEST_CARDS:
        raise invalid("The fake Stripe takes cards by test tokens, such as tok_visa.", param="card[token]")
    card = payments.make_card(account, test_card, None)
    merge_metadata(card, call.params)
    return render(account, card)


def retrieve_payment_method(account: Account, call: Call) -> Object:
    """GET /v1/payment_methods/{id}."""
    return render(account, find(account, "payment_method", call.arguments["id"]))


def attach(account: Account, call: Call) -> Object:
    """POST /v1/payment_methods/{id}/attach. A test card's id makes a new payment method each time, as Stripe's do."""
    customer = named(account, call, "customer", "customer")
    identifier = call.arguments["id"]
    if identifier in payments.TEST_CARDS:
        return render(account, payments.attached(account, customer, identifier, "payment_method"))
    card = find(account, "payment_method", identifier)
    if card["customer"] not in (None, customer["id"]):
        raise invalid("This payment method is attached to another customer already.", param="payment_method")
    account.state.put(card | {"customer": customer["id"]})
    attached = find(account, "payment_method", identifier)
    emit(account, "payment_method.attached", attached)
    return render(account, attached)


def detach(account: Account, call: Call) -> Object:
    """POST /v1/payment_methods/{id}/detach."""
    card = find(account, "payment_method", call.arguments["id"])
    customer = account.state.get("customer", card["customer"] or "")
    if customer is None:
        raise invalid("This payment method is not attached to a customer.", param="payment_method")
    card["customer"] = None
    account.state.put(card)
    emit(account, "payment_method.detached", card, {"customer": customer["id"]})
    if customer["invoice_settings"]["default_payment_method"] == card["id"]:
        with changing(account, customer):
            customer["invoice_settings"]["default_payment_method"] = None
    return render(account, card)


def list_payment_methods(account: Account, call: Call) -> Object:
    """GET /v1/payment_methods?customer=… and GET /v1/customers/{id}/payment_methods."""
    if "id" in call.arguments:
        customer = find(account, "customer", call.arguments["id"])
    else:
        customer = named(account, call, "customer", "customer")
    cards = account.state.where("payment_method", "customer", customer["id"])
    wanted = call.params.get("type", "card")
    return page(account, call, (card for card in reversed(cards) if card["type"] == wanted))


CUSTOMER = f"{PLAIN} metadata invoice_settings"

ROUTES = [
    Route("POST", "/v1/customers", create, "CustomerCreateParams", f"{CUSTOMER} payment_method"),
    Route("GET", "/v1/customers", listing("customer", "email"), "CustomerListParams", f"{PAGING} email created"),
    Route("GET", "/v1/customers/{id}", retrieving("customer"), "CustomerRetrieveParams"),
    Route("POST", "/v1/customers/{id}", update, "CustomerUpdateParams", CUSTOMER),
    Route("DELETE", "/v1/customers/{id}", delete, "CustomerDeleteParams"),
    Route(
        "GET",
        "/v1/customers/{id}/payment_methods",
        list_payment_methods,
        "CustomerPaymentMethodListParams",
        f"{PAGING} type",
    ),
    Route("POST", "/v1/payment_methods", create_payment_method, "PaymentMethodCreateParams", "type card metadata"),
    Route("GET", "/v1/payment_methods", list_payment_methods, "PaymentMethodListParams", f"{PAGING} customer type"),
    Route("GET", "/v1/payment_methods/{id}", retrieve_payment_method, "PaymentMethodRetrieveParams"),
    Route("POST", "/v1/payment_methods/{id}/attach", attach, "PaymentMethodAttachParams", "customer"),
    Route("POST", "/v1/payment_methods/{id}/detach", detach, "PaymentMethodDetachParams"),
]
