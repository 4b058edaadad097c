"""What a customer is entitled to: the features of the products in his running subscriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe.events import emit
from tallystick.dev.fake_stripe.rendering import list_object, render
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

SUMMARY_ENTRIES = 10
"""A summary embeds so many entitlements; the list call gives all."""

GRANTING = frozenset({"active", "trialing", "past_due"})


def recompute(account: Account, customer_id: str) -> None:
    """Brings a customer's active entitlements up to date, and tells of a change by an event with their summary."""
    state = account.state
    features: dict[str, Object] = {}
    for subscription in state.where("subscription", "customer", customer_id):
        if subscription["status"] not in GRANTING:
            continue
        for item in state.where("subscription_item", "subscription", subscription["id"]):
            price = state.get("price", item["price"])
            for link in state.where("product_feature", "_product", price and price["product"]):
                feature = link["entitlement_feature"]
                features[feature["id"]] = feature
    current = state.where("entitlements.active_entitlement", "_customer", customer_id)
    held = {entitlement["feature"] for entitlement in current}
    if held == features.keys():
        return
    before = _summary(account, customer_id)
    for entitlement in current:
        if entitlement["feature"] not in features:
            state.remove("entitlements.active_entitlement", entitlement["id"])
    for feature_id, feature in features.items():
        if feature_id not in held:
            state.put(
                {
                    "id": account.ids.new("ent"),
                    "object": "entitlements.active_entitlement",
                    "feature": feature_id,
                    "livemode": False,
                    "lookup_key": feature["lookup_key"],
                    "_customer": customer_id,
                }
            )
    after = _summary(account, customer_id)
    event_type = "entitlements.active_entitlement_summary.updated"
    emit(account, event_type, after, {"entitlements": before["entitlements"]})


def _summary(account: Account, customer_id: str) -> Object:
    active = account.state.where("entitlements.active_entitlement", "_customer", customer_id)
    shown = [render(account, entitlement) for entitlement in active[:SUMMARY_ENTRIES]]
    entitlements = list_object(
        shown, f"/v1/customer/{customer_id}/entitlements", has_more=len(active) > SUMMARY_ENTRIES
    )
    return {
        "object": "entitlements.active_entitlement_summary",
        "customer": customer_id,
        "entitlements": entitlements,
        "livemode": False,
    }
