"""Translate: from Stripe's objects to changes of the mirror. Pure, and total: no object that Stripe could sign raises.

An endpoint's `api_version` shapes its payloads, not the SDK in use. The fields read here moved in 2025-03-31.basil:

    subscription.current_period_*   →  subscription.items.data[].current_period_*
    invoice.subscription            →  invoice.parent.subscription_details.subscription

Both places are read. Wherever an id is expected there may be the expanded object instead.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from tallystick.card_numbers import holds_card_number
from tallystick.mirror.changes import (
    AnyChange,
    CheckoutSessionChange,
    CustomerChange,
    Entitlement,
    EntitlementsChange,
    InvoiceChange,
    Item,
    MeterChange,
    PaymentMethodChange,
    PriceChange,
    ProductChange,
    SubscriptionChange,
)
from tallystick.mirror.marks import CREATED, FINAL, STUB, UPDATED, Mark

# Stripe's ids have at most 255 characters (https://docs.stripe.com/upgrades). A longer text is not one, and would not
# fit into an index.
MAX_TEXT = 255
MAX_REFERENCE = 100
UNUSABLE = re.compile("[\x00\ud800-\udfff]")

# The last whole second that a datetime can hold.
MAX_TIMESTAMP = int(datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp())

SUMMARY = "entitlements.active_entitlement_summary"

FINAL_STATUSES = {
    "subscription": ("canceled", "incomplete_expired"),
    "invoice": ("paid", "void"),
    "checkout.session": ("complete",),
}

DELETIONS = ("customer.deleted", "product.deleted", "price.deleted", "invoice.deleted")

_HANDLED = {
    "customer": "created updated deleted",
    "customer.subscription": "created updated deleted paused resumed trial_will_end pending_update_applied"
    " pending_update_expired",
    "product": "created updated deleted",
    "price": "created updated deleted",
    "invoice": "created updated deleted finalized finalization_failed sent paid payment_succeeded payment_failed"
    " payment_action_required payment_attempt_required marked_uncollectible voided overdue overpaid will_be_due",
    "payment_method": "attached detached updated automatically_updated",
    "checkout.session": "completed",
    SUMMARY: "updated",
    "billing.meter": "created updated deactivated reactivated",
}

# Thin events about usage that Stripe could not bill. They change nothing in the mirror: what they report is fetched
# later, and settled on the deliveries that it names (usage/error_reports.py).
THIN_TYPES = ("v1.billing.meter.error_report_triggered", "v1.billing.meter.no_meter_found")

# The event types that are handled: an endpoint at Stripe is to have exactly these. `invoice.upcoming` is not one of
# them, since that invoice does not exist yet; nor are thin events about mirrored objects (`v1.customer.updated`), whose
# changes the snapshot events bring.
HANDLED_TYPES: tuple[str, ...] = (
    *(f"{kind}.{what}" for kind, whats in _HANDLED.items() for what in whats.split()),
    *THIN_TYPES,
)


class Translation(Struct, frozen=True):
    """The change that an event makes, if any. `unusable`: why an object of a mirrored kind could not be understood.

    `reports`: it tells of usage that Stripe could not bill.
    """

    change: AnyChange | None = None
    unusable: str | None = None
    reports: bool = False


IGNORED = Translation()
REPORTS = Translation(reports=True)


def translate(event: Mapping[str, Any], reference_key: str) -> Translation:
    """The change of the mirror that an event (https://docs.stripe.com/api/events/object) makes.

    The event's `id`, `type` and `created` have been checked. Types that are not mirrored, thin events, and objects that
    have no id, make none; thin events about the own account's usage are marked as reports. `reference_key` is the
    metadata key of the product's name for a customer.
    """
    type_ = event["type"]
    if type_ in THIN_TYPES and event.get("object") == "v2.core.event" and event.get("context") is None:
        return REPORTS
    kind = _kind_of(type_) if event.get("object") == "event" else None
    payload = _object(_object(event.get("data")).get("object"))
    if type_ == "customer.subscription.deleted" and not is_final("subscription", payload):
        payload = {**payload, "status": "canceled"}
    if kind is None or payload.get("object", kind) != kind or (payload.get("id") is None and kind != SUMMARY):
        return IGNORED
    account = text(event.get("account")) or ""
    if kind == "billing.meter" and account:
        return IGNORED  # usage is told to the own account's meters only
    mark = Mark(
        deleted=type_ in DELETIONS or payload.get("deleted") is True,
        created=instant(event["created"]) or STUB.created,
        rank=FINAL if is_final(kind, payload) else CREATED if type_.endswith((".created", ".attached")) else UPDATED,
        event=event["id"],
    )
    translation = translate_object(kind, payload, mark, reference_key, account)
    if type_ == "invoice.payment_failed" and isinstance(translation.change, InvoiceChange):
        failed_at = mark.created
        return Translation(replace(translation.change, payment_failed_at=failed_at, payment_failing_since=failed_at))
    return translation


def translate_object(
    kind: str, payload: Mapping[str, Any], mark: Mark, reference_key: str, account: str = ""
) -> Translation:
    """The change that brings the mirror to this state of an object. `kind` is what Stripe calls it, in `object`."""
    change: AnyChange | None
    match kind:
        case "customer":
            change = _customer(payload, mark, reference_key)
        case "product":
            change = _product(payload, mark)
        case "price":
            change = _price(payload, mark)
        case "subscription":
            change = _subscription(payload, mark)
        case "invoice":
            change = _invoice(payload, mark)
        case "payment_method":
            change = _payment_method(payload, mark)
        case "checkout.session":
            if payload.get("customer") is None or _reference(payload.get("client_reference_id")) is None:
                return IGNORED  # it links nothing
            change = _checkout_session(payload, mark)
        case _ if kind == SUMMARY:
            change = _entitlements(payload, mark)
        case "billing.meter":
            change = _meter(payload, mark)
        case _:
            return IGNORED
    if change is None:
        return Translation(unusable=f"no usable {kind}")
    return Translation(_of_account(change, account) if account else change)


def _of_account(change: AnyChange, account: str) -> AnyChange:
    if isinstance(change, SubscriptionChange):
        change = replace(change, prices=tuple(replace(price, account=account) for price in change.prices))
    return replace(change, account=account)


def text(value: object, max_length: int = MAX_TEXT) -> str | None:
    """A string that PostgreSQL can keep, else None: not empty, not too long, without NUL or half of a character."""
    if not isinstance(value, str) or not 0 < len(value) <= max_length or UNUSABLE.search(value):
        return None
    return value


def instant(value: object) -> datetime | None:
    """Unix seconds as a UTC time, else None."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TIMESTAMP:
        return None
    return datetime.fromtimestamp(value, UTC)


def id_of(value: object) -> str | None:
    """An id, given as such or as the expanded object."""
    return text(value) if isinstance(value, str) else text(_object(value).get("id"))


def is_final(kind: str, payload: Mapping[str, Any]) -> bool:
    """Whether Stripe never moves the object out of the status that it has; a detached payment method stays so."""
    if kind == "payment_method":
        return payload.get("customer") is None
    return payload.get("status") in FINAL_STATUSES.get(kind, ())


def _kind_of(event_type: str) -> str | None:
    match event_type.split("."):
        case ["customer", "created" | "updated" | "deleted"]:
            return "customer"
        case ["customer", "subscription", _]:
            return "subscription"
        case ["product" | "price" as kind, _]:
            return kind
        case ["invoice", what] if what != "upcoming":
            return "invoice"
        case ["payment_method", _]:
            return "payment_method"
        case ["billing", "meter", _]:
            return "billing.meter"
        case ["checkout", "session", "completed"]:
            return "checkout.session"
        case ["entitlements", "active_entitlement_summary", "updated"]:
            return SUMMARY
        case _:
            return None


def _reference(value: object) -> str | None:
    # Usage and access that name a card number are refused, so that one which stands at Stripe would mean nobody.
    reference = text(value, MAX_REFERENCE)
    return None if reference is not None and holds_card_number(reference) else reference


def _customer(payload: Mapping[str, Any], mark: Mark, reference_key: str) -> CustomerChange | None:
    object_id = id_of(payload)
    if object_id is None:
        return None
    return CustomerChange(
        id=object_id,
        mark=mark,
        ref=_reference(_object(payload.get("metadata")).get(reference_key)),
        delinquent=_flag(payload.get("delinquent")),
        default_payment_method=id_of(_object(payload.get("invoice_settings")).get("default_payment_method")),
    )


def _product(payload: Mapping[str, Any], mark: Mark) -> ProductChange | None:
    object_id = id_of(payload)
    if object_id is None:
        return None
    return ProductChange(id=object_id, mark=mark, active=_flag(payload.get("active")) or False)


def _price(payload: Mapping[str, Any], mark: Mark, *, needs_refresh: bool = False) -> PriceChange | None:
    object_id = id_of(payload)
    if object_id is None:
        return None
    recurring = _object(payload.get("recurring"))
    return PriceChange(
        id=object_id,
        mark=mark,
        needs_refresh=needs_refresh,
        product=id_of(payload.get("product")),
        active=_flag(payload.get("active")) or False,
        type=text(payload.get("type")),
        usage_type=text(recurring.get("usage_type")),
        meter=id_of(recurring.get("meter")),
        lookup_key=text(payload.get("lookup_key")),
    )


def _subscription(payload: Mapping[str, Any], mark: Mark) -> SubscriptionChange | None:
    object_id, customer = id_of(payload), id_of(payload.get("customer"))
    status = text(payload.get("status"))
    if object_id is None or customer is None or status is None:
        return None
    listed = _object(payload.get("items"))
    entries = [_object(entry) for entry in _list(listed.get("data"))]
    # A list says `has_more` when it shows only its beginning, and a payload without one shows nothing.
    complete = isinstance(listed.get("data"), list) and listed.get("has_more") is not True
    return SubscriptionChange(
        id=object_id,
        mark=mark,
        needs_refresh=not complete,
        customer=customer,
        status=status,
        cancel_at_period_end=_flag(payload.get("cancel_at_period_end")) or False,
        cancel_at=instant(payload.get("cancel_at")),
        canceled_at=instant(payload.get("canceled_at")),
        ended_at=instant(payload.get("ended_at")),
        start_date=instant(payload.get("start_date")),
        trial_end=instant(payload.get("trial_end")),
        pending_update_expires_at=instant(_object(payload.get("pending_update")).get("expires_at")),
        pause_collection=text(_object(payload.get("pause_collection")).get("behavior")),
        collection_method=text(payload.get("collection_method")),
        latest_invoice=id_of(payload.get("latest_invoice")),
        items=tuple(item for entry in entries if (item := _item(entry, payload)) is not None),
        complete=complete,
        prices=tuple(price for entry in entries if (price := _embedded_price(entry)) is not None),
    )


def _item(entry: Mapping[str, Any], subscription: Mapping[str, Any]) -> Item | None:
    item_id = id_of(entry)
    if item_id is None:
        return None
    return Item(
        id=item_id,
        price=id_of(entry.get("price")) or id_of(entry.get("plan")),
        current_period_start=instant(entry.get("current_period_start", subscription.get("current_period_start"))),
        current_period_end=instant(entry.get("current_period_end", subscription.get("current_period_end"))),
    )


def _embedded_price(entry: Mapping[str, Any]) -> PriceChange | None:
    # Only what never changes in a price is taken from here; for the rest it is fetched, once.
    price = entry.get("price")
    if not isinstance(price, Mapping):
        return None
    return _price({**price, "active": True, "lookup_key": None}, STUB, needs_refresh=True)


def _invoice(payload: Mapping[str, Any], mark: Mark) -> InvoiceChange | None:
    object_id, customer = id_of(payload), id_of(payload.get("customer"))
    if object_id is None or customer is None:
        return None
    details = _object(_object(payload.get("parent")).get("subscription_details"))
    return InvoiceChange(
        id=object_id,
        mark=mark,
        customer=customer,
        subscription=id_of(details.get("subscription")) or id_of(payload.get("subscription")),
        status=text(payload.get("status")),
        billing_reason=text(payload.get("billing_reason")),
        collection_method=text(payload.get("collection_method")),
        attempted=_flag(payload.get("attempted")) or False,
        period_start=instant(payload.get("period_start")),
        period_end=instant(payload.get("period_end")),
        created=instant(payload.get("created")),
        finalized_at=instant(_object(payload.get("status_transitions")).get("finalized_at")),
        next_payment_attempt=instant(payload.get("next_payment_attempt")),
        due_date=instant(payload.get("due_date")),
    )


def _payment_method(payload: Mapping[str, Any], mark: Mark) -> PaymentMethodChange | None:
    if (object_id := id_of(payload)) is None:
        return None
    customer, type_ = id_of(payload.get("customer")), text(payload.get("type"))
    return PaymentMethodChange(id=object_id, mark=mark, customer=customer, type=type_)


def _checkout_session(payload: Mapping[str, Any], mark: Mark) -> CheckoutSessionChange | None:
    object_id, customer = id_of(payload), id_of(payload.get("customer"))
    reference = _reference(payload.get("client_reference_id"))
    if object_id is None or customer is None or reference is None:
        return None
    return CheckoutSessionChange(id=object_id, mark=mark, customer=customer, client_reference_id=reference)


def _entitlements(payload: Mapping[str, Any], mark: Mark) -> EntitlementsChange | None:
    customer = id_of(payload.get("customer"))
    if customer is None:
        return None
    listed = _object(payload.get("entitlements"))
    # A summary shows ten at most, and says `has_more` then.
    complete = isinstance(listed.get("data"), list) and listed.get("has_more") is not True
    entries = [_object(entry) for entry in _list(listed.get("data"))]
    return EntitlementsChange(
        id=customer,
        mark=mark,
        needs_refresh=not complete,
        entitlements=tuple(
            Entitlement(id=entry_id, feature=id_of(entry.get("feature")), lookup_key=text(entry.get("lookup_key")))
            for entry in entries
            if (entry_id := id_of(entry)) is not None
        ),
        complete=complete,
    )


def _meter(payload: Mapping[str, Any], mark: Mark) -> MeterChange | None:
    object_id, event_name, status = id_of(payload), text(payload.get("event_name")), text(payload.get("status"))
    if object_id is None or event_name is None or status is None:
        return None
    formula = text(_object(payload.get("default_aggregation")).get("formula"))
    customer_key = text(_object(payload.get("customer_mapping")).get("event_payload_key"))
    value_key = text(_object(payload.get("value_settings")).get("event_payload_key"))
    if formula is None or customer_key is None or value_key is None:
        return None
    return MeterChange(
        id=object_id,
        mark=mark,
        event_name=event_name,
        formula=formula,
        customer_key=customer_key,
        value_key=value_key,
        event_time_window=text(payload.get("event_time_window")),
        status=status,
    )


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) or isinstance(value, Mapping) else {}  # noqa: SIM101  a dict is found sooner


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
