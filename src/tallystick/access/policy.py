"""The policy: from the statuses of a customer's subscriptions and invoices to its access; the table is docs/access.md.

Each subscription grants or restricts by itself; the customer has the best that any of them gives. What a status means
is data (`AccessRules`). Nothing is taken from the order in which events came, so the same mirror, rules and moment
always give the same access.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tallystick.rules import Access, AccessRules

# Raised whenever this module decides otherwise for the same mirror and rules: then everybody is decided anew.
POLICY_VERSION = 1

# Best first.
ACCESSES: tuple[Access, ...] = ("active", "grace", "restricted", "none")

# Where several subscriptions give the same access, the reason that stands first here is shown.
REASONS = (
    "subscription_active",
    "payment_received",
    "trial",
    "collection_paused",
    "payment_failed",
    "one_off_payment_failed",
    "past_due",
    "unpaid",
    "paused",
    "incomplete",
    "ended",
    "unknown_status",
    "no_subscription",
    "customer_deleted",
)

# Stripe takes times of any year, and there is none after this.
END_OF_TIME = datetime.max.replace(tzinfo=UTC)

OPEN, UNCOLLECTIBLE, SETTLED = "open", "uncollectible", ("paid", "void")


@dataclass(frozen=True)
class Subscription:
    """What the policy looks at, as the mirror has it. `prices`: of the items that are not deleted."""

    id: str
    status: str
    pause_collection: str | None = None
    latest_invoice: str | None = None
    prices: tuple[str, ...] = ()
    current_period_start: datetime | None = None


@dataclass(frozen=True)
class Invoice:
    """An invoice. `payment_failing_since`, its first failed payment, stays set when a later try succeeds."""

    id: str
    subscription: str | None
    status: str | None
    created: datetime | None
    payment_failing_since: datetime | None
    due_date: datetime | None = None
    finalized_at: datetime | None = None


@dataclass(frozen=True)
class Decision:
    """The access, why, and the sorted price ids of the subscriptions that give active access or grace.

    `until`: when grace ends, if nothing else happens. `decide_again_at`: when the first part of this decision ends by
    itself, which may be the grace of one subscription of several.
    """

    access: Access
    reason: str
    prices: tuple[str, ...] = ()
    until: datetime | None = None
    decide_again_at: datetime | None = None


@dataclass(frozen=True)
class _Grant:
    """What one subscription gives by itself."""

    access: Access
    reason: str
    until: datetime | None = None


def fingerprint(rules: AccessRules) -> str:
    """A short text that is another one whenever other rules, or another release's policy, would decide."""
    return hashlib.sha256(f"{POLICY_VERSION} {rules.model_dump_json()}".encode()).hexdigest()[:16]


def decide_access(
    subscriptions: Iterable[Subscription],
    invoices: Iterable[Invoice],
    rules: AccessRules,
    now: datetime,
    *,
    customer_deleted: bool = False,
) -> Decision:
    """Decide a customer's access. Pure; neither order nor repetition in the arguments matters."""
    if customer_deleted:
        return Decision("none", "customer_deleted")
    # Found, not searched for: a customer may have hundreds of failing subscriptions and as many invoices.
    by_id = {invoice.id: invoice for invoice in invoices}
    of_subscription: defaultdict[str | None, list[Invoice]] = defaultdict(list)
    for invoice in by_id.values():
        of_subscription[invoice.subscription].append(invoice)
    granted = [
        (subscription, _decide(subscription, of_subscription.get(subscription.id, ()), by_id, rules, now))
        for subscription in subscriptions
    ]
    if not granted:
        return Decision("none", "no_subscription")
    grants = [grant for _, grant in granted]
    best = min(grants, key=lambda grant: (ACCESSES.index(grant.access), REASONS.index(grant.reason)))
    ends = [grant.until for grant in grants if grant.until is not None]
    if best.access == "grace":
        graces = [grant.until for grant in grants if grant.access == "grace"]
        # A grace without an end, which a rule can give, outlasts the others.
        best = _Grant("grace", best.reason, None if None in graces else max(ends))
    if rules.one_off_invoices == "restrict":
        one_off = _decide_one_off(of_subscription.get(None, ()), rules, now)
        if one_off is not None:
            ends += [one_off.until] if one_off.until is not None else []
            best = _worse(best, one_off)
    prices = {
        price
        for subscription, grant in granted
        if {grant.access, best.access} <= {"active", "grace"}
        for price in subscription.prices
    }
    return Decision(best.access, best.reason, tuple(sorted(prices)), best.until, min(ends, default=None))


