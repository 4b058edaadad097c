"""The items of a subscription, and the usage records that older accounts still report on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

from tallystick.dev.fake_stripe import entitlements, lifecycle
from tallystick.dev.fake_stripe.errors import invalid, missing
from tallystick.dev.fake_stripe.events import changing
from tallystick.dev.fake_stripe.rendering import list_object, render
from tallystick.dev.fake_stripe.resources import PAGING, Route, find, merge_metadata, named, page, retrieving
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account, Call

MOST_ITEMS = 20

SUPPORTED = frozenset({"id", "price", "quantity", "metadata", "deleted"})


class _Quantity(TypedDict):
    quantity: int


class UsageRecordCreateParams(_Quantity, total=False):
    """The parameters of a usage record: Stripe's documentation of API version 2025-02-24.acacia."""

    timestamp: int | Literal["now"]
    action: Literal["increment", "set"]


class UsageRecordSummaryListParams(TypedDict, total=False):
    """The parameters of the summaries' list, of the same version."""

    limit: int
    starting_after: str
    ending_before: str


def check_items(account: Account, given: list[Object]) -> list[tuple[Object, Object]]:
    """The prices for the wanted items. Raises StripeError 400 for what one subscription cannot hold."""
    if not 1 <= len(given) <= MOST_ITEMS:
        raise invalid(f"A subscription has 1 to {MOST_ITEMS} items.", param="items")
    wanted = []
    for number, item in enumerate(given):
        param = f"items[{number}]"
        for name in item.keys() - SUPPORTED:
            raise invalid(f"The fake Stripe does not support {param}[{name}].", param=f"{param}[{name}]")
        wanted.append((_recurring_price(account, item, f"{param}[price]"), item))
    first = wanted[0][0]
    for price, item in wanted:
        _check_fit(price, item, first)
    return wanted


def _recurring_price(account: Account, item: Object, param: str) -> Object:
    if "price" not in item:
        raise invalid(f"Missing required param: {param}.", param=param, code="parameter_missing")
    price = find(account, "price", item["price"], param, status=400)
    if price["recurring"] is None or not price["active"]:
        raise invalid(f"{price['id']} is not an active recurring price.", param=param)
    return price


def _check_fit(price: Object, item: Object, other: Object) -> None:
    same = price["currency"] == other["currency"] and all(
        price["recurring"][name] == other["recurring"][name] for name in ("interval", "interval_count")
    )
    if not same:
        raise invalid("All items of a subscription have one currency and one interval.", param="items")
    if lifecycle.is_metered(price) and "quantity" in item:
        raise invalid("A metered item has no quantity.", param="items")
    if item.get("quantity", 1) < 0:
        raise invalid("Invalid quantity.", param="items")


def add_item(account: Account, subscription: Object, price: Object, given: Object) -> Object:
    """Adds an item with the subscription's present period."""
    others = lifecycle.items_of(account, subscription)
    now = account.now()
    return account.state.put(
        {
            "id": account.ids.new("si"),
            "object": "subscription_item",
            "billing_thresholds": None,
            "created": now,
            "current_period_end": others[0]["current_period_end"] if others else now,
            "current_period_start": others[0]["current_period_start"] if others else now,
            "discounts": [],
            "metadata": dict(given.get("metadata") or {}),
            "price": price["id"],
            "quantity": None if lifecycle.is_metered(price) else given.get("quantity", 1),
            "subscription": subscription["id"],
            "tax_rates": [],
            "_usage_records": {},
        }
    )


def change_items(account: Account, subscription: Object, given: list[Object]) -> None:
    """`items` of a subscription's update: with an id they change or end an item, without one they add.

    Raises StripeError 400 before anything is changed.
    """
    items = lifecycle.items_of(account, subscription)
    known = {item["id"]: item for item in items}
    count = len(items)
    for number, wanted in enumerate(given):
        param = f"items[{number}]"
        for name in wanted.keys() - SUPPORTED:
            raise invalid(f"The fake Stripe does not support {param}[{name}].", param=f"{param}[{name}]")
        if "id" in wanted and wanted["id"] not in known:
            raise missing("subscription item", wanted["id"], f"{param}[id]")
        count += ("id" not in wanted) - bool(wanted.get("deleted"))
        if not wanted.get("deleted"):
            price = _price_after(account, known.get(wanted.get("id")), wanted, param)
            _check_fit(price, wanted, lifecycle.price_of(account, items[0]))
    if not 1 <= count <= MOST_ITEMS:
        raise invalid(f"A subscription has 1 to {MOST_ITEMS} items.", param="items")
    for number, wanted in enumerate(given):
        if "id" not in wanted:
            price = _price_after(account, None, wanted, f"items[{number}]")
            add_item(account, subscription, price, wanted)
        elif wanted.get("deleted"):
            account.state.remove("subscription_item", wanted["id"])
        else:
            item = known[wanted["id"]]
            _change_item(account, item, _price_after(account, item, wanted, f"items[{number}]"), wanted)


def _price_after(account: Account, item: Object | None, wanted: Object, param: str) -> Object:
    if item is not None and "price" not in wanted:
        return lifecycle.price_of(account, item)
    return _recurring_price(account, wanted, f"{param}[price]")


