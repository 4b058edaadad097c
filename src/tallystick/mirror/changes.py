"""Changes: what an event, or an object fetched from Stripe, says about one mirrored object.

One class a kind, with exactly the fields that the schema keeps, named as Stripe names them. Amounts, names, addresses
and payloads have no place here.
"""

from datetime import datetime

import msgspec

from tallystick.mirror.marks import Mark


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What all kinds have. `needs_refresh`: this is not the whole truth; fetch the object.

    `account` is the connected account that the object belongs to, or '' for the own one.
    """

    id: str
    mark: Mark
    needs_refresh: bool = False
    account: str = ""


class CustomerChange(Change, frozen=True, kw_only=True):
    """`ref` is the product's own reference, from the customer's metadata."""

    ref: str | None
    delinquent: bool | None
    default_payment_method: str | None


class ProductChange(Change, frozen=True, kw_only=True):
    """A product: whether it can be bought."""

    active: bool


class PriceChange(Change, frozen=True, kw_only=True):
    """A price and, when it is metered, its meter."""

    product: str | None
    active: bool
    type: str | None
    usage_type: str | None
    meter: str | None
    lookup_key: str | None


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A subscription item. It has no mark: its subscription's mark guards it."""

    id: str
    price: str | None
    current_period_start: datetime | None
    current_period_end: datetime | None


class SubscriptionChange(Change, frozen=True, kw_only=True):
    """A subscription with its items. `complete`: there are no others, so what is not listed is gone."""

    customer: str
    status: str
    cancel_at_period_end: bool
    cancel_at: datetime | None
    canceled_at: datetime | None
    ended_at: datetime | None
    start_date: datetime | None
    trial_end: datetime | None
    pending_update_expires_at: datetime | None
    pause_collection: str | None
    collection_method: str | None
    latest_invoice: str | None
    items: tuple[Item, ...]
    complete: bool
    prices: tuple[PriceChange, ...]  # as embedded in the items: enough until the price itself is seen


class InvoiceChange(Change, frozen=True, kw_only=True):
    """The payment failures are facts of their own, whichever event has the last word otherwise.

    `payment_failed_at` is the last one and `payment_failing_since` the first.
    """

    customer: str
    subscription: str | None
    status: str | None
    billing_reason: str | None
    collection_method: str | None
    attempted: bool
    period_start: datetime | None
    period_end: datetime | None
    created: datetime | None
    finalized_at: datetime | None
    next_payment_attempt: datetime | None
    due_date: datetime | None
    payment_failed_at: datetime | None = None
    payment_failing_since: datetime | None = None


class PaymentMethodChange(Change, frozen=True, kw_only=True):
    """A payment method; of the card or account itself nothing is kept. Without a customer it has been detached.

    Which one is the default is the customer's to say.
    """

    customer: str | None
    type: str | None


class CheckoutSessionChange(Change, frozen=True, kw_only=True):
    """A completed checkout that tells which customer the product's reference means."""

    customer: str
    client_reference_id: str


class Entitlement(msgspec.Struct, frozen=True, kw_only=True):
    """An active entitlement to a feature. It has no mark: its customer's summary guards it."""

    id: str
    feature: str | None
    lookup_key: str | None


class EntitlementsChange(Change, frozen=True, kw_only=True):
    """A customer's active entitlements; its id is the customer's. `complete`: there are no others."""

    entitlements: tuple[Entitlement, ...]
    complete: bool


class MeterChange(Change, frozen=True, kw_only=True):
    """A meter: its name, and how usage is told to it."""

    event_name: str
    formula: str
    customer_key: str
    value_key: str
    event_time_window: str | None
    status: str


AnyChange = (
    CustomerChange
    | ProductChange
    | PriceChange
    | SubscriptionChange
    | InvoiceChange
    | PaymentMethodChange
    | CheckoutSessionChange
    | EntitlementsChange
    | MeterChange
)
