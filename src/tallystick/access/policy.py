"""The policy: from the statuses of a customer's subscriptions and invoices to its access; the table is docs/access.md.

Each subscription grants or restricts by itself; the customer has the best that any of them gives. Nothing is taken
from the order in which events came, so the same mirror always gives the same access.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Access = Literal["active", "grace", "restricted", "none"]

# Best first; where several subscriptions give the same access, the reason that stands first here is shown.
REASONS: tuple[tuple[Access, str], ...] = (
    ("active", "subscription_active"),
    ("active", "payment_received"),
    ("active", "trial"),
    ("active", "collection_paused"),
    ("restricted", "payment_failed"),
    ("restricted", "past_due"),
    ("restricted", "unpaid"),
    ("restricted", "paused"),
    ("none", "incomplete"),
    ("none", "ended"),
    ("none", "unknown_status"),
    ("none", "no_subscription"),
    ("none", "customer_deleted"),
)

# Statuses in which a payment is expected, so that a failed one means something.
LIVE = ("active", "trialing", "past_due", "unpaid")
OPEN, UNCOLLECTIBLE, SETTLED = "open", "uncollectible", ("paid", "void")


@dataclass(frozen=True)
class Subscription:
    """What the policy looks at, as the mirror has it. `prices`: of the items that are not deleted."""

    id: str
    status: str
    pause_collection: str | None = None
    latest_invoice: str | None = None
    prices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Invoice:
    """An invoice of one of the subscriptions. `payment_failed_at` stays set when a later try succeeds."""

    id: str
    subscription: str | None
    status: str | None
    created: datetime | None
    payment_failed_at: datetime | None


@dataclass(frozen=True)
class Decision:
    """The access, why, and the sorted price ids that the subscriptions with active access grant."""

    access: Access
    reason: str
    prices: tuple[str, ...] = ()


def decide_access(
    subscriptions: Iterable[Subscription], invoices: Iterable[Invoice], *, customer_deleted: bool = False
) -> Decision:
    """Decide a customer's access. Pure; the orders of the arguments do not matter."""
    if customer_deleted:
        return Decision("none", "customer_deleted")
    invoices = list(invoices)
    decided = [(subscription, _decide(subscription, invoices)) for subscription in subscriptions]
    if not decided:
        return Decision("none", "no_subscription")
    access, reason = min((result for _, result in decided), key=REASONS.index)
    prices = {price for subscription, (granted, _) in decided if granted == "active" for price in subscription.prices}
    return Decision(access, reason, tuple(sorted(prices)))


def _decide(subscription: Subscription, invoices: Sequence[Invoice]) -> tuple[Access, str]:
    latest = next((invoice for invoice in invoices if invoice.id == subscription.latest_invoice), None)
    # A failed payment restricts at once, whatever the subscription's own row still says.
    if subscription.status in LIVE and any(
        _is_unpaid(invoice, latest) for invoice in invoices if invoice.subscription == subscription.id
    ):
        return "restricted", "payment_failed"
    match subscription.status:
        case "active" if subscription.pause_collection is not None:
            return "active", "collection_paused"
        case "active":
            return "active", "subscription_active"
        case "trialing":
            return "active", "trial"
        case "past_due" | "unpaid" if latest is not None and latest.status in SETTLED:
            # And a payment lifts it at once.
            return "active", "payment_received"
        case "past_due" | "unpaid" | "paused" as status:
            return "restricted", status
        case "incomplete":
            return "none", "incomplete"
        case "canceled" | "incomplete_expired":
            return "none", "ended"
        case _:
            return "none", "unknown_status"


def _is_unpaid(invoice: Invoice, latest: Invoice | None) -> bool:
    """Whether a payment of this invoice failed and is still missing.

    An uncollectible invoice is one whose money the seller has given up: once a later one is paid it no longer counts.
    """
    if invoice.payment_failed_at is None:
        return False
    if invoice.status == UNCOLLECTIBLE:
        return not (latest is not None and latest.status in SETTLED and _is_later(latest, invoice))
    return invoice.status == OPEN


def _is_later(one: Invoice, other: Invoice) -> bool:
    return one.created is not None and other.created is not None and one.created > other.created
