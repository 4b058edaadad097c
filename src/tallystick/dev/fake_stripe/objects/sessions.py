"""Sessions that send a person to a page: the customer portal and the checkout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe import payments
from tallystick.dev.fake_stripe.errors import invalid
from tallystick.dev.fake_stripe.events import changing, emit
from tallystick.dev.fake_stripe.lifecycle import is_metered
from tallystick.dev.fake_stripe.objects.customers import make_customer
from tallystick.dev.fake_stripe.objects.new_subscriptions import subscribe
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
from tallystick.dev.fake_stripe.settings import DAY_SECONDS
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

CONFIGURATION = "billing_portal.configuration"

OPEN_SECONDS = 5 * 60
"""A portal session must be opened within this time."""


def create_portal_session(account: Account, call: Call) -> Object:
    """POST /v1/billing_portal/sessions. Without `configuration` the account needs a default one, else 400."""
    params, now = call.params, account.now()
    customer = named(account, call, "customer", "customer")
    if params.get("configuration"):
        configuration = find(account, CONFIGURATION, params["configuration"], "configuration", status=400)
    else:
        configuration = _default_configuration(account)
    flow = params.get("flow_data")
    if flow and flow["type"].startswith("subscription_"):
        target = (flow.get(flow["type"]) or {}).get("subscription")
        subscription = find(account, "subscription", target, f"flow_data[{flow['type']}][subscription]", status=400)
        if subscription["customer"] != customer["id"]:
            raise invalid("This subscription belongs to another customer.", param="flow_data")
    session_id = account.ids.new("bps")
    secret = account.ids.new("test")
    session: Object = {
        "id": session_id,
        "object": "billing_portal.session",
        "configuration": configuration["id"],
        "created": now,
        "customer": customer["id"],
        "customer_account": None,
        "flow": flow,
        "livemode": False,
        "locale": params.get("locale"),
        "on_behalf_of": None,
        "return_url": params.get("return_url") or configuration["default_return_url"],
        "url": f"{call.base_url}/p/session/{secret}",
        "_secret": secret,
        "_opened": False,
    }
    account.state.put({"object": "_portal_secret", "id": secret, "session": session_id})
    account.state.put(session)
    emit(account, "billing_portal.session.created", session)
    return render(account, session)


def _default_configuration(account: Account) -> Object:
    if not account.settings.portal_default_configuration:
        raise invalid(
            "No configuration provided, and this account has no default configuration of the customer portal."
        )
    for configuration in account.state.all(CONFIGURATION):
        if configuration["is_default"]:
            return configuration
    return _make_configuration(account, {"invoice_history": {"enabled": True}}, is_default=True)


def _make_configuration(account: Account, features: Object, *, is_default: bool) -> Object:
    now = account.now()
    named_features = (
        "customer_update",
        "invoice_history",
        "payment_method_update",
        "subscription_cancel",
        "subscription_update",
    )
    return account.state.put(
        {
            "id": account.ids.new("bpc"),
            "object": CONFIGURATION,
            "active": True,
            "application": None,
            "business_profile": {"headline": None, "privacy_policy_url": None, "terms_of_service_url": None},
            "created": now,
            "default_return_url": None,
            "features": {name: {"enabled": False} for name in named_features} | features,
            "is_default": is_default,
            "livemode": False,
            "login_page": {"enabled": False, "url": None},
            "metadata": {},
            "name": None,
            "updated": now,
        }
    )


def create_configuration(account: Account, call: Call) -> Object:
    """POST /v1/billing_portal/configurations."""
    configuration = _make_configuration(account, call.params["features"], is_default=False)
    set_fields(configuration, call.params, "default_return_url name")
    merge_metadata(configuration, call.params)
    return render(account, account.state.put(configuration))


def update_configuration(account: Account, call: Call) -> Object:
    """POST /v1/billing_portal/configurations/{id}."""
    configuration = find(account, CONFIGURATION, call.arguments["id"])
    with changing(account, configuration):
        set_fields(configuration, call.params, "active default_return_url name")
        configuration["features"] |= call.params.get("features") or {}
        merge_metadata(configuration, call.params)
        configuration["updated"] = account.now()
    return render(account, configuration)


def list_configurations(account: Account, call: Call) -> Object:
    """GET /v1/billing_portal/configurations."""
    if account.settings.portal_default_configuration:
        _default_configuration(account)
    wanted = {name: call.params[name] for name in ("active", "is_default") if name in call.params}
    entries = account.state.newest_first(CONFIGURATION)
    return page(account, call, (one for one in entries if all(one[name] == value for name, value in wanted.items())))


def create_checkout_session(account: Account, call: Call) -> Object:
    """POST /v1/checkout/sessions: of mode `subscription` or `setup`. Its page completes it."""
    params, now = call.params, account.now()
    mode = params.get("mode")
    if mode not in ("subscription", "setup"):
        raise invalid("The fake Stripe has checkout sessions of mode subscription and setup.", param="mode")
    if params.get("customer"):
        named(account, call, "customer", "customer")
    items = params.get("line_items") or []
    if (mode == "subscription") != bool(items):
        raise invalid("line_items are given with mode subscription, and only then.", param="line_items")
    for number, item in enumerate(items):
        for name in item.keys() - {"price", "quantity"}:
            raise invalid(f"The fake Stripe does not support line_items[{number}][{name}].", param="line_items")
        find(account, "price", item.get("price"), f"line_items[{number}][price]", status=400)
    data = params.get("subscription_data") or {}
    for name in data.keys() - {"metadata", "trial_period_days"}:
        raise invalid(f"The fake Stripe does not support subscription_data[{name}].", param="subscription_data")
    session_id = account.ids.new("cs_test")
    session: Object = {
        "id": session_id,
        "object": "checkout.session",
        "amount_subtotal": None,
        "amount_total": None,
        "cancel_url": params.get("cancel_url"),
        "client_reference_id": params.get("client_reference_id"),
        "created": now,
        "currency": None,
        "custom_fields": [],
        "customer": params.get("customer"),
        "customer_details": None,
        "customer_email": params.get("customer_email"),
        "expires_at": now + DAY_SECONDS,
        "invoice": None,
        "livemode": False,
        "metadata": {},
        "mode": mode,
        "payment_intent": None,
        "payment_method_types": ["card"],
        "payment_status": "no_payment_required" if mode == "setup" else "unpaid",
        "setup_intent": None,
        "shipping_options": [],
        "status": "open",
        "subscription": None,
        "success_url": params.get("success_url"),
        "url": f"{call.base_url}/c/pay/{session_id}",
        "_line_items": items,
        "_subscription_data": data,
    }
    merge_metadata(session, call.params)
    return render(account, account.state.put(session))


def complete_checkout(account: Account, session: Object) -> None:
    """What the checkout page does: a customer with a working card, his subscription, `checkout.session.completed`.

    Raises StripeError 400 when the session is not open any more.
    """
    if session["status"] != "open" or session["expires_at"] <= account.now():
        raise invalid("This checkout session is not open any more.", param="id")
    customer = account.state.get("customer", session["customer"] or "")
    if customer is None:
        customer = make_customer(account, {"email": session["customer_email"]})
    card = payments.attached(account, customer, "pm_card_visa", "payment_method")
    with changing(account, customer):
        customer["invoice_settings"]["default_payment_method"] = card["id"]
    session |= {"status": "complete", "customer": customer["id"], "url": None}
    session["customer_details"] = {"email": customer["email"], "name": customer["name"], "phone": customer["phone"]}
    if session["mode"] == "subscription":
        items = [_subscription_item(account, item) for item in session["_line_items"]]
        subscription = subscribe(account, customer, {"items": items, **session["_subscription_data"]})
        session |= {"subscription": subscription["id"], "payment_status": "paid", "currency": subscription["currency"]}
    account.state.put(session)
    emit(account, "checkout.session.completed", session)


def _subscription_item(account: Account, item: Object) -> Object:
    # A checkout may give a metered price a quantity of 1; the subscription's item has none.
    price = find(account, "price", item["price"])
    return {"price": item["price"]} if is_metered(price) else item


def expire_checkout_session(account: Account, call: Call) -> Object:
    """POST /v1/checkout/sessions/{id}/expire."""
    session = find(account, "checkout.session", call.arguments["id"])
    if session["status"] != "open":
        raise invalid(f"This session is {session['status']}.", param="id")
    session |= {"status": "expired", "url": None}
    account.state.put(session)
    emit(account, "checkout.session.expired", session)
    return render(account, session)


PORTAL = "/v1/billing_portal"

ROUTES = [
    Route(
        "POST",
        f"{PORTAL}/sessions",
        create_portal_session,
        "billing_portal.SessionCreateParams",
        "customer configuration return_url locale flow_data",
    ),
    Route(
        "POST",
        f"{PORTAL}/configurations",
        create_configuration,
        "billing_portal.ConfigurationCreateParams",
        "features default_return_url name metadata",
    ),
    Route(
        "GET",
        f"{PORTAL}/configurations",
        list_configurations,
        "billing_portal.ConfigurationListParams",
        f"{PAGING} active is_default",
    ),
    Route(
        "GET",
        f"{PORTAL}/configurations/{{id}}",
        retrieving(CONFIGURATION),
        "billing_portal.ConfigurationRetrieveParams",
    ),
    Route(
        "POST",
        f"{PORTAL}/configurations/{{id}}",
        update_configuration,
        "billing_portal.ConfigurationUpdateParams",
        "active features default_return_url name metadata",
    ),
    Route(
        "POST",
        "/v1/checkout/sessions",
        create_checkout_session,
        "checkout.SessionCreateParams",
        "mode customer customer_email client_reference_id line_items metadata subscription_data success_url cancel_url",
    ),
    Route(
        "GET",
        "/v1/checkout/sessions",
        listing("checkout.session", "customer", "status", "subscription"),
        "checkout.SessionListParams",
        f"{PAGING} customer status subscription created",
    ),
    Route("GET", "/v1/checkout/sessions/{id}", retrieving("checkout.session"), "checkout.SessionRetrieveParams"),
    Route("POST", "/v1/checkout/sessions/{id}/expire", expire_checkout_session, "checkout.SessionExpireParams"),
]
