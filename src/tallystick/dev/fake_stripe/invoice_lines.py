"""The lines of invoices: what was used or is sold, in exact quantities, and what that costs."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe.ledger import aggregate
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

# The SDK's documentation of `quantity_decimal`: "at most 12 decimal places".
QUANTITY_STEP = Decimal("0.000000000001")


def decimal_text(number: Decimal) -> str:
    """A decimal as Stripe writes it: no exponent, no trailing zeros."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def quantity_used(account: Account, price: Object, item_id: str, customer: str, start: int, end: int) -> Decimal:
    """What a metered price bills for start <= timestamp < end, by its meter's formula; never below zero."""
    meter_id = price["recurring"]["meter"]
    if meter_id is None:
        return usage_recorded(account, item_id, start, end)
    meter = account.state.get("billing.meter", meter_id)
    assert meter is not None, f"{price['id']} has a meter that was never made"
    events = account.ledger.between(meter_id, customer, start, end)
    used = aggregate(events, meter["default_aggregation"]["formula"], meter["event_time_window"])
    return max(used, Decimal(0)).quantize(QUANTITY_STEP, ROUND_HALF_UP)


def usage_recorded(account: Account, item_id: str, start: int, end: int) -> Decimal:
    """The sum of the legacy usage records of a subscription item in a period."""
    item = account.state.get("subscription_item", item_id)
    records = item["_usage_records"] if item is not None else {}
    return Decimal(sum(quantity for moment, quantity in records.items() if start <= int(moment) < end))


def amount_of(price: Object, quantity: Decimal) -> int:
    """Quantity times unit amount, in the currency's smallest unit, halves rounded up."""
    return int((Decimal(price["unit_amount_decimal"]) * quantity).quantize(Decimal(1), ROUND_HALF_UP))


def line_of(
    account: Account, subscription: Object, item: Object, start: int, end: int, *, metered: bool, free: bool = False
) -> Object:
    """An invoice line for one item and period. A metered line is filled in by `refresh`."""
    price = account.state.get("price", item["price"])
    product = account.state.get("product", price["product"]) if price else None
    assert price is not None, f"{item['id']} has a price that was never made"
    assert product is not None, f"{price['id']} has a product that was never made"
    quantity = Decimal(0) if metered else Decimal(item["quantity"])
    line = _blank_line(account, price["currency"], quantity, start, end)
    line |= {
        "amount": 0 if free else amount_of(price, quantity),
        "description": f"{'Trial period for ' if free else ''}{product['name']}",
        "discountable": True,
        "metadata": dict(item["metadata"]),
        "parent": {
            "type": "subscription_item_details",
            "invoice_item_details": None,
            "subscription_item_details": {
                "invoice_item": None,
                "proration": False,
                "proration_details": {"credited_items": None},
                "subscription": subscription["id"],
                "subscription_item": item["id"],
            },
        },
        "pricing": {
            "type": "price_details",
            "price_details": {"price": price["id"], "product": price["product"]},
            "unit_amount_decimal": price["unit_amount_decimal"],
        },
        "subscription": subscription["id"],
        "_metered": metered,
        "_free": free,
    }
    line["subtotal"] = line["amount"]
    return line


def line_of_invoice_item(account: Account, item: Object) -> Object:
    """An invoice line for an invoice item, a one-off charge."""
    line = _blank_line(
        account, item["currency"], Decimal(item["quantity_decimal"]), item["period"]["start"], item["period"]["end"]
    )
    line |= {
        "amount": item["amount"],
        "subtotal": item["amount"],
        "description": item["description"],
        "discountable": item["discountable"],
        "metadata": dict(item["metadata"]),
        "parent": {
            "type": "invoice_item_details",
            "subscription_item_details": None,
            "invoice_item_details": {
                "invoice_item": item["id"],
                "proration": False,
                "proration_details": {"credited_items": None},
                "subscription": None,
            },
        },
        "pricing": item["pricing"],
        "_metered": False,
        "_free": False,
    }
    return line


def _blank_line(account: Account, currency: str, quantity: Decimal, start: int, end: int) -> Object:
    return {
        "id": account.ids.new("il"),
        "object": "line_item",
        "amount": 0,
        "currency": currency,
        "description": None,
        "discount_amounts": [],
        "discountable": True,
        "discounts": [],
        "invoice": None,
        "livemode": False,
        "metadata": {},
        "period": {"start": start, "end": end},
        "pretax_credit_amounts": [],
        "quantity": int(quantity),
        "quantity_decimal": decimal_text(quantity),
        "subscription": None,
        "subtotal": 0,
        "taxes": [],
    }


def fill(account: Account, line: Object, customer: str) -> None:
    """Sets a metered line to what has been used in its period by now."""
    price = account.state.get("price", line["pricing"]["price_details"]["price"])
    assert price is not None, f"{line['id']} has a price that was never made"
    item_id = line["parent"]["subscription_item_details"]["subscription_item"]
    used = quantity_used(account, price, item_id, customer, line["period"]["start"], line["period"]["end"])
    line["quantity"], line["quantity_decimal"] = int(used), decimal_text(used)
    line["amount"] = line["subtotal"] = 0 if line["_free"] else amount_of(price, used)