def _decide(
    subscription: Subscription, own: Sequence[Invoice], by_id: Mapping[str, Invoice], rules: AccessRules, now: datetime
) -> _Grant:
    match subscription.status:
        case "active" if subscription.pause_collection is not None:
            paying = _Grant("active", "collection_paused")
        case "active":
            paying = _Grant("active", "subscription_active")
        case "trialing":
            paying = _Grant(rules.trialing, "trial")
        case "past_due" | "unpaid":
            # And a payment lifts it at once, whatever the subscription's own row still says.
            paying = _Grant("active", "payment_received")
        case "paused":
            return _Grant(rules.paused, "paused")
        case "incomplete":
            return _Grant(rules.incomplete, "incomplete")
        case "canceled" | "incomplete_expired":
            return _Grant("none", "ended")
        case _:
            return _Grant("none", "unknown_status")
    latest = by_id.get(subscription.latest_invoice) if subscription.latest_invoice is not None else None
    owing = rules.unpaid if subscription.status == "unpaid" else rules.past_due
    # A failed payment counts at once, whatever the subscription's own row still says.
    failing = [
        invoice.payment_failing_since
        for invoice in own
        if invoice.payment_failing_since is not None and _is_unpaid(invoice, latest)
    ]
    if failing:
        return _worse(paying, _with_grace(owing, "payment_failed", min(failing), rules, now), "payment_failed")
    if subscription.status in ("past_due", "unpaid") and (latest is None or latest.status not in SETTLED):
        return _with_grace(owing, subscription.status, _owing_since(subscription, own, latest, now), rules, now)
    return paying


def _decide_one_off(one_off: Iterable[Invoice], rules: AccessRules, now: datetime) -> _Grant | None:
    """What failed invoices without a subscription leave of the access; None when there are none.

    An uncollectible one has been given up, and no later invoice could ever make up for it.
    """
    failing = [
        invoice.payment_failing_since
        for invoice in one_off
        if invoice.status == OPEN and invoice.payment_failing_since is not None
    ]
    return _with_grace("restricted", "one_off_payment_failed", min(failing), rules, now) if failing else None


def _with_grace(access: Access, reason: str, since: datetime | None, rules: AccessRules, now: datetime) -> _Grant:
    """Grace, if it is better than `access` and has not run out, counted from `since`; unknown: it has."""
    if since is not None and ACCESSES.index(access) > ACCESSES.index("grace"):
        days = timedelta(days=rules.grace_days)
        end = since + days if since <= END_OF_TIME - days else END_OF_TIME
        if now < end:
            return _Grant("grace", reason, end)
    return _Grant(access, reason)


def _worse(one: _Grant, other: _Grant, reason: str | None = None) -> _Grant:
    """The worse of two, for the reason given or its own; of two graces the one that ends first."""
    if one.access == other.access:
        until = min((end for end in (one.until, other.until) if end is not None), default=None)
        return _Grant(one.access, reason or one.reason, until)
    worse = max(one, other, key=lambda grant: ACCESSES.index(grant.access))
    return _Grant(worse.access, reason or worse.reason, worse.until)


def _is_unpaid(invoice: Invoice, latest: Invoice | None) -> bool:
    """Whether an invoice whose payment failed is still to be paid.

    An uncollectible invoice is one whose money the seller has given up: once a later one is paid it no longer counts.
    """
    if invoice.status == UNCOLLECTIBLE:
        return not (latest is not None and latest.status in SETTLED and _is_later(latest, invoice))
    return invoice.status == OPEN


def _owing_since(
    subscription: Subscription, own: Iterable[Invoice], latest: Invoice | None, now: datetime
) -> datetime | None:
    """Since when money is owed though no payment is known to have failed, as with invoices that are sent."""
    overdue = [
        invoice.due_date
        for invoice in own
        if invoice.status == OPEN and invoice.due_date is not None and invoice.due_date <= now
    ]
    if overdue:
        return min(overdue)
    billed = latest.finalized_at or latest.created if latest is not None else None
    return billed or subscription.current_period_start


def _is_later(one: Invoice, other: Invoice) -> bool:
    return one.created is not None and other.created is not None and one.created > other.created
