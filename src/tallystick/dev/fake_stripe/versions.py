"""Objects in the shape of API versions before 2025-03-31.basil.

Basil moved a subscription's period to its items, an invoice's subscription below `parent`, and a line's price below
`pricing`. Older versions differ in more than that; these are the fields that integrations read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tallystick.dev.fake_stripe.rendering import plan_of, render
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

API_VERSION = "2026-10-28.endive"
"""The account's own version: what the SDK pins, and what events carry."""

BASIL = "2025-03-31"


def before_basil(version: str | None) -> bool:
    """Whether this version still has the older shape. Versions begin with their date."""
    return version is not None and version[:10] < BASIL


def in_version(account: Account, value: Any, version: str | None) -> Any:
    """A rendered object, list or event in the shape of an API version. The original is left as it is."""
    return _older(account, value) if before_basil(version) else value


def _older(account: Account, value: Any) -> Any:
    if isinstance(value, list):
        return [_older(account, entry) for entry in value]
    if not isinstance(value, dict):
        return value
    older = {name: _older(account, entry) for name, entry in value.items()}
    match older.get("object"):
        case "subscription":
            _move_period_up(older)
        case "invoice":
            _invoice(account, older)
        case "line_item":
            _line(account, older)
        case "event":
            previous = older["data"].get("previous_attributes") or {}
            if "items" in previous:
                _move_period_up(previous)
    return older


def _move_period_up(subscription: Object) -> None:
    for item in subscription["items"].get("data", ()):
        for name in ("current_period_start", "current_period_end"):
            subscription[name] = item.pop(name)


def _invoice(account: Account, invoice: Object) -> None:
    details = (invoice.pop("parent") or {}).get("subscription_details") or {}
    payments = account.state.where("invoice_payment", "invoice", invoice.get("id"))
    invoice |= {
        "subscription": details.get("subscription"),
        "subscription_details": {"metadata": details.get("metadata")},
        "paid": invoice["status"] == "paid",
        "paid_out_of_band": invoice["status"] == "paid" and not payments and invoice["amount_paid"] > 0,
        "payment_intent": payments[-1]["payment"]["payment_intent"] if payments else None,
        "charge": None,
        "tax": None,
    }


def _line(account: Account, line: Object) -> None:
    parent = line.pop("parent") or {}
    details = parent.get("subscription_item_details") or parent.get("invoice_item_details") or {}
    pricing = line.pop("pricing") or {}
    price = account.state.get("price", (pricing.get("price_details") or {}).get("price", ""))
    of_subscription = parent.get("type") == "subscription_item_details"
    line |= {
        "type": "subscription" if of_subscription else "invoiceitem",
        "subscription": details.get("subscription"),
        "subscription_item": details.get("subscription_item"),
        "invoice_item": details.get("invoice_item"),
        "proration": details.get("proration", False),
        "price": render(account, price) if price else None,
        "plan": plan_of(price) if price and price["recurring"] else None,
    }
