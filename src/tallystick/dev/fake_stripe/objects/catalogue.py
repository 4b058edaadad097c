"""What is sold: products, prices, and the features that come with products."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe import entitlements
from tallystick.dev.fake_stripe.errors import invalid
from tallystick.dev.fake_stripe.events import changing, emit
from tallystick.dev.fake_stripe.invoice_lines import decimal_text
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
from tallystick.dev.fake_stripe.versions import before_basil

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

PRODUCT = "active name description unit_label statement_descriptor url"


def create_product(account: Account, call: Call) -> Object:
    """POST /v1/products."""
    return render(account, _make_product(account, call.params))


def _make_product(account: Account, given: Object) -> Object:
    now = account.now()
    product_id = given.get("id") or account.ids.new("prod")
    if account.state.get("product", product_id) is not None:
        raise invalid("Product already exists.", param="id", code="resource_already_exists")
    product: Object = {
        "id": product_id,
        "object": "product",
        "active": True,
        "created": now,
        "default_price": None,
        "description": None,
        "images": [],
        "livemode": False,
        "marketing_features": [],
        "metadata": {},
        "name": None,
        "package_dimensions": None,
        "shippable": None,
        "statement_descriptor": None,
        "tax_code": None,
        "type": "service",
        "unit_label": None,
        "updated": now,
        "url": None,
        **{name: value for name, value in given.items() if value != ""},
    }
    account.state.put(product)
    emit(account, "product.created", product)
    return product


def update_product(account: Account, call: Call) -> Object:
    """POST /v1/products/{id}."""
    product = find(account, "product", call.arguments["id"])
    if call.params.get("default_price"):
        find(account, "price", call.params["default_price"], "default_price", status=400)
    with changing(account, product):
        set_fields(product, call.params, f"{PRODUCT} default_price")
        merge_metadata(product, call.params)
        product["updated"] = account.now()
    return render(account, product)


def delete_product(account: Account, call: Call) -> Object:
    """DELETE /v1/products/{id}: only without prices."""
    product = find(account, "product", call.arguments["id"])
    if any(price["product"] == product["id"] for price in account.state.newest_first("price")):
        raise invalid("This product has prices: it can be archived (active=false), not deleted.", param="id")
    emit(account, "product.deleted", product)
    account.state.put(product | {"deleted": True})
    return {"id": product["id"], "object": "product", "deleted": True}


def create_price(account: Account, call: Call) -> Object:
    """POST /v1/prices: per unit, one-time or recurring, licensed or metered by a meter.

    Metered prices without a meter are made with a Stripe-Version before 2025-03-31.basil only, as at Stripe.
    """
    params = call.params
    product_data = params.get("product_data")
    if bool(product_data) == bool(params.get("product")):
        raise invalid("You must specify either `product` or `product_data`.", param="product")
    for name in (product_data or {}).keys() - {"id", *PRODUCT.split(), "metadata"}:
        raise invalid(f"The fake Stripe does not support product_data[{name}].", param=f"product_data[{name}]")
    if (params.get("unit_amount") is None) == (params.get("unit_amount_decimal") is None):
        raise invalid("You must specify one of `unit_amount` and `unit_amount_decimal`.", param="unit_amount")
    if params.get("billing_scheme", "per_unit") != "per_unit":
        raise invalid("The fake Stripe has prices per unit only, no tiers.", param="billing_scheme")
    unit_amount = Decimal(params["unit_amount_decimal"] if "unit_amount_decimal" in params else params["unit_amount"])
    recurring = _recurring(account, call)
    if product_data:
        product = _make_product(account, product_data)
    else:
        product = find(account, "product", params["product"], "product", status=400)
    price: Object = {
        "id": account.ids.new("price"),
        "object": "price",
        "active": params.get("active", True),
        "billing_scheme": "per_unit",
        "created": account.now(),
        "currency": params["currency"].lower(),
        "custom_unit_amount": None,
        "livemode": False,
        "lookup_key": params.get("lookup_key") or None,
        "metadata": {},
        "nickname": params.get("nickname") or None,
        "product": product["id"],
        "recurring": recurring,
        "tax_behavior": params.get("tax_behavior", "unspecified"),
        "tiers_mode": None,
        "transform_quantity": None,
        "type": "recurring" if recurring else "one_time",
        "unit_amount": int(unit_amount) if unit_amount == unit_amount.to_integral_value() else None,
        "unit_amount_decimal": decimal_text(unit_amount),
    }
    merge_metadata(price, call.params)
    account.state.put(price)
    emit(account, "price.created", price)
    return render(account, price)


def _recurring(account: Account, call: Call) -> Object | None:
    given = call.params.get("recurring")
    if not given:
        return None
    usage_type, meter = given.get("usage_type", "licensed"), given.get("meter")
    if meter is not None:
        found = find(account, "billing.meter", meter, "recurring[meter]", status=400)
        if usage_type != "metered":
            raise invalid("A price with a meter has usage_type metered.", param="recurring[usage_type]")
        if found["status"] != "active":
            raise invalid("This meter was deactivated.", param="recurring[meter]")
    elif usage_type == "metered" and not before_basil(call.version):
        raise invalid("Metered prices need a meter.", param="recurring[meter]", code="parameter_missing")
    if not 1 <= given.get("interval_count", 1) <= 36:
        raise invalid("Invalid interval_count.", param="recurring[interval_count]")
    return {
        "interval": given["interval"],
        "interval_count": given.get("interval_count", 1),
        "meter": meter,
        "trial_period_days": None,
        "usage_type": usage_type,
    }


def update_price(account: Account, call: Call) -> Object:
    """POST /v1/prices/{id}."""
    price = find(account, "price", call.arguments["id"])
    with changing(account, price):
        set_fields(price, call.params, "active nickname lookup_key")
        merge_metadata(price, call.params)
    return render(account, price)


def list_prices(account: Account, call: Call) -> Object:
    """GET /v1/prices, also by `lookup_keys`."""
    params = call.params
    keys = params.get("lookup_keys")
    return page(
        account,
        call,
        (
            price
            for price in account.state.newest_first("price")
            if (keys is None or price["lookup_key"] in keys)
            and all(price[name] == params[name] for name in ("active", "product", "type", "currency") if name in params)
        ),
    )


def create_feature(account: Account, call: Call) -> Object:
    """POST /v1/entitlements/features."""
    key = call.params["lookup_key"]
    if any(feature["lookup_key"] == key for feature in account.state.newest_first("entitlements.feature")):
        raise invalid("A feature with this lookup_key exists already.", param="lookup_key")
    feature: Object = {
        "id": account.ids.new("feat"),
        "object": "entitlements.feature",
        "active": True,
        "livemode": False,
        "lookup_key": key,
        "metadata": {},
        "name": call.params["name"],
    }
    merge_metadata(feature, call.params)
    return render(account, account.state.put(feature))


def attach_feature(account: Account, call: Call) -> Object:
    """POST /v1/products/{id}/features: whoever has the product is entitled at once."""
    product = find(account, "product", call.arguments["id"])
    feature = named(account, call, "entitlements.feature", "entitlement_feature")
    links = account.state.where("product_feature", "_product", product["id"])
    if any(link["entitlement_feature"]["id"] == feature["id"] for link in links):
        raise invalid("This feature is attached to this product already.", param="entitlement_feature")
    link = account.state.put(
        {
            "id": account.ids.new("prodft"),
            "object": "product_feature",
            "entitlement_feature": render(account, feature),
            "livemode": False,
            "_product": product["id"],
        }
    )
    _recompute_holders(account, product["id"])
    return render(account, link)


def detach_feature(account: Account, call: Call) -> Object:
    """DELETE /v1/products/{id}/features/{feature}."""
    link = find(account, "product_feature", call.arguments["feature"])
    account.state.remove("product_feature", link["id"])
    _recompute_holders(account, call.arguments["id"])
    return {"id": link["id"], "object": "product_feature", "deleted": True}


def _recompute_holders(account: Account, product_id: str) -> None:
    holders: dict[str, None] = {}
    for item in account.state.all("subscription_item"):
        price = account.state.get("price", item["price"])
        subscription = account.state.get("subscription", item["subscription"])
        if price and subscription and price["product"] == product_id:
            holders[subscription["customer"]] = None
    for customer in holders:
        entitlements.recompute(account, customer)


def list_features_of_product(account: Account, call: Call) -> Object:
    """GET /v1/products/{id}/features."""
    product = find(account, "product", call.arguments["id"])
    return page(account, call, reversed(account.state.where("product_feature", "_product", product["id"])))


def list_active_entitlements(account: Account, call: Call) -> Object:
    """GET /v1/entitlements/active_entitlements?customer=…."""
    customer = named(account, call, "customer", "customer")
    active = account.state.where("entitlements.active_entitlement", "_customer", customer["id"])
    return page(account, call, reversed(active))


PRICE = "currency unit_amount unit_amount_decimal billing_scheme recurring product product_data active lookup_key"

ROUTES = [
    Route("POST", "/v1/products", create_product, "ProductCreateParams", f"{PRODUCT} id metadata"),
    Route("GET", "/v1/products", listing("product", "active"), "ProductListParams", f"{PAGING} active created"),
    Route("GET", "/v1/products/{id}", retrieving("product"), "ProductRetrieveParams"),
    Route("POST", "/v1/products/{id}", update_product, "ProductUpdateParams", f"{PRODUCT} default_price metadata"),
    Route("DELETE", "/v1/products/{id}", delete_product, "ProductDeleteParams"),
    Route("POST", "/v1/prices", create_price, "PriceCreateParams", f"{PRICE} nickname tax_behavior metadata"),
    Route(
        "GET",
        "/v1/prices",
        list_prices,
        "PriceListParams",
        f"{PAGING} active product type currency lookup_keys",
    ),
    Route("GET", "/v1/prices/{id}", retrieving("price"), "PriceRetrieveParams"),
    Route("POST", "/v1/prices/{id}", update_price, "PriceUpdateParams", "active nickname lookup_key metadata"),
    Route(
        "POST",
        "/v1/entitlements/features",
        create_feature,
        "entitlements.FeatureCreateParams",
        "lookup_key name metadata",
    ),
    Route(
        "GET",
        "/v1/entitlements/features",
        lambda account, call: page(account, call, account.state.newest_first("entitlements.feature")),
        "entitlements.FeatureListParams",
        PAGING,
    ),
    Route(
        "GET",
        "/v1/entitlements/features/{id}",
        retrieving("entitlements.feature"),
        "entitlements.FeatureRetrieveParams",
    ),
    Route("POST", "/v1/products/{id}/features", attach_feature, "ProductFeatureCreateParams", "entitlement_feature"),
    Route("GET", "/v1/products/{id}/features", list_features_of_product, "ProductFeatureListParams", PAGING),
    Route("DELETE", "/v1/products/{id}/features/{feature}", detach_feature, "ProductFeatureDeleteParams"),
    Route(
        "GET",
        "/v1/entitlements/active_entitlements",
        list_active_entitlements,
        "entitlements.ActiveEntitlementListParams",
        f"{PAGING} customer",
    ),
    Route(
        "GET",
        "/v1/entitlements/active_entitlements/{id}",
        retrieving("entitlements.active_entitlement"),
        "entitlements.ActiveEntitlementRetrieveParams",
    ),
]