def _change_item(account: Account, item: Object, price: Object, wanted: Object) -> None:
    metered = lifecycle.is_metered(price)
    item["price"] = price["id"]
    item["quantity"] = None if metered else wanted.get("quantity", item["quantity"] or 1)
    merge_metadata(item, wanted)
    account.state.put(item)


def create(account: Account, call: Call) -> Object:
    """POST /v1/subscription_items."""
    subscription = named(account, call, "subscription", "subscription")
    given = {name: value for name, value in call.params.items() if name != "subscription"}
    with changing(account, subscription):
        change_items(account, subscription, [given])
    entitlements.recompute(account, subscription["customer"])
    return render(account, lifecycle.items_of(account, subscription)[-1])


def update(account: Account, call: Call) -> Object:
    """POST /v1/subscription_items/{id}."""
    item = find(account, "subscription_item", call.arguments["id"])
    subscription = find(account, "subscription", item["subscription"])
    with changing(account, subscription):
        change_items(account, subscription, [{"id": item["id"], **call.params}])
    entitlements.recompute(account, subscription["customer"])
    return render(account, item)


def delete(account: Account, call: Call) -> Object:
    """DELETE /v1/subscription_items/{id}: not the last one."""
    item = find(account, "subscription_item", call.arguments["id"])
    subscription = find(account, "subscription", item["subscription"])
    if len(lifecycle.items_of(account, subscription)) == 1:
        raise invalid("A subscription keeps at least one item: cancel the subscription instead.", param="id")
    with changing(account, subscription):
        account.state.remove("subscription_item", item["id"])
    entitlements.recompute(account, subscription["customer"])
    return {"id": item["id"], "object": "subscription_item", "deleted": True}


def list_items(account: Account, call: Call) -> Object:
    """GET /v1/subscription_items?subscription=…."""
    subscription = named(account, call, "subscription", "subscription")
    return page(account, call, reversed(lifecycle.items_of(account, subscription)))


def _legacy_item(account: Account, call: Call) -> Object:
    item = find(account, "subscription_item", call.arguments["id"])
    price = lifecycle.price_of(account, item)
    if not lifecycle.is_metered(price) or price["recurring"]["meter"] is not None:
        raise invalid("Usage records belong to items whose price is metered without a meter.", param="id")
    return item


def create_usage_record(account: Account, call: Call) -> Object:
    """POST /v1/subscription_items/{id}/usage_records, before 2025-03-31.basil. Only the Idempotency-Key dedupes it."""
    item = _legacy_item(account, call)
    params: dict[str, Any] = call.params
    now = account.now()
    moment = now if params.get("timestamp", "now") == "now" else params["timestamp"]
    if params["quantity"] < 0:
        raise invalid("A quantity is not below 0.", param="quantity", code="parameter_invalid_integer")
    if not item["current_period_start"] <= moment < item["current_period_end"] or moment > now + 300:
        raise invalid("The timestamp must lie within the item's current period, and not ahead.", param="timestamp")
    records = item["_usage_records"]
    # JSON keys are text; the state goes through JSON.
    earlier = records.get(str(moment), 0) if params.get("action", "increment") == "increment" else 0
    records[str(moment)] = earlier + params["quantity"]
    account.state.put(item)
    return {
        "id": account.ids.new("mbur"),
        "object": "usage_record",
        "livemode": False,
        "quantity": records[str(moment)] if params.get("action") == "set" else params["quantity"],
        "subscription_item": item["id"],
        "timestamp": moment,
    }


def list_usage_record_summaries(account: Account, call: Call) -> Object:
    """GET /v1/subscription_items/{id}/usage_record_summaries, before 2025-03-31.basil: the current period's total."""
    item = _legacy_item(account, call)
    start, end = item["current_period_start"], item["current_period_end"]
    total = sum(quantity for moment, quantity in item["_usage_records"].items() if start <= int(moment) < end)
    summary = {
        "id": f"sis_{item['id']}_{start}",
        "object": "usage_record_summary",
        "invoice": None,
        "livemode": False,
        "period": {"start": start, "end": end},
        "subscription_item": item["id"],
        "total_usage": total,
    }
    return list_object([summary], call.path)


ITEM = "price quantity metadata"

ROUTES = [
    Route("POST", "/v1/subscription_items", create, "SubscriptionItemCreateParams", f"{ITEM} subscription"),
    Route("GET", "/v1/subscription_items", list_items, "SubscriptionItemListParams", f"{PAGING} subscription"),
    Route("GET", "/v1/subscription_items/{id}", retrieving("subscription_item"), "SubscriptionItemRetrieveParams"),
    Route("POST", "/v1/subscription_items/{id}", update, "SubscriptionItemUpdateParams", ITEM),
    Route("DELETE", "/v1/subscription_items/{id}", delete, "SubscriptionItemDeleteParams"),
    Route(
        "POST",
        "/v1/subscription_items/{id}/usage_records",
        create_usage_record,
        UsageRecordCreateParams,
        "quantity timestamp action",
        legacy=True,
    ),
    Route(
        "GET",
        "/v1/subscription_items/{id}/usage_record_summaries",
        list_usage_record_summaries,
        UsageRecordSummaryListParams,
        PAGING,
        legacy=True,
    ),
]
