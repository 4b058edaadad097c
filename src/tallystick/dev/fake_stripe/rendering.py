"""How objects look on the wire: without the fake's own notes, with what Stripe embeds, and with what is expanded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tallystick.dev.fake_stripe.errors import invalid
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

EMBEDDED_LINES = 10
"""An invoice shows its first lines; the others are listed by `/v1/invoices/{id}/lines`."""

MAX_EXPANSION_DEPTH = 4

KINDS_BY_PREFIX = {
    "cus": "customer",
    "sub": "subscription",
    "si": "subscription_item",
    "in": "invoice",
    "price": "price",
    "prod": "product",
    "pm": "payment_method",
    "pi": "payment_intent",
    "feat": "entitlements.feature",
    "bpc": "billing_portal.configuration",
}


def render(account: Account, item: Object) -> Object:
    """An object as Stripe would send it, in the account's own API version."""
    kind = item["object"]
    if item.get("deleted"):
        return {"id": item["id"], "object": kind, "deleted": True}
    shown = {name: value for name, value in item.items() if not name.startswith("_")}
    if kind == "subscription":
        items = account.state.where("subscription_item", "subscription", item["id"])
        url = f"/v1/subscription_items?subscription={item['id']}"
        shown["items"] = list_object([render(account, entry) for entry in items], url)
    elif kind == "subscription_item":
        price = account.state.get("price", item["price"])
        assert price is not None, f"{item['id']} has a price that was never made"
        shown["price"] = render(account, price)
        shown["plan"] = plan_of(price)
    elif kind == "invoice":
        lines = [render(account, line) for line in item["_lines"]]
        url = f"/v1/invoices/{item.get('id', 'upcoming')}/lines"
        shown["lines"] = list_object(lines[:EMBEDDED_LINES], url, has_more=len(lines) > EMBEDDED_LINES)
        shown["lines"]["total_count"] = len(lines)
    return shown


def list_object(items: list[Object], url: str, *, has_more: bool = False) -> Object:
    """A list as Stripe writes it."""
    return {"object": "list", "data": items, "has_more": has_more, "url": url}


def plan_of(price: Object) -> Object:
    """The older face of a recurring price, which subscription items still carry."""
    recurring = price["recurring"]
    return {
        "id": price["id"],
        "object": "plan",
        "active": price["active"],
        "amount": price["unit_amount"],
        "amount_decimal": price["unit_amount_decimal"],
        "billing_scheme": price["billing_scheme"],
        "created": price["created"],
        "currency": price["currency"],
        "interval": recurring["interval"],
        "interval_count": recurring["interval_count"],
        "livemode": False,
        "metadata": price["metadata"],
        "meter": recurring["meter"],
        "nickname": price["nickname"],
        "product": price["product"],
        "tiers_mode": None,
        "transform_usage": None,
        "trial_period_days": recurring["trial_period_days"],
        "usage_type": recurring["usage_type"],
    }


def expand(account: Account, answer: Object, paths: list[str]) -> Object:
    """Replaces ids by their objects, for each path of `expand`. Raises StripeError 400 where there is no such field."""
    for path in paths:
        steps = path.split(".")
        if len(steps) > MAX_EXPANSION_DEPTH:
            raise invalid(f"You cannot expand more than {MAX_EXPANSION_DEPTH} levels: {path}", param="expand")
        _expand_step(account, answer, steps, path)
    return answer


def _expand_step(account: Account, holder: Any, steps: list[str], path: str) -> None:
    if isinstance(holder, list):
        for entry in holder:
            _expand_step(account, entry, steps, path)
        return
    if holder is None or not steps:
        return
    step, rest = steps[0], steps[1:]
    if step == "payments" and holder.get("object") == "invoice":
        payments = account.state.where("invoice_payment", "invoice", holder["id"])
        url = f"/v1/invoice_payments?invoice={holder['id']}"
        holder["payments"] = list_object([render(account, payment) for payment in payments], url)
    if step not in holder:
        raise invalid(f"This property cannot be expanded ({path}).", param="expand")
    value = holder[step]
    if isinstance(value, str):
        found = account.state.get(KINDS_BY_PREFIX.get(value.partition("_")[0], ""), value)
        if found is not None:
            holder[step] = render(account, found)
    _expand_step(account, holder[step], rest, path)
